"""Runs several processes with simulated devices on this machine as one run, to try what works on many hosts.

python launch/local.py --processes=2 --devices=4 -- python -m sddit_jax.main --config=configs/digits.py --workdir=runs/a

Each process gets the flags --distributed, --process_index, --process_count and --heartbeat_seconds behind its other
arguments, and the lines that it prints begin with its index. SIGTERM and Ctrl-C go to all processes. When one has
failed, the others have the heartbeat time and half a minute more to end; then they are killed. The exit code is the
first of these that a process ended with: 2 (a mistake), 3 (diverged), 75 (interrupted and saved), another failure, 0; a
process that signal N killed counts as 128 + N. --restarts starts all processes again, unless the exit code is 0, 2 or 3
or a signal came.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

FINAL = (0, 2, 3)


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """The variables that each process gets beside those of this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    # Only process 0 finds its programs in a compilation cache. It would then be far ahead of the others, and simulated
    # devices give up if they wait for each other for half a minute.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "JAX_ENABLE_COMPILATION_CACHE": "false"}


def commands(command: list[str], processes: int, port: int, heartbeat_seconds: int) -> list[list[str]]:
    """The command of each process."""
    place = [f"--distributed=127.0.0.1:{port}", f"--process_count={processes}"]
    return [
        [*command, *place, f"--process_index={index}", f"--heartbeat_seconds={heartbeat_seconds}"]
        for index in range(processes)
    ]


def worst(codes: list[int]) -> int:
    """The exit code of all processes, from the exit code of each."""
    positive = [128 - code if code < 0 else code for code in codes]
    return next((code for code in (2, 3, 75) if code in positive), max(positive))


def run_once(argv: list[list[str]], env: dict[str, str], grace: float, stop: list[int]) -> int:
    """Runs all processes to their end, and returns the exit code of all. Passes on the signals in `stop`."""
    processes = [
        # Each has a session of its own, since a terminal would send Ctrl-C to it too.
        subprocess.Popen(
            words, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )
        for words in argv
    ]  # fmt: skip
    readers = [threading.Thread(target=show, args=pair) for pair in enumerate(processes)]
    for reader in readers:
        reader.start()
    passed_on, deadline = 0, None
    while any(process.poll() is None for process in processes):
        for number in stop[passed_on:]:
            passed_on += 1
            for process in processes:
                process.send_signal(number)
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    for reader in readers:
        reader.join()
    return worst([process.returncode for process in processes])


def show(index: int, process: subprocess.Popen) -> None:
    """Prints the lines of a process with its index."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def main() -> int:
    """Runs the command of the arguments, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--devices", type=int, default=4, help="simulated CPU devices of each process (4)")
    parser.add_argument("--heartbeat_seconds", type=int, default=100, help="seconds until a silent one is dead (100)")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start all processes again (0)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run none")
    parser.add_argument("command", nargs="+", help="behind --, such as python -m sddit_jax.main --config=FILE")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices must be at least 1")

    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    env = environment(args.devices)
    for left in range(args.restarts, -1, -1):
        argv = commands(args.command, args.processes, free_port(), args.heartbeat_seconds)
        if args.dry_run:
            words = " ".join(f"{key}={shlex.quote(value)}" for key, value in env.items())
            print(*(f"{words} {shlex.join(process)}" for process in argv), sep="\n")
            return 0
        code = run_once(argv, env, args.heartbeat_seconds + 30, stop)
        if code in FINAL or stop or not left:
            break
        print(f"exit code {code}; starting again, {left} more", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

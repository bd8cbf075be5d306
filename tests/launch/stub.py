"""Stands in for gcloud, kubectl, SLURM's commands and the training, by the name it is called by.

Every call is a line of STUB/calls: its name and arguments. What is simulated:

    gcloud    a TPU of two workers, whose home folders are STUB/worker0 and STUB/worker1, and what is run there by ssh
              is run; STUB/states has a line for each TPU to be created: the states it shows one after another;
              STUB/create_errors the messages of the first failures of create
    training  each run takes the first line of STUB/plan (or of plan in its home): exit code and step it saves before
    srun      runs its command; scancel sends it SIGTERM; squeue prints STUB/job_state
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STUB = Path(os.environ["STUB"])
NAME, ARGUMENTS = Path(sys.argv[0]).name, sys.argv[1:]


def pop(path: Path, last_stays: bool = False) -> str | None:
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return None
    path.write_text("".join(f"{line}\n" for line in (lines if last_stays and len(lines) == 1 else lines[1:])))
    return lines[0]


def flag(name: str) -> str:
    return next(word.split("=", 1)[1] for word in ARGUMENTS if word.startswith(f"--{name}="))


def workers() -> list[Path]:
    every = sorted(STUB.glob("worker?"))
    return every if flag("worker") == "all" else [every[int(flag("worker"))]]


def kill_all_processes() -> None:
    for file in STUB.glob("worker?/sddit_jax_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def gcloud() -> int:
    kind, what = ARGUMENTS[2:4]
    if what == "create":
        if message := pop(STUB / "create_errors"):
            print(message, file=sys.stderr)
            return 1
        states = (pop(STUB / "states") or "READY").split()
        (STUB / f"{kind}.states").write_text("".join(f"{state}\n" for state in states))
        if kind == "queued-resources":
            (STUB / "tpu-vm.states").write_text("READY\n")
        for index in range(2):
            (STUB / f"worker{index}").mkdir()
    elif what == "describe":
        state = pop(STUB / f"{kind}.states", last_stays=True)
        if state is None:
            print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
            return 1
        if state in ("PREEMPTED", "SUSPENDED"):
            kill_all_processes()
        if state == "REBOOTED":
            kill_all_processes()
            state = "READY"
        print("WARNING: gcloud has more to say", file=sys.stderr)
        print(state)
    elif what == "delete":
        kill_all_processes()
        for file in STUB.glob("*.states"):
            file.unlink()
        for home in STUB.glob("worker?"):
            shutil.rmtree(home)
    elif what == "scp":
        for home in workers():
            shutil.copy(ARGUMENTS[4], home / ARGUMENTS[5].split(":")[1])
    elif what == "ssh":
        codes = []
        for home in workers():
            environment = os.environ | {"HOME": str(home), "WORKER": home.name}
            codes.append(subprocess.run(["bash", "-c", flag("command")], cwd=home, env=environment).returncode)
        return max(codes)
    return 0


def python3() -> int:
    """A worker's own Python, with uv: an environment is a python that trains."""
    if ARGUMENTS[:3] == ["-m", "uv", "venv"]:
        folder = Path(ARGUMENTS[-1], "bin")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "python").unlink(missing_ok=True)
        (folder / "python").symlink_to(Path(sys.argv[0]).parent / "training")
    if ARGUMENTS[:3] == ["-m", "uv", "pip"]:
        assert Path("sddit_jax/setup.cfg").is_file()
    return 0


def training() -> int:
    mine = Path.home() / "plan"
    code, *steps = (pop(mine if mine.exists() else STUB / "plan") or "0").split()
    (STUB / f"{os.environ.get('WORKER', 'training')}.pid").write_text(str(os.getpid()))
    workdir = Path(flag("workdir")).expanduser()
    received = []

    def handler(number, frame):
        # As the training: a second SIGTERM kills.
        received.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if code == "late":
        time.sleep(1)
    if code in ("wait", "late"):
        signal.signal(signal.SIGTERM, handler)
        (STUB / "ready").touch()
        while not received:
            time.sleep(0.02)
        time.sleep(0.5)
        code = "75"
    for step in steps:
        (workdir / "checkpoints" / step).mkdir(parents=True, exist_ok=True)
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(code)


def srun() -> int:
    command = ARGUMENTS[next(i for i, word in enumerate(ARGUMENTS) if not word.startswith("--")) :]
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(137))
    return subprocess.run(command).returncode


def scancel() -> int:
    os.kill(int((STUB / "training.pid").read_text()), signal.SIGTERM)
    return 0


def squeue() -> int:
    print((STUB / "job_state").read_text())
    return 0


def kubectl() -> int:
    if ARGUMENTS[0] == "apply":
        (STUB / "manifest").write_text(sys.stdin.read())
    return 0


COMMANDS = {f.__name__: f for f in (gcloud, python3, training, srun, scancel, squeue, kubectl)}

if __name__ == "__main__":
    with (STUB / "calls").open("a") as file:
        file.write(json.dumps([NAME, *ARGUMENTS]) + "\n")
    if NAME == "python":
        sys.exit(training())
    sys.exit(COMMANDS[NAME]() if NAME in COMMANDS else 0)

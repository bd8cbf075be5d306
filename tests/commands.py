"""Commands as a user runs them, each in a process of its own, without the seconds of its imports.

Run as a program, this file imports what the commands import, and forks for each command that it is asked for.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
COUNT = "--xla_force_host_platform_device_count"


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with so many CPU devices, which compiles as this one."""
    flags = os.environ["XLA_FLAGS"].replace(f"{COUNT}=8", f"{COUNT}={devices}")
    return os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}


class Commands:
    """Runs `python -m sddit_jax.NAME ARGUMENTS` on one device."""

    def __init__(self, server: subprocess.Popen) -> None:
        self._server = server

    def __call__(self, name: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        """The exit code and what was said. After TIMEOUT seconds SIGALRM ends the command."""
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
            request = [name, [str(a) for a in arguments], str(cwd), str(stdout), str(stderr)]
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


@contextmanager
def serving() -> Iterator[Commands]:
    """The commands, for as long as the context lasts."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore:os.fork:RuntimeWarning", __file__],
        env=environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server:
        yield Commands(server)
        server.stdin.close()


def serve() -> None:
    """Answers each line of stdin with an exit code. A child leaves the loop by its command's SystemExit."""
    for line in sys.stdin:
        name, arguments, cwd, stdout, stderr = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(TIMEOUT)
            os.chdir(cwd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for path, descriptor in ((stdout, 1), (stderr, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.argv = [f"sddit_jax.{name}", *arguments]
            runpy.run_module(f"sddit_jax.{name}", run_name="__main__", alter_sys=True)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    # No backend of JAX is touched by these, so no thread is lost by a fork; none defines a command's flags.
    import sddit_jax.data.preparation
    import sddit_jax.generation.drawing
    import sddit_jax.interop.transfer
    import sddit_jax.train  # noqa: F401

    gc.freeze()  # A child that ends need not look at all of that.
    serve()

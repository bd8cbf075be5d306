"""Parses the arguments of Python programs as the programs do, and stops where they would begin to work.

As a program it reads [[folder, arguments of python], ...] from stdin and writes a list with the message of each.
"""

import gc
import json
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import flags

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.config.presets import imagenet
from sddit_jax.errors import CommandError
from sddit_jax.runs.folder import write_config
from sddit_jax.sampling.sampler import SOLVERS


def check(folder: str, arguments: list[str]) -> None:
    """Does in `folder` what `python ARGUMENTS` does until its flags and its config are known."""
    os.chdir(folder)
    cli.run = parse
    for run in re.findall(r"configs/finetune\.py:(?:run=)?([^/\s]\S*)", " ".join(arguments)):
        if not Path(run).exists():  # Nothing before on the page trains it: imported weights.
            write(run, resolve(imagenet(256, "method=maskdit")))
    program = arguments[0]
    if program == "-c":
        compile(arguments[1], "-c", "exec")
    elif program == "-m" and arguments[1].startswith("sddit_jax."):
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif program.startswith("benchmarks/"):
        sys.argv = arguments
        sys.path.insert(0, "benchmarks")
        runpy.run_path(program, run_name="__main__")
    elif program != "-m" and not Path(program).exists():
        sys.exit(f"error: there is no {program}")


def parse(command, words: int = 0) -> NoReturn:
    """Stands for cli.run. Leaves a run's config.json, which later commands may read."""
    try:
        for word in cli.parse_flags(sys.argv, words)[:1]:
            if f" {word} " not in sys.modules["__main__"].__doc__:
                sys.exit(f"error: {word} is not in the command's --help")
        values = flags.FLAGS.flag_values_dict()
        if (solver := values.get("solver")) and solver not in SOLVERS:
            sys.exit(f"error: --solver={solver} is none of {', '.join(SOLVERS)}")
        if values.get("config"):
            config, workdir = resolve(values["config"]), values.get("workdir")
            if workdir and not Path(workdir).is_absolute():
                write(workdir, config)
    except CommandError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)


def write(workdir: str, config) -> None:
    Path(workdir).mkdir(parents=True, exist_ok=True)
    write_config(Path(workdir), config)


def message_of(folder: str, arguments: list[str]) -> str:
    """What `check` says in a process of its own; empty if the arguments are right."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            check(folder, arguments)
        finally:
            error = sys.exception()
            said = error.code if isinstance(error, SystemExit) else error and traceback.format_exc()
            os.write(writing, str(said or "").encode())
            os._exit(1 if said else 0)
    os.close(writing)
    with os.fdopen(reading) as output:
        message = output.read()
    _, status = os.waitpid(child, 0)
    return message or (f"status {status}" if status else "")


if __name__ == "__main__":
    # What the commands and the benchmarks import, once; see commands.py.
    import torch  # noqa: F401

    import sddit_jax.data.preparation
    import sddit_jax.generation.drawing
    import sddit_jax.interop.transfer
    import sddit_jax.train  # noqa: F401

    gc.freeze()
    json.dump([message_of(*request) for request in json.load(sys.stdin)], sys.stdout)

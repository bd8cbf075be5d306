"""How the benchmarks measure: ways take turns, so that what else the machine does falls on all, and medians count."""

import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from absl import flags

from sddit_jax import cli
from sddit_jax.errors import UserError
from sddit_jax.parallel import cpu

REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Measurements of each way.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "Also write the rows, and machine and versions, to this file.")

# Else JAX would take most of a GPU's memory at its start, and leave too little for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclasses.dataclass(frozen=True)
class Spread:
    """What the repetitions of one way gave."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As '1.234 (1.2 to 1.3)'."""
        median, low, high = (f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in dataclasses.astuple(self))
        return f"{median} ({low} to {high})"


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a benchmark as the commands run: see `cli.run` and `cpu.keep_working_memory`."""

    def command() -> None:
        cpu.keep_working_memory()
        main()

    cli.run(command)


def measure(ways: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, Spread]:
    """The ways take `repetitions` turns; what they return is waited for.

    In each turn a way is called twice, and the second call counts: memory that a way has given back while the others
    ran comes back slowly, above all in virtual machines, and a run of many steps does not wait for it.
    """
    taken = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            jax.block_until_ready(way())
            began = time.perf_counter()
            jax.block_until_ready(way())
            taken[name].append(time.perf_counter() - began)
    return {name: spread(seconds) for name, seconds in taken.items()}


@contextlib.contextmanager
def elsewhere(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """The way make(*arguments), in a process of its own, with the memory and threads that it would have alone."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()

    def way() -> None:
        here.send(None)
        here.recv()

    try:
        # Until it is ready, so that its start takes nothing from the other ways.
        here.recv()
        yield way
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, make: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> None:
    flags.FLAGS(sys.argv)
    way = make(*arguments)
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            way()
            connection.send(None)


def torch_device() -> str:
    """PyTorch's name for the kind of device that JAX computes on. Raises UserError for one that it has not."""
    names = {"cpu": "cpu", "gpu": "cuda"}
    if (backend := jax.default_backend()) not in names:
        raise UserError(f"PyTorch is compared on {' and '.join(names)}, and JAX computes on {backend}")
    return names[backend]


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def matrix_product() -> tuple[Callable[[], Any], float]:
    """A product of matrices, float32 or on accelerators bfloat16, and its operations: what the machine does at best."""
    # Large enough that starting it costs nothing.
    size, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (16384, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * size**3


def machine() -> dict[str, Any]:
    """Where the numbers are from."""
    name = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        name = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), name)
    versions = {}
    for package in ("jax", "jaxlib", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def show(rows: Sequence[Mapping[str, Any]], **where: str) -> None:
    """Prints rows of the same columns as a table in Markdown, `where`, machine and versions; writes all if asked."""
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n")
    for row in rows:
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        print(f"| {' | '.join(cells)} |")
    where |= machine()
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    if JSON.value:
        rows = [{k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in r.items()} for r in rows]
        Path(JSON.value).write_text(json.dumps({"machine": where, "rows": rows}, indent=1))

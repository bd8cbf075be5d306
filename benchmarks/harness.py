"""What the benchmarks share: taking times, PyTorch in a process of its own, and printing tables.

The ways that a benchmark compares take turns, so that other load on the machine slows all of them, and the medians of
the repetitions are compared.
"""

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

REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Times that each way is measured.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write the rows, the machine and the versions to, as JSON.")

# By default JAX takes most of a GPU's memory at its start, which leaves too little for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range of the repetitions of one way."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As '1.234 (1.2 to 1.3)'."""
        median, low, high = (f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in dataclasses.astuple(self))
        return f"{median} ({low} to {high})"


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a benchmark as `cli.run` runs the commands, with `cpu.keep_working_memory`."""

    def command() -> None:
        cpu.keep_working_memory()
        main()

    cli.run(command)


def measure(ways: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, Spread]:
    """The seconds of a call of each way, until its result is ready, over `repetitions` turns.

    A turn calls a way twice and measures the second call. The first gets memory back that the way released while others
    ran; that is slow, above all in virtual machines, and a run of many steps does not wait for it.
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
    """The way make(*arguments) in a process of its own, so that it has memory and threads as if it were alone."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()

    def way() -> None:
        here.send(None)
        here.recv()

    try:
        # Waits until it is ready, so that its start does not slow the other ways.
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
    """PyTorch's name of the device that JAX computes on, "cpu" or "cuda". Raises UserError for other devices."""
    names = {"cpu": "cpu", "gpu": "cuda"}
    if (backend := jax.default_backend()) not in names:
        raise UserError(f"JAX computes on {backend}, but PyTorch is compared only on {' and '.join(names)}")
    return names[backend]


def beside_torch(
    way: Callable[[], Any], make_torch: Callable[..., Callable[[], Any]], arguments: Sequence[Any], compiled: bool
) -> tuple[dict[str, Any], dict[str, Spread], float]:
    """Measures a way beside PyTorch, and the matmul rate of the machine in FLOPs per second.

    make_torch(*arguments, compiled, device) makes the way of PyTorch, in eager mode and if `compiled` under
    torch.compile. Returns the cells of a row, the times by name ("JAX", "PyTorch", "compiled") and the rate: that of
    one large product of matrices, in float32 on CPUs and in bfloat16 on GPUs, in the same turns.
    """
    size, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (16384, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    ways = {"JAX": way, "matmul": lambda: product(a, a)}
    with contextlib.ExitStack() as processes:
        for name in ("PyTorch", "compiled") if compiled else ("PyTorch",):
            torch_way = elsewhere(make_torch, *arguments, name == "compiled", torch_device())
            ways[name] = processes.enter_context(torch_way)
        times = measure(ways, REPETITIONS.value)
    rate = 2.0 * size**3 / times.pop("matmul").median
    cells = {f"{name}, s": seconds for name, seconds in times.items()}
    cells |= {f"{name} / JAX": times[name].median / times["JAX"].median for name in times if name != "JAX"}
    return cells, times, rate


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def machine() -> dict[str, Any]:
    """The machine and the versions that the numbers are from."""
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
    """Prints rows with the same columns as a Markdown table, then `where`, machine and versions; --json writes all."""
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

"""Prints how fast the loader reads latents of 256-pixel images, beside plain NumPy and plain ArrayRecord.

    python benchmarks/loader.py --records=16384 --batch_size=256 --threads=2 --repetitions=7

Writes random latents of 32 x 32 x 4 to a temporary folder, with mean and standard deviation of each image and its
mirror image. All ways read the same records in the order of the loader; they take turns, and their medians are
compared. The operating system keeps the files in memory, so the disk is not measured. The loader reads latents in
memory with one thread, and latents in files with --threads.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import harness
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordReader

from sddit_jax import cli
from sddit_jax.data import shards
from sddit_jax.data.latents import LatentsSource
from sddit_jax.data.loader import make_loader

RECORDS = flags.DEFINE_integer("records", 16384, "Records to write, 32 KiB each.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images in a batch.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 200, "Batches in a measurement.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "Threads of the loader that reads files.", lower_bound=0)
SHARDS = 16
SHAPE = (32, 32, 4)


def write(folder: Path) -> None:
    """Writes a folder of random latents."""
    plan = shards.Plan(
        source="random",
        source_split="train",
        source_records=RECORDS.value,
        source_files="",
        class_names=(),
        codec={"scaling_factor": 1.0, "shift_factor": 0.0},
        latent_shape=SHAPE,
        batch_size=BATCH_SIZE.value,
        dtype="float32",
        records_per_shard=-(-RECORDS.value // SHARDS),
    )

    def batches(shard: int) -> Iterator[shards.Moments]:
        index = np.array(plan.images(shard))
        moments = np.random.default_rng(shard).random((len(index), 2, 2, *SHAPE), np.float32)
        yield moments.astype(np.float16), np.zeros_like(index), index

    shards.begin(folder, plan)
    for shard in range(plan.num_shards):
        shards.write_shard(folder, plan, shard, batches(shard), {})
    shards.finish(folder, plan)


def batches_of(source: Any, threads: int, start_step: int) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """The loader's batches."""
    return make_loader(
        source,
        batch_size=BATCH_SIZE.value,
        rows=range(BATCH_SIZE.value),
        seed=0,
        start_step=start_step,
        flip=True,
        num_threads=threads,
        prefetch=8 if threads else 0,
    )


class Order:
    """A source that gives only the numbers of the records of a batch."""

    def __len__(self) -> int:
        return RECORDS.value

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of the records, and whether each is mirrored."""
        return {"record": indices_b, "mirrored": mirrored_b}


def images_per_second(step: Callable[[], Any]) -> float:
    """Images per second over STEPS calls of `step`."""
    began = time.perf_counter()
    for _ in range(STEPS.value):
        step()
    return STEPS.value * BATCH_SIZE.value / (time.perf_counter() - began)


def measure(folder: Path) -> dict[str, list[float]]:
    """Images per second of each way, a value for each repetition."""
    streamed, in_memory = (LatentsSource(folder, "train", SHAPE, in_memory=memory) for memory in (False, True))
    everything = np.arange(RECORDS.value)
    halves = [in_memory.read(everything, np.full(RECORDS.value, mirrored))["moments"] for mirrored in (False, True)]
    moments = np.concatenate(halves)  # all images, then all mirror images
    readers = [
        ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15)
        for path in sorted(folder.glob("*.array_record*"))
    ]
    per_shard = -(-RECORDS.value // SHARDS)

    def gather(batch: dict[str, np.ndarray]) -> None:
        moments.take(batch["record"] + batch["mirrored"] * RECORDS.value, axis=0)

    def read_one_by_one(batch: dict[str, np.ndarray]) -> None:
        for index in batch["record"].tolist():
            readers[index // per_shard].read([index % per_shard])

    def read(batch: dict[str, np.ndarray]) -> None:
        for shard in np.unique(batch["record"] // per_shard).tolist():
            own = batch["record"][batch["record"] // per_shard == shard]
            readers[shard].read((own % per_shard).tolist())

    def raw(use: Callable[[dict[str, np.ndarray]], None], step: int) -> float:
        order = batches_of(Order(), 0, step)
        batches = iter([next(order) for _ in range(STEPS.value)])
        return images_per_second(lambda: use(next(batches)))

    def loaded(source: LatentsSource, threads: int, step: int) -> float:
        with closing(batches_of(source, threads, step)) as batches:
            for _ in range(8):  # Batches that were read ahead before the measurement began.
                next(batches)
            return images_per_second(lambda: next(batches))

    ways = {
        "memory: numpy.take": lambda step: raw(gather, step),
        "memory: loader": lambda step: loaded(in_memory, 1, step),
        "files: ArrayRecord, a read for each file": lambda step: raw(read, step),
        "files: ArrayRecord, a read for each record": lambda step: raw(read_one_by_one, step),
        "files: loader": lambda step: loaded(streamed, THREADS.value, step),
    }
    rates = {name: [] for name in ways}
    for repetition in range(harness.REPETITIONS.value):
        for name, way in ways.items():
            rates[name].append(way(repetition * STEPS.value))
    return rates


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        rates = {name: harness.spread(values) for name, values in measure(Path(folder)).items()}
    harness.show([{"way": name, "images/s": rate} for name, rate in rates.items()])
    gather, in_memory, batched, one_by_one, streamed = (rate.median for rate in rates.values())
    print(f"\nfrom memory the loader is {in_memory / gather:.2f} times as fast as numpy.take")
    print(
        f"from files it is {streamed / batched:.2f} times as fast as ArrayRecord with a read for each file, and "
        f"{streamed / one_by_one:.2f} times as fast as with a read for each record"
    )


if __name__ == "__main__":
    cli.run(main)

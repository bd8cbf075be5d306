"""Batches whose rows are a pure function of (seed, step, row), read ahead by threads."""

import functools
import sys
import threading
from collections.abc import Callable, Sequence

import grain
import numpy as np

from sddit_jax.data.image_sources import Batch, Source
from sddit_jax.errors import DataError


def make_loader(
    source: Source,
    *,
    batch_size: int,
    rows: Sequence[int] | np.ndarray,
    seed: int,
    start_step: int,
    flip: bool,
    num_threads: int,
    prefetch: int,
) -> grain.DatasetIterator[Batch]:
    """Returns the endless batches of steps start_step, start_step + 1, ...

    Epochs, each a permutation of all records, follow one another in an endless sequence. Row r of step s has the
    record at position p = s * batch_size + r of the sequence. The row is a function of (seed, p) alone, so neither the
    number of processes nor an interruption changes it.

    Args:
      source: the records.
      batch_size: rows of the global batch, of all processes together.
      rows: the b rows that this process loads, in this order.
      seed: of the order and of the flips, in [0, 2**64).
      start_step: the step of the first batch; nothing before it is read.
      flip: mirrors each record left to right with probability 1/2.
      num_threads: reading threads; each prepares a whole batch. 0 reads in the caller. One is fastest for latents in
        memory.
      prefetch: batches prepared ahead of the caller; no more threads than these can be busy.

    Returns:
      An iterator over host arrays as `source.read` returns them. Its threads start at once; `close()` stops them.

    Raises DataError if an argument is out of range; while iterating, also whatever the source raises.
    """
    rows_b = np.asarray(rows, np.int64)
    if rows_b.ndim != 1 or not rows_b.size or rows_b.min() < 0 or rows_b.max() >= batch_size:
        raise DataError(f"batch_size={batch_size}, rows={rows}: expected rows in [0, batch_size)")
    if not 0 <= seed < 2**64 or min(start_step, num_threads, prefetch) < 0:
        raise DataError(
            f"seed={seed}, start_step={start_step}, num_threads={num_threads}, prefetch={prefetch}: expected none "
            "negative, and the seed below 2**64"
        )
    records = _endless_order(len(source), seed)

    def load(step: int) -> Batch:
        first = step * batch_size
        mirrored_b = np.zeros(len(rows_b), bool)
        if flip:
            mirrored_b = (random_words(seed, 0, first, 4 * batch_size)[4 * rows_b] & 1).astype(bool)
        return source.read(records(first + rows_b), mirrored_b)

    batches = iter(
        grain.MapDataset.range(start_step, sys.maxsize)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )
    batches.start_prefetch()
    return batches


def _endless_order(size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from positions int64 [b] in the endless sequence to numbers of records [b], for many threads."""

    # Around the end of an epoch, threads need the orders of two epochs.
    @functools.lru_cache(maxsize=2)
    def sorted_order(epoch: int) -> np.ndarray:
        return np.argsort(random_words(seed, epoch + 1, 0, size), kind="stable")

    # One thread sorts, and the others wait for its result.
    sorting = threading.Lock()

    def records(position_b: np.ndarray) -> np.ndarray:
        epoch_b, place_b = divmod(position_b, size)
        record_b = np.empty_like(position_b)
        for epoch in np.unique(epoch_b).tolist():
            with sorting:
                order = sorted_order(epoch)
            record_b[epoch_b == epoch] = order[place_b[epoch_b == epoch]]
        return record_b

    return records


def random_words(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """Random words uint64 [count] of blocks first, first + 1, ... of a stream, four words in a block.

    Philox computes any block at the same cost. NumPy keeps its words the same in every version, which it does not
    promise for the methods of a Generator.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=first).random_raw(count)

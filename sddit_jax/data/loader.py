"""Batches as a pure function of (seed, step, row), read ahead by threads."""

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

    Row r of step s is at position p = s * batch_size + r of an endless sequence: epochs, each one
    a permutation of all records, one after another. Everything about the row is a function of
    (seed, p), so that neither the number of processes nor an interruption can change it.

    Args:
      source: the records.
      batch_size: rows of the global batch, of all processes together.
      rows: which of them this process loads, b in number, in this order.
      seed: of the order and of the flips, in [0, 2**64).
      start_step: the step of the first batch; nothing before it is read.
      flip: mirrors each record left to right with probability 1/2.
      num_threads: reading threads; each prepares a whole batch. 0 reads in the caller; latents in memory are read
        fastest by one.
      prefetch: batches prepared ahead of the caller, hence the most threads that can be busy.

    Returns:
      An iterator over what `source.read` gives: {image: uint8 [b, H, W, C] or, of latents, moments: float16
      [b, 2, H, W, C]; label: int32 [b]; index: int64 [b]}, host arrays that the caller owns. It reads from now on;
      `close()` stops its threads.

    Raises:
      DataError: an argument is out of range; while iterating, also whatever the source raises.
    """
    rows_b = _checked_rows(rows, batch_size)
    if not 0 <= seed < 2**64 or min(start_step, num_threads, prefetch) < 0:
        raise DataError(
            f"seed={seed}, start_step={start_step}, num_threads={num_threads}, "
            f"prefetch={prefetch}: expected none negative, and the seed below 2**64"
        )
    records = _endless_order(len(source), seed)

    def load(step: int) -> Batch:
        first = step * batch_size
        mirrored_b = np.zeros(len(rows_b), bool)
        if flip:
            mirrored_b = (_words(seed, 0, first, 4 * batch_size)[4 * rows_b] & 1).astype(bool)
        return source.read(records(first + rows_b), mirrored_b)

    batches = iter(
        grain.MapDataset.range(start_step, sys.maxsize)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )
    batches.start_prefetch()
    return batches


def _checked_rows(rows: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    rows_b = np.asarray(rows, np.int64)
    if rows_b.ndim != 1 or not rows_b.size or rows_b.min() < 0 or rows_b.max() >= batch_size:
        raise DataError(f"batch_size={batch_size}, rows={rows}: expected rows in [0, batch_size)")
    return rows_b


def _endless_order(size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Positions int64 [b] in the endless sequence -> which of the `size` records are there [b]; for many threads."""

    # Two, because around the end of an epoch threads read in both; the first of them sorts, and the others wait.
    @functools.lru_cache(maxsize=2)
    def sorted_order(epoch: int) -> np.ndarray:
        return np.argsort(_words(seed, epoch + 1, 0, size), kind="stable")

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


def _words(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """Returns uint64 [count] random words of blocks first, first + 1, ..., four words in a block.

    Philox is a function of key and block, so any block costs the same; and unlike the methods of
    its Generator, NumPy promises its words to be the same in every version.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=first).random_raw(count)

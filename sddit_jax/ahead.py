"""Iterators that begin work before its result is needed: files that threads read, batches that devices compute."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


def begun_ahead(items: Iterable[T], ahead: int = 1) -> Iterator[T]:
    """Yields the items in order, and takes each from `items` when the item `ahead` places before it is yielded.

    If taking an item begins its work, such as a computation on a device, that work goes on while the caller uses the
    items before it.
    """
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[T], Result], places: Iterable[T], ahead: int
) -> Iterator[Result]:
    """Yields read(place) for each place in order; the pool's threads read at most `ahead` later places meanwhile.

    What read(place) raises is raised here, when its result would be yielded.
    """
    for future in begun_ahead((pool.submit(read, place) for place in places), ahead):
        yield future.result()

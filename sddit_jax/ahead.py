"""Work that is begun ahead of its use: files read by threads, batches computed by devices."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


def begun_ahead(items: Iterable[T], ahead: int = 1) -> Iterator[T]:
    """The items in order, each when `ahead` later ones have been taken, or all.

    Where taking an item begins its work, such as a computation on a device, the work of the later items goes on while
    this item is used.
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
    """read(place) of each place in order, by threads that are at most `ahead` places in front; what it raises, too."""
    for future in begun_ahead((pool.submit(read, place) for place in places), ahead):
        yield future.result()

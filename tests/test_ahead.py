"""Work that is begun ahead of its use."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sddit_jax.ahead import begun_ahead, read_ahead


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_an_item_is_used_when_so_many_later_ones_are_begun(ahead):
    begun = []

    def begin():
        for item in range(5):
            begun.append(item)
            yield item

    used = []
    for item in begun_ahead(begin(), ahead):
        used.append(item)
        assert begun == list(range(min(item + ahead + 1, 5)))
    assert used == [0, 1, 2, 3, 4]


def test_what_was_begun_before_an_end_is_used():
    def begin():
        yield "first"
        yield "second"

    assert list(begun_ahead(begin(), 5)) == ["first", "second"]
    assert list(begun_ahead(iter(()))) == []


def test_places_are_read_in_order_by_threads_that_are_not_too_far_in_front():
    first, read = threading.Event(), []

    def slowly(place):
        if place == 0:
            assert first.wait(60)
        read.append(place)
        return -place

    with ThreadPoolExecutor(2) as pool:
        found = read_ahead(pool, slowly, range(9), ahead=3)
        pool.submit(first.set)
        assert next(found) == 0
        while len(read) < 4:
            time.sleep(0.001)
        assert sorted(read) == [0, 1, 2, 3]
        assert list(found) == [-place for place in range(1, 9)]


def test_what_a_read_raises_comes_in_its_turn():
    def read(place):
        if place == 2:
            raise OSError("the third")
        return place

    with ThreadPoolExecutor(2) as pool:
        found = read_ahead(pool, read, range(5), ahead=4)
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(OSError, match="the third"):
            next(found)

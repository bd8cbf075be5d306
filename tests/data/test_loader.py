import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.data import loader as loader_module
from sddit_jax.data.image_sources import ImageSource
from sddit_jax.data.loader import make_loader
from sddit_jax.data.sources import open_source
from sddit_jax.errors import DataError


class Numbers:
    """n images [[0, 255]], so that a flip shows, and the list of the records that were read."""

    def __init__(self, n):
        self.n = n
        self.reads = []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert 0 <= index < self.n
        self.reads.append(index)
        image = np.array([[[0], [255]]], np.uint8)
        return {"image": image, "label": np.int32(index % 10), "index": np.int64(index)}

    read = ImageSource.read


def loader(source, batch_size, rows=None, *, seed=0, step=0, flip=True, threads=0, prefetch=0):
    rows = range(batch_size) if rows is None else rows
    return make_loader(
        source,
        batch_size=batch_size,
        rows=rows,
        seed=seed,
        start_step=step,
        flip=flip,
        num_threads=threads,
        prefetch=prefetch,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def positions(source, count, *, batch_size=1, **options):
    """The indices and flips of the first `count` positions."""
    batches = take(loader(source, batch_size, **options), -(-count // batch_size))
    index = np.concatenate([batch["index"] for batch in batches])[:count]
    flips = np.concatenate([batch["image"][:, 0, 0, 0] == 255 for batch in batches])[:count]
    return index, flips


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_has_the_promised_shapes_and_types():
    source = open_source("digits", split="train", image_size=8, channels=1)
    batch = next(loader(source, 6, [4, 1, 5], flip=False))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((3, 8, 8, 1), np.uint8),
        "label": ((3,), np.int32),
        "index": ((3,), np.int64),
    }
    for row in range(3):
        record = source[int(batch["index"][row])]
        np.testing.assert_array_equal(batch["image"][row], record["image"])
        assert batch["label"][row] == record["label"]


@given(
    n=st.integers(1, 40),
    per_process=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 4]),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
)
def test_processes_load_the_rows_of_the_global_batch(n, per_process, processes, interleaved, seed, step):
    batch_size = per_process * processes
    whole = next(loader(Numbers(n), batch_size, seed=seed, step=step))
    rows = np.arange(batch_size)
    rows = rows.reshape(-1, processes).T if interleaved else rows.reshape(processes, -1)
    for own in rows:
        part = next(loader(Numbers(n), batch_size, own, seed=seed, step=step))
        assert_equal(part, {key: value[own] for key, value in whole.items()})


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), step=st.integers(0, 8))
def test_resuming_equals_continuing(n, batch_size, step):
    continued = take(loader(Numbers(n), batch_size), step + 2)[step:]
    resumed = take(loader(Numbers(n), batch_size, step=step), 2)
    for a, b in zip(continued, resumed, strict=True):
        assert_equal(a, b)


def test_resuming_reads_nothing_that_was_consumed():
    source = Numbers(1000)
    batch = next(loader(source, 8, step=50))
    assert source.reads == batch["index"].tolist()


@given(n=st.integers(1, 60), batch_size=st.integers(1, 16), seed=st.integers(0, 2**32))
def test_every_epoch_visits_every_record_once(n, batch_size, seed):
    index, _ = positions(Numbers(n), 3 * n, batch_size=batch_size, seed=seed)
    for epoch in index.reshape(3, n):
        assert sorted(epoch) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [positions(Numbers(100), 200, batch_size=50, seed=seed)[0] for seed in range(3)]
    orders = {tuple(epoch) for order in orders for epoch in order.reshape(2, 100)}
    assert len(orders) == 6
    assert tuple(range(100)) not in orders


def test_the_order_of_a_seed_never_changes():
    # A change here would silently break the resumption of every earlier run.
    index, flips = positions(Numbers(10), 20, seed=1)
    assert index.tolist() == [0, 6, 5, 3, 4, 9, 7, 8, 2, 1, 4, 2, 0, 6, 1, 5, 9, 8, 7, 3]
    assert flips.astype(int).tolist() == [
        1,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
    ]


def test_the_order_of_an_epoch_is_made_once(monkeypatch):
    words, sizes = loader_module.random_words, []
    monkeypatch.setattr(loader_module, "random_words", lambda *args: sizes.append(args[-1]) or words(*args))
    take(loader(Numbers(1000), 10), 150)
    assert sizes.count(1000) == 2


def test_starting_late_costs_no_more():
    source = Numbers(100_000)
    begin = time.perf_counter()
    next(loader(source, 64, step=10**12))
    assert time.perf_counter() - begin < 2
    assert len(source.reads) == 64


def test_flips_belong_to_positions_and_are_half():
    _, flips = positions(Numbers(50), 4000, batch_size=100)
    _, same = positions(Numbers(7), 4000, batch_size=64)
    np.testing.assert_array_equal(flips, same)  # whatever the data and the batch size
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    _, other = positions(Numbers(50), 4000, batch_size=100, seed=1)
    assert abs((flips == other).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    epochs = flips.reshape(-1, 50)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_without_flip_images_stay_as_they_are():
    _, flips = positions(Numbers(50), 200, batch_size=100, flip=False)
    assert not flips.any()


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 5), (4, 0)])
def test_threads_change_nothing(threads, prefetch):
    parallel = loader(Numbers(30), 8, threads=threads, prefetch=prefetch)
    for a, b in zip(take(parallel, 20), take(loader(Numbers(30), 8), 20), strict=True):
        assert_equal(a, b)
    parallel.close()


def test_reading_starts_before_it_is_asked_for():
    source = Numbers(1000)
    batches = loader(source, 8, threads=1, prefetch=2)
    deadline = time.monotonic() + 10
    while len(source.reads) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.reads) == 16
    batches.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_reach_the_consumer(tmp_path, threads):
    (tmp_path / "empty.png").touch()
    source = open_source(f"folder:{tmp_path}", split="train", image_size=8, channels=3)
    with pytest.raises(DataError, match="not one of 1 images"):
        next(loader(source, 2, threads=threads, prefetch=threads))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0, "rows": [0]},
        {"batch_size": 4, "rows": []},
        {"batch_size": 4, "rows": [4]},
        {"batch_size": 4, "rows": [-1]},
        {"batch_size": 4, "seed": -1},
        {"batch_size": 4, "seed": 2**64},
        {"batch_size": 4, "step": -1},
        {"batch_size": 4, "threads": -1},
        {"batch_size": 4, "prefetch": -1},
    ],
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(DataError, match="expected"):
        loader(Numbers(10), **options)

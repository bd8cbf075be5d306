"""Rows of a batch over all devices."""

import jax
import numpy as np
import pytest

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.parallel import rows
from sddit_jax.parallel.rows import OverDevices, gather_rows, put_rows
from sddit_jax.parallel.sharding import make_mesh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(21, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 5)).astype(np.float32)


def mesh_of(devices=8, **parallel):
    return make_mesh(ParallelConfig(**parallel), jax.devices()[:devices])


@pytest.mark.parametrize("parallel", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_lie_over_all_devices_and_the_first_fill_them_up(parallel):
    batch = put_rows(mesh_of(**parallel), {"x": X[:5], "number": np.arange(5)}, 16)
    for name, values in (("x", X), ("number", np.arange(5))):
        assert len({str(shard.index) for shard in batch[name].addressable_shards}) == 8
        np.testing.assert_array_equal(batch[name], values[np.arange(16) % 5])
    assert put_rows(mesh_of(**parallel), X).shape == (24, 3)
    np.testing.assert_array_equal(gather_rows(batch, 5)["x"], X[:5])


def test_more_rows_than_a_batch_has_are_refused():
    with pytest.raises(ValueError, match="21 rows do not fit into a batch of 16"):
        put_rows(mesh_of(), X, 16)


def test_arrays_of_the_host_and_parts_that_are_missing_pass_through():
    found = gather_rows((X, None, {"empty": None}), 4)
    np.testing.assert_array_equal(found[0], X[:4])
    assert found[1:] == (None, {"empty": None})


class TestOverDevices:
    def test_one_program_computes_any_number_of_rows(self):
        shapes = []

        def function(kernel, batch, index_B):
            shapes.append(batch["x"].shape)
            return {"y": batch["x"] @ kernel, "index": index_B, "none": None}

        compute = OverDevices(function, mesh_of(), 9)
        assert compute.size == 16
        for count in (1, 15, 16, 17, 21):
            found = compute.map((KERNEL,), ({"x": X[:count]}, np.arange(count)))
            np.testing.assert_allclose(found["y"], X[:count] @ KERNEL, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(found["index"], np.arange(count))
            assert found["none"] is None
        assert shapes == [(16, 3)]

    def test_a_row_has_the_same_bits_whatever_fills_the_batch(self):
        compute = OverDevices(lambda kernel, x: jax.nn.softmax(x @ kernel), mesh_of(), 8)
        whole = gather_rows(compute.begin((KERNEL,), (X[:8],)), 8)
        for count in (1, 3, 7):
            part = compute.begin((KERNEL,), (X[:count],))
            assert part.shape == (8, 5)
            np.testing.assert_array_equal(gather_rows(part, count), whole[:count])

    def test_the_next_batch_is_begun_before_one_is_fetched(self, monkeypatch):
        events, gather = [], rows.gather_rows
        monkeypatch.setattr(rows, "gather_rows", lambda *args: events.append("fetch") or gather(*args))
        compute = OverDevices(lambda x: x + 1, mesh_of(2), 8)
        found = compute.map((), (X,), lambda y: events.append("begin") or 2 * y)
        np.testing.assert_array_equal(found, 2 * (X + 1))
        assert events == ["begin", "begin", "fetch", "begin", "fetch", "fetch"]

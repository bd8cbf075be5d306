"""Rows of a batch over all devices: filled up to one size, computed, and gathered on every host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sddit_jax.ahead import begun_ahead


def split_rows(mesh: Mesh) -> NamedSharding:
    """Rows over all axes of the mesh: each row lies on one device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def full_size(mesh: Mesh, size: int) -> int:
    """`size` rounded up to a multiple of the devices."""
    return size + -size % mesh.size


def put_rows(mesh: Mesh, rows: Any, size: int | None = None) -> Any:
    """A tree of host arrays [n, ...] as arrays [size, ...] with their rows over the devices of all processes.

    All processes pass the same rows. Behind them the first rows come again: so values that occur fill the batch up.
    size: at least n, and a multiple of the devices; None: the smallest such number.
    """
    split = split_rows(mesh)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape = (size or full_size(mesh, len(x)), *x.shape[1:])
        if len(x) > shape[0]:
            raise ValueError(f"{len(x)} rows do not fit into a batch of {shape[0]}")
        filled = x if x.shape == shape else np.resize(x, shape)
        return jax.make_array_from_callback(shape, split, filled.__getitem__)

    return jax.tree.map(put, rows)


def gather_rows(tree: Any, count: int) -> Any:
    """The first `count` rows of arrays, wherever these lie, on every host that has a part of them."""

    def gather(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)[:count]

    return jax.tree.map(gather, tree)


class OverDevices:
    """A function of rows on all devices of a mesh, compiled once: whatever is asked for, it computes `size` rows.

    function(*shared, *rows) -> a tree of arrays [B, ...]: row i follows from row i of `rows` and from `shared`, such as
    parameters, alone. size: at a time, over all devices; rounded up to a multiple of them. Both `shared` and `rows` are
    tuples of trees.
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh, size: int) -> None:
        self.mesh, self.size = mesh, full_size(mesh, size)
        self._jitted = jax.jit(function, out_shardings=split_rows(mesh))

    def begin(self, shared: tuple[Any, ...], rows: tuple[Any, ...]) -> Any:
        """Of host arrays [n, ...], n at most `size`: arrays [size, ...] that are still being computed.

        The rows behind the first n are those that filled the batch up; see `put_rows`.
        """
        return self._jitted(*shared, *put_rows(self.mesh, rows, self.size))

    def map(
        self, shared: tuple[Any, ...], rows: tuple[Any, ...], then: Callable[[Any], Any] = lambda tree: tree
    ) -> Any:
        """Of host arrays [N, ...] with any number of rows: the tree of [N, ...] on every host.

        then: applied to each batch on the devices. They compute a batch while the one before is fetched.
        """
        total = len(jax.tree.leaves(rows)[0])

        def part(start: int) -> Any:
            return jax.tree.map(lambda x: x[start : start + self.size], rows)

        begun = (then(self.begin(shared, part(start))) for start in range(0, total, self.size))
        found = [gather_rows(tree, self.size) for tree in begun_ahead(begun)]
        return jax.tree.map(lambda *batches: np.concatenate(batches)[:total], *found)

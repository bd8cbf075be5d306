"""Batches split by rows over all devices: padded to one size, computed, and gathered on every host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from sddit_jax.ahead import begun_ahead


def split_rows(mesh: Mesh) -> NamedSharding:
    """The sharding that splits axis 0 over all axes of the mesh, so that each row lies on one device."""
    return NamedSharding(mesh, jax.P(mesh.axis_names))


def full_size(mesh: Mesh, size: int) -> int:
    """`size` rounded up to a multiple of the number of devices."""
    return size + -size % mesh.size


def put_rows(mesh: Mesh, rows: Any, size: int | None = None) -> Any:
    """Puts a tree of host arrays [n, ...] on the devices of all processes: arrays [size, ...], split by rows.

    All processes pass equal arrays. The rows are repeated from the first on until there are `size`.
    size: a multiple of the number of devices; None: the smallest that holds n rows. Raises ValueError if n > size.
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
    """The first `count` rows of a tree of arrays, as numpy arrays, on every host. All processes call it."""

    def gather(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)[:count]

    return jax.tree.map(gather, tree)


class OverDevices:
    """Computes function(*shared, *rows) -> a tree of arrays [B, ...] on all devices of a mesh, `size` rows at a time.

    Row i of the result depends on row i of `rows` and on `shared`, such as parameters; both are tuples of trees. size:
    rounded up to a multiple of the number of devices. The function is compiled once, since every batch has this size.
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh, size: int) -> None:
        self.mesh, self.size = mesh, full_size(mesh, size)
        self._jitted = jax.jit(function, out_shardings=split_rows(mesh))

    def begin(self, shared: tuple[Any, ...], rows: tuple[Any, ...]) -> Any:
        """Starts to compute one batch of host arrays [n, ...], n <= size; returns arrays [size, ...] on the devices.

        The rows behind the first n have no meaning; see `put_rows`.
        """
        return self._jitted(*shared, *put_rows(self.mesh, rows, self.size))

    def map(
        self, shared: tuple[Any, ...], rows: tuple[Any, ...], then: Callable[[Any], Any] = lambda tree: tree
    ) -> Any:
        """Computes host arrays [N, ...] with any number of rows; returns a tree of numpy arrays [N, ...] on every host.

        then: is applied to each batch while it is on the devices. A batch is computed while the one before is fetched.
        """
        total = len(jax.tree.leaves(rows)[0])

        def part(start: int) -> Any:
            return jax.tree.map(lambda x: x[start : start + self.size], rows)

        begun = (then(self.begin(shared, part(start))) for start in range(0, total, self.size))
        found = [gather_rows(tree, self.size) for tree in begun_ahead(begun)]
        return jax.tree.map(lambda *batches: np.concatenate(batches)[:total], *found)

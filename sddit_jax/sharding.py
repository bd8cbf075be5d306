"""The device mesh and the one table that says how each array lies on it.

The mesh has three axes: `data` and `fsdp` both split the batch, `fsdp` splits parameters too, `tensor` splits heads
and hidden channels. Optimiser state, EMAs and the teacher have their parameters' paths, and so their layout.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sddit_jax import schema
from sddit_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# The first pattern found in a leaf's path gives its axes; an axis that does not divide its dimension is left out.
RULES = (
    (r"blocks/attention/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # depth, D, 3, heads, channels
    (r"blocks/attention/qkv/bias", P(None, None, "tensor", None)),
    (r"blocks/attention/out/kernel", P(None, "tensor", None, "fsdp")),  # depth, heads, channels, D
    (r"blocks/mlp/hidden/kernel", P(None, "fsdp", "tensor")),  # depth, D, hidden
    (r"blocks/mlp/hidden/bias", P(None, "tensor")),
    (r"blocks/mlp/out/kernel", P(None, "tensor", "fsdp")),  # depth, hidden, D
    (r"blocks/modulation/linear/kernel", P(None, "fsdp", None, None)),  # depth, condition, 6, D
    (r"modulation/linear/kernel", P("fsdp", None, None)),  # condition, 2, D
    (r"label/table", P(None, "fsdp")),
    (r"head/prototypes", P("fsdp", None)),
    (r"kernel", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(config: schema.Parallel, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over `devices` (all if None); an axis of -1 takes what is left.

    Raises ConfigError if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    left = [axis for axis, size in sizes.items() if size == -1]
    if len(left) > 1:
        raise ConfigError(f"parallel.{' and parallel.'.join(left)} are -1, but one axis alone can take what is left")
    for axis in left:
        sizes[axis] = max(len(devices) // -math.prod(sizes.values()), 1)
    if math.prod(sizes.values()) != len(devices):
        words = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(f"a mesh of {words} needs {math.prod(sizes.values())} devices, but there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises ConfigError unless every device gets the same number of rows of each microbatch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    if batch_size % parts:
        raise ConfigError(
            f"batch_size {batch_size} is not divisible by {parts} (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} x microbatches {microbatches})"
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as 'params/encoder/patch/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The layout of each leaf of a tree of arrays or shapes, by `RULES`."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next(spec for pattern, spec in RULES if re.search(pattern, name))
        if len(rule) > len(leaf.shape):
            raise ValueError(f"the sharding rule {rule} has more axes than {name} {leaf.shape}")
        fitting = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(rule, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*fitting))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the global batch over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def make_constrain(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The `constrain(x, kind)` that the network calls at the edges of its blocks."""
    layouts = {"tokens": NamedSharding(mesh, P(BATCH, None, None))}
    return lambda x, kind: jax.lax.with_sharding_constraint(x, layouts[kind])


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices own, in order and each once."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

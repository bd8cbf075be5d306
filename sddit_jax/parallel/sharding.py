"""The device mesh and the one table that says how each array lies on it.

The mesh has three axes: `data` and `fsdp` both split the batch, `fsdp` splits parameters too, `tensor` splits heads
and hidden channels. Optimiser state, EMAs and the teacher have their parameters' paths, and so their layout.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.errors import ConfigError
from sddit_jax.method.state import Parts, State
from sddit_jax.models.layers import Constrain, unconstrained

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
    (r"prototypes", P("fsdp", None)),
    (r"mlp_[0-9]/kernel", P(None, "fsdp")),  # of the head: TPU's compiler pads a scatter of its rows by permutes
    (r"kernel", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
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


def check_width(mesh: Mesh, width: int) -> None:
    """Raises ConfigError if fsdp does not divide the encoder's width: its kernels would be whole on every device."""
    fsdp = mesh.shape["fsdp"]
    if width % fsdp:
        fitting = math.gcd(fsdp, width)
        raise ConfigError(
            f"parallel.fsdp {fsdp} does not divide model.width {width}, so most of the state would be whole on every "
            f"device: set parallel.data={mesh.shape['data'] * fsdp // fitting} and parallel.fsdp={fitting}"
        )


def abstract_state(parts: Parts, mesh: Mesh) -> State:
    """Shape, dtype and layout of every array of a train state on a mesh."""
    abstract = jax.eval_shape(parts.init_state, jax.random.key(0))
    layout = shardings(mesh, abstract)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, layout)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as 'params/encoder/patch/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The layout of each leaf of a tree of arrays or shapes, by `RULES`."""

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, fitting_spec(mesh, path_name(path), leaf.shape)), tree
    )


def fitting_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The axes of an array by its path, those left out that do not divide its dimensions."""
    rule = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(rule) > len(shape):
        raise ValueError(f"the sharding rule {rule} has more axes than {name} {shape}")
    return P(*(a if a is None or size % mesh.shape[a] == 0 else None for a, size in zip(rule, shape, strict=False)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the global batch over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def make_constrain(mesh: Mesh) -> Constrain:
    """The `constrain(x, kind)` that the network calls: what lies where while it computes.

    "tokens": [B, N, D], rows over the data and fsdp axes. "block": the parameters of one block, and "weights": a tree
    of parameters but for what is in blocks: gathered over fsdp where they are used, and their gradients scattered back
    as they are summed. (Left to itself the partitioner splits products and activations along the fsdp axis instead.)
    On one device nothing is constrained.
    """
    if mesh.size == 1:
        return unconstrained
    tokens = NamedSharding(mesh, P(BATCH, None, None))

    def gather(path: tuple[Any, ...], leaf: jax.Array, of_block: bool) -> jax.Array:
        name = path_name(path)
        if of_block:
            spec = P(*fitting_spec(mesh, f"blocks/{name}", (1, *leaf.shape))[1:])
        elif "blocks/" in name:
            return leaf
        else:
            spec = fitting_spec(mesh, name, leaf.shape)
        whole = P(*(None if axis == "fsdp" else axis for axis in spec))
        return leaf if whole == spec else _gathered(leaf, NamedSharding(mesh, whole), NamedSharding(mesh, spec))

    def constrain(x: Any, kind: str) -> Any:
        if kind == "tokens":
            return jax.lax.with_sharding_constraint(x, tokens)
        if mesh.shape["fsdp"] == 1:
            return x
        return jax.tree_util.tree_map_with_path(functools.partial(gather, of_block=kind == "block"), x)

    return constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    """`x` as it is used; its cotangent as it is stored."""
    del stored
    return jax.lax.with_sharding_constraint(x, used)


def _scattered(used: NamedSharding, stored: NamedSharding, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    # Summed before it is split: the partitioner would otherwise split the product that gives the cotangent, and move
    # the batch around the devices.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(cotangent, used), stored),)


_gathered.defvjp(lambda x, used, stored: (_gathered(x, used, stored), None), _scattered)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices own, in order and each once."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

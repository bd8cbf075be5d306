"""The device mesh, and one table, `RULES`, that says how each array is split over it.

The mesh has three axes. `data` and `fsdp` split the batch; `fsdp` also splits parameters; `tensor` splits heads and
hidden channels. Optimiser state, EMAs and the teacher repeat the paths of the parameters, so the same rules hold.
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

# The first pattern found in a leaf's path gives the mesh axis of each dimension, or None. A dimension that its axis
# does not divide is not split.
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
    (r"mlp_[0-9]/kernel", P(None, "fsdp")),  # of a head: splitting its rows costs permutes on TPU
    (r"kernel", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over `devices`; None: all devices. An axis of size -1 takes the devices left over.

    Raises ConfigError if two axes are -1, or if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    left = [axis for axis, size in sizes.items() if size == -1]
    if len(left) > 1:
        raise ConfigError(f"parallel.{' and parallel.'.join(left)} are -1; only one axis can take what is left")
    for axis in left:
        sizes[axis] = max(len(devices) // -math.prod(sizes.values()), 1)
    if math.prod(sizes.values()) != len(devices):
        words = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(f"a mesh of {words} needs {math.prod(sizes.values())} devices, but there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises ConfigError unless each microbatch gives every device the same number of rows."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    if batch_size % parts:
        raise ConfigError(
            f"batch_size {batch_size} is not divisible by {parts} (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} x microbatches {microbatches})"
        )


def check_width(mesh: Mesh, width: int) -> None:
    """Raises ConfigError if fsdp does not divide the encoder's width, since its kernels would then not be split."""
    fsdp = mesh.shape["fsdp"]
    if width % fsdp:
        fitting = math.gcd(fsdp, width)
        raise ConfigError(
            f"parallel.fsdp {fsdp} does not divide model.width {width}, so every device would hold most of the state: "
            f"set parallel.data={mesh.shape['data'] * fsdp // fitting} and parallel.fsdp={fitting}"
        )


def abstract_state(parts: Parts, mesh: Mesh) -> State:
    """The train state as a tree of `jax.ShapeDtypeStruct`s with their shardings on a mesh."""
    abstract = jax.eval_shape(parts.init_state, jax.random.key(0))
    layout = shardings(mesh, abstract)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, layout)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a string such as "params/network/encoder/patch/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a tree of arrays or `jax.ShapeDtypeStruct`s, by `RULES`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, fitting_spec(mesh, path_name(path), leaf.shape)), tree
    )


def fitting_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The mesh axis of each dimension of the array at path `name`; None if the axis does not divide the dimension."""
    rule = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(rule) > len(shape):
        raise ValueError(f"the sharding rule {rule} has more axes than {name} {shape}")
    return P(*(a if a is None or size % mesh.shape[a] == 0 else None for a, size in zip(rule, shape, strict=False)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: axis 0 over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def make_constrain(mesh: Mesh) -> Constrain:
    """The function constrain(x, kind) that the network calls to lay out a value. On one device it changes nothing.

    kind "tokens": [B, N, D], with the rows over data and fsdp. "block": the parameters of one block. "weights": a tree
    of parameters, of which those in blocks are left as they are. Parameters are gathered over fsdp where they are used,
    and their gradients are scattered as they are summed. Without this the partitioner splits products and activations
    along fsdp.
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
    """`x` with the sharding `used`; its cotangent gets the sharding `stored`."""
    del stored
    return jax.lax.with_sharding_constraint(x, used)


def _scattered(used: NamedSharding, stored: NamedSharding, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    # The first constraint makes the partitioner sum before it splits. Otherwise it splits the product that gives the
    # cotangent, and moves the batch between devices.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(cotangent, used), stored),)


_gathered.defvjp(lambda x, used, stored: (_gathered(x, used, stored), None), _scattered)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that lie on this process's devices: sorted integers, each once."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes the arrays of the global batch from this process's rows; see `local_rows`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

"""Our tree of parameters as the state_dict of the network in pytorch.py, and back: the same bits in torch's layout.

A path such as encoder/stack/blocks/mlp/out/kernel, stacked over the blocks, becomes one name for each block, as
encoder.stack.blocks.3.mlp.out.weight. A kernel (in..., out...) becomes a matrix [out, in], that of the patch embedding
a convolution [D, C, p, p].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sddit_jax.models.transformer import Network
from sddit_jax.parallel.sharding import path_name

PATCH = "encoder/patch/kernel"


class TensorPlace(NamedTuple):
    """Where a tensor of the state_dict lies in the tree: path, block (None: not stacked), and its shape in torch."""

    path: str
    block: int | None
    shape: tuple[int, ...]


def places(network: Network) -> dict[str, TensorPlace]:
    """Each tensor of a network's state_dict by name, in the order of the tree."""
    found = {}
    for path, shape in _shapes(network).items():
        blocks = range(shape[0]) if "/blocks/" in path else (None,)
        own = shape[1:] if "/blocks/" in path else shape
        if path.endswith("kernel"):
            own = _convolution(network, own) if path == PATCH else _matrix(path, own)
        elif path.endswith("bias"):
            own = (int(np.prod(own)),)
        name = path.replace("/", ".").removesuffix(".kernel")
        name = f"{name}.weight" if path.endswith("kernel") else name
        for block in blocks:
            found[name.replace(".blocks.", f".blocks.{block}.")] = TensorPlace(path, block, own)
    return found


def to_state_dict(params: Any, network: Network) -> dict[str, np.ndarray]:
    """The arrays of a tree of parameters under the names of `places`, C-contiguous."""
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    arrays = {}
    for name, (path, block, shape) in places(network).items():
        leaf = leaves[path] if block is None else leaves[path][block]
        if path == PATCH:
            leaf = leaf.reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            leaf = leaf.reshape(shape[::-1]).T
        arrays[name] = np.ascontiguousarray(leaf.reshape(shape))
    return arrays


def from_state_dict(arrays: Mapping[str, np.ndarray], network: Network) -> dict[str, Any]:
    """The inverse of `to_state_dict`: the tree of parameters as float32 numpy arrays. All names must be there."""
    leaves = {path: np.empty(shape, np.float32) for path, shape in _shapes(network).items()}
    for name, (path, block, shape) in places(network).items():
        leaf = leaves[path] if block is None else leaves[path][block]
        array = arrays[name].reshape(shape)
        if path == PATCH:
            array = array.transpose(2, 3, 1, 0)
        elif path.endswith("kernel"):
            array = array.T
        leaf[...] = array.reshape(leaf.shape)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], network.abstract)


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(network.abstract)
    return {path_name(path): leaf.shape for path, leaf in flat}


def _matrix(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a kernel; that of attention's output alone has two axes of inputs, heads and channels."""
    inputs = 2 if path.endswith("attention/out/kernel") else 1
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _convolution(network: Network, shape: tuple[int, ...]) -> tuple[int, ...]:
    m = network.model
    return shape[1], m.channels, m.patch, m.patch

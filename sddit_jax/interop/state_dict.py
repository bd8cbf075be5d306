"""Converts our tree of parameters to the state_dict of the network in pytorch.py and back, without changing a bit.

A path such as encoder/stack/blocks/mlp/out/kernel, stacked over the blocks, becomes one name for each block, as
encoder.stack.blocks.3.mlp.out.weight. A kernel [in..., out...] becomes a matrix [out, in], and the kernel of the patch
embedding a convolution [D, C, p, p].
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sddit_jax.models.transformer import Network

PATCH = "encoder/patch/kernel"


class TensorPlace(NamedTuple):
    """The place of a state_dict's tensor in the tree: path, block (None: not stacked), and the tensor's shape."""

    path: str
    block: int | None
    shape: tuple[int, ...]


def places(network: Network) -> dict[str, TensorPlace]:
    """Each tensor of a network's state_dict by name, in the order of the tree."""
    m, found = network.model, {}
    for path, leaf in flatten_dict(network.abstract, sep="/").items():
        stacked = "/blocks/" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        if path == PATCH:
            shape = shape[1], m.channels, m.patch, m.patch
        elif path.endswith("kernel"):
            # The kernel of attention's output has two axes of inputs, heads and channels.
            inputs = 2 if path.endswith("attention/out/kernel") else 1
            shape = math.prod(shape[inputs:]), math.prod(shape[:inputs])
        elif path.endswith("bias"):
            shape = (math.prod(shape),)
        name = path.replace("kernel", "weight").replace("/", ".")
        for block in range(leaf.shape[0]) if stacked else (None,):
            found[name.replace(".blocks.", f".blocks.{block}.")] = TensorPlace(path, block, shape)
    return found


def to_state_dict(params: Any, network: Network) -> dict[str, np.ndarray]:
    """The arrays of a tree of parameters under the names of `places`, C-contiguous, in the dtypes of the tree."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
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
    """The inverse of `to_state_dict`: the tree of parameters as float32 NumPy arrays. All names must be there."""
    abstract = flatten_dict(network.abstract, sep="/")
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in abstract.items()}
    for name, (path, block, shape) in places(network).items():
        leaf = leaves[path] if block is None else leaves[path][block]
        array = arrays[name].reshape(shape)
        if path == PATCH:
            array = array.transpose(2, 3, 1, 0)
        elif path.endswith("kernel"):
            array = array.T
        leaf[...] = array.reshape(leaf.shape)
    return unflatten_dict(leaves, sep="/")

"""Weights of the Inception-v3 of FID, from a file in the layout of pytorch-fid and torch-fidelity.

Both publish the same file among the releases of their GitHub repositories, mseitzer/pytorch-fid and
toshas/torch-fidelity: pt_inception-2015-12-05-6726825d.pth and weights-inception-2015-12-05-6726825d.pth, 95 MB, made
from TensorFlow's graph. It has to be fetched by hand, once.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from sddit_jax.errors import WeightsError
from sddit_jax.files import sha256_of
from sddit_jax.models.inception import SIDE, Inception
from sddit_jax.weights.files import fill, open_tensors

# How the SHA-256 of the published file begins.
PUBLISHED = "6726825d"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_EPSILON = 1e-3


class InceptionWeights(NamedTuple):
    """Parameters for `models.inception.features`, and the SHA-256 of the file that they are from.

    published: whether the file is the published one; with any other weights a result is not an FID.
    """

    params: dict[str, Any]
    sha256: str
    published: bool


def load_inception(path: str | os.PathLike[str]) -> InceptionWeights:
    """The network of a PyTorch file (a state_dict) or a safetensors file of the same names; nothing is executed.

    Batch normalisation is folded into the convolutions in float64.

    Raises:
      WeightsError: no such file, a damaged one, or it names the tensors that are missing, surplus, of another shape or
        type, not finite, or not variances.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path} is not a file here; the weights are pt_inception-2015-12-05-6726825d.pth of the releases of "
            "mseitzer/pytorch-fid on GitHub"
        )
    # PyTorch counts the batches of its training; old files of it do not.
    tensors = {name: t for name, t in open_tensors(path).items() if not name.endswith(".num_batches_tracked")}
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), np.float32))["params"]
    wanted, layers = {}, []
    for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        layer, _, kind = name.rpartition("/")
        if layer == "fc":
            wanted[name] = leaf
        elif kind == "kernel":
            wanted[f"{layer}/conv/kernel"] = leaf
        else:
            layers.append(layer)
            wanted |= {f"{layer}/bn/{part}": leaf for part in _BATCH_NORM}
    tree = flax.traverse_util.unflatten_dict(wanted, sep="/")
    filled = fill(tree, tensors, lambda ours: ours.replace("kernel", "weight").replace("/", "."), path)
    found = flax.traverse_util.flatten_dict(filled, sep="/")

    params = {name: found[name] for name in ("fc/kernel", "fc/bias")}
    for layer in layers:
        weight, bias, mean, variance = (found[f"{layer}/bn/{part}"].astype(np.float64) for part in _BATCH_NORM)
        if (variance < 0).any():
            name = f"{layer}/bn/running_var".replace("/", ".")
            raise WeightsError(f"{path} is damaged: {name} has {(variance < 0).sum()} values that are less than 0")
        scale = weight / np.sqrt(variance + _EPSILON)
        params[f"{layer}/kernel"] = (found[f"{layer}/conv/kernel"] * scale).astype(np.float32)
        params[f"{layer}/bias"] = (bias - mean * scale).astype(np.float32)
    sha256 = sha256_of(path)
    return InceptionWeights(flax.traverse_util.unflatten_dict(params, sep="/"), sha256, sha256.startswith(PUBLISHED))

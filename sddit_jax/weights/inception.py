"""Loads the Inception-v3 of FID from a file in the layout of pytorch-fid and torch-fidelity.

Both publish the same file among the releases of their GitHub repositories, mseitzer/pytorch-fid and
toshas/torch-fidelity: pt_inception-2015-12-05-6726825d.pth and weights-inception-2015-12-05-6726825d.pth, 95 MB, made
from TensorFlow's graph. The user downloads it once.
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

# The first digits of the published file's SHA-256.
PUBLISHED = "6726825d"
WHERE = "pt_inception-2015-12-05-6726825d.pth of the releases of mseitzer/pytorch-fid on GitHub"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_EPSILON = 1e-3


class InceptionWeights(NamedTuple):
    """Parameters for `models.inception.features`, and the SHA-256 of their file.

    published: whether the file is the published one. Other weights give other distances, which are not called FID.
    """

    params: dict[str, Any]
    sha256: str
    published: bool


def load_inception(path: str | os.PathLike[str]) -> InceptionWeights:
    """The parameters in a PyTorch file (a state_dict) or in a safetensors file with the same names, as float32.

    Batch normalisation is folded into the convolutions in float64. Nothing in the file is executed.

    Raises WeightsError: no such file, a damaged file, tensors that do not fit as for `fill`, or negative variances.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file here; the weights are {WHERE}")
    # PyTorch since 0.4.1 adds a counter of batches to each batch normalisation.
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
            raise WeightsError(f"{path} is damaged: the variances {name} have {(variance < 0).sum()} values below 0")
        scale = weight / np.sqrt(variance + _EPSILON)
        params[f"{layer}/kernel"] = (found[f"{layer}/conv/kernel"] * scale).astype(np.float32)
        params[f"{layer}/bias"] = (bias - mean * scale).astype(np.float32)
    sha256 = sha256_of(path)
    return InceptionWeights(flax.traverse_util.unflatten_dict(params, sep="/"), sha256, sha256.startswith(PUBLISHED))

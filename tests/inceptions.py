"""The Inception of FID with random weights, and the peer that it is compared with."""

import importlib
import sys
from types import ModuleType

import flax.traverse_util
import jax
import numpy as np
import pytest
import torch

from sddit_jax.models.inception import SIDE, Inception


def random_state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state_dict with the names and shapes of the published file, and activations of the order of 1 throughout."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), np.float32))["params"]
    state = {"fc.weight": 0.05 * rng.standard_normal((1008, 2048), np.float32), "fc.bias": rng.normal(size=1008)}
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep=".").items():
        layer, _, kind = path.rpartition(".")
        if layer != "fc" and kind == "kernel":
            rows, columns, inputs, outputs = leaf.shape
            weight = rng.standard_normal((outputs, inputs, rows, columns), np.float32)
            state[f"{layer}.conv.weight"] = weight * np.float32(np.sqrt(2 / (rows * columns * inputs)))
            state[f"{layer}.bn.weight"] = rng.uniform(0.6, 1.2, outputs)
            state[f"{layer}.bn.bias"] = rng.normal(0, 0.3, outputs)
            state[f"{layer}.bn.running_mean"] = rng.normal(0, 0.3, outputs)
            state[f"{layer}.bn.running_var"] = rng.uniform(0.5, 1.5, outputs)
    return {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in state.items()}


def import_torch_fidelity() -> ModuleType:
    """torch-fidelity without torchvision, which it only needs for what is not compared."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    for name in names:
        module = ModuleType(name)
        module.CIFAR10 = module.CIFAR100 = module.STL10 = object
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        return importlib.import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        if error.name != "torch_fidelity":
            raise
        return pytest.fail("torch-fidelity is not here: pip install --no-deps torch-fidelity==0.4.0")
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(hidden)

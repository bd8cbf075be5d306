"""A network of this package and the same network in PyTorch, in one process, for benchmarks and tests."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sddit_jax.config.border import to_dict
from sddit_jax.config.parts import make_network
from sddit_jax.config.schema import Config
from sddit_jax.interop import pytorch
from sddit_jax.interop.state_dict import to_state_dict


def namespaces(config: Config) -> SimpleNamespace:
    """A config as the PyTorch network takes it: nested namespaces."""
    return json.loads(json.dumps(to_dict(config)), object_hook=lambda section: SimpleNamespace(**section))


def to_torch(x: Any) -> torch.Tensor:
    """An array as a tensor. Images [B, H, W, C] become [B, C, H, W], and int32 becomes int64."""
    x = np.array(x)
    if x.ndim == 4:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """An image tensor [B, C, H, W] as an array [B, H, W, C]."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def make_twin(config: Config, params: Any) -> pytorch.SDDiT:
    """The PyTorch network with parameters of the Flax network, in their dtype.

    params: of the network, or of a train state, from which it gets the head of the discrimination too.
    """
    arrays = {name: torch.from_numpy(np.array(a)) for name, a in twin_arrays(config, params).items()}
    twin = pytorch.SDDiT(namespaces(config), head="head.prototypes" in arrays)
    twin.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
    return twin


def twin_arrays(config: Config, params: Any) -> dict[str, np.ndarray]:
    """The parameters of `make_twin` by their names in PyTorch."""
    whole = params if "network" in params else {"network": params}
    head = _flat_head(whole.get("discrimination", {}))
    return to_state_dict(whole["network"], make_network(config)) | head


def make_teacher(config: Config, params: Any, aux: Any) -> pytorch.Teacher:
    """The PyTorch teacher of a run with the teacher "own", at the first temperature of its schedule.

    params, aux: of a train state, and the state of its discrimination.
    """
    teacher = aux["teacher"]
    network = {**params["network"], "encoder": teacher["encoder"]}
    whole = make_twin(config, {"network": network, "discrimination": teacher["head"]}).requires_grad_(False)
    d = config.objectives.discrimination
    scale = {kind: float(np.sqrt(v + 1e-8)) if d.standardise else 1.0 for kind, v in aux["variance"].items()}
    return pytorch.Teacher(
        whole.encoder,
        whole.head,
        center={kind: to_torch(center) for kind, center in aux["center"].items()},
        temperature={kind: d.teacher_temperature[0] * scale[kind] for kind in aux["center"]},
    )


def _flat_head(params: Any) -> dict[str, np.ndarray]:
    """The head's parameters by their names in PyTorch, kernels as [out, in]."""
    arrays = {}
    for name, leaf in params.items():
        if name == "prototypes":
            arrays["head.prototypes"] = np.asarray(leaf)
        else:
            arrays[f"head.{name}.weight"] = np.asarray(leaf["kernel"]).T
            arrays[f"head.{name}.bias"] = np.asarray(leaf["bias"])
    return arrays

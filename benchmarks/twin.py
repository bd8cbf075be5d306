"""A network of ours and the same one in PyTorch, in one process: what they are compared by."""

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
    """A config as the PyTorch network takes it."""
    return json.loads(json.dumps(to_dict(config)), object_hook=lambda section: SimpleNamespace(**section))


def to_torch(x: Any) -> torch.Tensor:
    """An array of ours as a tensor; an image as [B, C, H, W], integers as int64."""
    x = np.array(x)
    if x.ndim == 4:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """An image tensor as an array of ours."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def make_twin(config: Config, params: Any) -> pytorch.SDDiT:
    """The PyTorch network with our parameters, in their dtype.

    params: the network's, or those of a train state, from which the head of the discrimination is taken too.
    """
    arrays = {name: torch.from_numpy(np.array(a)) for name, a in twin_arrays(config, params).items()}
    twin = pytorch.SDDiT(namespaces(config), head="head.prototypes" in arrays)
    twin.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
    return twin


def twin_arrays(config: Config, params: Any) -> dict[str, np.ndarray]:
    """The parameters of the network, or of a train state with those of the discrimination, under PyTorch's names."""
    whole = params if "network" in params else {"network": params}
    head = _flat_head(whole.get("discrimination", {}))
    return to_state_dict(whole["network"], make_network(config)) | head


def make_teacher(config: Config, params: Any, aux: Any) -> pytorch.Teacher:
    """The PyTorch teacher of the state of the discrimination (teacher "own"), at the schedule's first temperature."""
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
    """The head's parameters under the names of the PyTorch head, kernels as [out, in]."""
    arrays = {}
    for name, leaf in params.items():
        if name == "prototypes":
            arrays["head.prototypes"] = np.asarray(leaf)
        else:
            arrays[f"head.{name}.weight"] = np.asarray(leaf["kernel"]).T
            arrays[f"head.{name}.bias"] = np.asarray(leaf["bias"])
    return arrays

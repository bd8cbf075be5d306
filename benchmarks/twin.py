"""A network of ours and the same one in PyTorch, in one process: what they are compared by."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sddit_jax.config import schema
from sddit_jax.config.border import to_dict
from sddit_jax.interop import pytorch
from sddit_jax.interop.state_dict import to_state_dict
from sddit_jax.models.transformer import Network


def namespaces(config: schema.Config) -> SimpleNamespace:
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


def make_twin(config: schema.Config, params: Any) -> pytorch.SDDiT:
    """The PyTorch network with our parameters, in their dtype."""
    twin = pytorch.SDDiT(namespaces(config))
    arrays = {name: torch.from_numpy(np.array(a)) for name, a in to_state_dict(params, Network(config)).items()}
    twin.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
    return twin


def make_teacher(config: schema.Config, params: Any, aux: Any) -> pytorch.Teacher:
    """The PyTorch teacher of the state of the discrimination (teacher "own"), at the schedule's first temperature."""
    whole = make_twin(config, {**params, **aux["teacher"]}).requires_grad_(False)
    d = config.objectives.discrimination
    scale = {kind: float(np.sqrt(v + 1e-8)) if d.standardise else 1.0 for kind, v in aux["variance"].items()}
    return pytorch.Teacher(
        whole.encoder,
        whole.head,
        center={kind: to_torch(center) for kind, center in aux["center"].items()},
        temperature={kind: d.teacher_temperature[0] * scale[kind] for kind in aux["center"]},
    )

"""MaskDiT's auxiliary objective."""

import dataclasses
from typing import Any

import jax

from sddit_jax.method.losses import reconstruction_error
from sddit_jax.method.objectives.base import Metrics, Objective, ObjectiveConfig, Views
from sddit_jax.models.masking import take
from sddit_jax.models.transformer import patchify
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig(ObjectiveConfig):
    """MaskDiT's auxiliary loss: the noisy input of the invisible patches, normalised per patch."""

    weight: float = setting(0.0, "I", "weight in the total loss (MaskDiT: 0.1)", least=0)


class Reconstruction(Objective):
    """MaskDiT's auxiliary loss: the denoised image at the invisible patches against the noisy input there."""

    name = "reconstruction"
    Config = ReconstructionConfig

    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The mean over invisible patches, then over images."""
        del params, state, ema, step
        patch, hidden = self.network.model.patch, views.mask.hidden_BM
        prediction = take(patchify(views.denoised_BHWC, patch), hidden)
        loss = reconstruction_error(prediction, take(patchify(views.noised_BHWC, patch), hidden)).mean()
        return loss, {"train/reconstruction": loss}, {}

"""MaskDiT's auxiliary objective (Zheng et al. 2023): the reconstruction of the invisible patches."""

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
    """MaskDiT's auxiliary loss, at invisible patches.

    It is the squared error of the denoised image against the noisy image, normalised per patch.
    """

    weight: float = setting(
        0.0, "I", "weight in the loss (MaskDiT: 0.1); if it is 0 at every step, the term is not computed", least=0
    )


class Reconstruction(Objective):
    """Squared error of the denoised image to the noisy input at the invisible patches, normalised per patch."""

    name = "reconstruction"
    Config = ReconstructionConfig

    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The mean over invisible patches and images."""
        patch, hidden = self.network.model.patch, views.mask.hidden_BM
        prediction = take(patchify(views.denoised_BHWC, patch), hidden)
        loss = reconstruction_error(prediction, take(patchify(views.noised_BHWC, patch), hidden)).mean()
        return loss, {"train/reconstruction": loss}, {}

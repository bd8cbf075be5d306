"""The generative objective: denoising."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sddit_jax.method.losses import denoising_error, patch_mean
from sddit_jax.method.objectives.base import Metrics, Objective, ObjectiveConfig, Views
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class DenoisingConfig(ObjectiveConfig):
    """The denoising loss: the squared error of the denoised image, which the diffusion weights by noise level."""

    weight: float = setting(1.0, "I", "weight in the loss; if it is 0 at every step, the term is not computed", least=0)
    scope: str = setting(
        "all",
        "I",
        "patches that the error is averaged over: 'all', or the 'visible' ones (MaskDiT)",
        choices=("all", "visible"),
    )


class Denoising(Objective):
    """EDM's weighted squared error of the denoised image."""

    name = "denoising"
    Config = DenoisingConfig

    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The mean over images and over all patches, or with scope "visible" over the visible patches."""
        error = denoising_error(views.denoised_BHWC, views.x0_BHWC, self.context.diffusion.weight(views.sigma_B))
        if self.config.scope == "visible" and views.mask is not None:
            error_BN = patch_mean(error, self.network.model.patch)
            error = jnp.take_along_axis(error_BN, views.mask.visible_BV, axis=1)
        loss = error.mean()
        return loss, {"train/denoising": loss}, {}

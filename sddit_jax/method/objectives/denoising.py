"""The generative objective, and MaskDiT's auxiliary one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sddit_jax.method.diffusion import Diffusion
from sddit_jax.method.losses import denoising_error, patch_mean, reconstruction_error
from sddit_jax.method.objectives.base import Metrics, Stateless, Views
from sddit_jax.models.masking import take
from sddit_jax.models.transformer import patchify


@dataclasses.dataclass(frozen=True)
class Denoising(Stateless):
    """EDM's weighted error of the denoised image, averaged over all patches or over the visible ones."""

    weight: float
    visible_only: bool
    patch: int
    diffusion: Diffusion
    name: str = "denoising"

    def loss(self, params: Any, aux: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The mean over patches, then over images."""
        del params, aux, ema, step
        error = denoising_error(views.denoised, views.x0, self.diffusion.weight(views.sigma_B))
        if self.visible_only and views.mask is not None:
            error_BN = patch_mean(error, self.patch)
            error = jnp.take_along_axis(error_BN, views.mask.visible_BV, axis=1)
        loss = error.mean()
        return loss, {"train/denoising": loss}, {}


@dataclasses.dataclass(frozen=True)
class Reconstruction(Stateless):
    """MaskDiT's auxiliary loss: the denoised image at the invisible patches against the noisy input there."""

    weight: float
    patch: int
    name: str = "reconstruction"

    def loss(self, params: Any, aux: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The mean over invisible patches, then over images."""
        del params, aux, ema, step
        hidden = views.mask.hidden_BM
        prediction = take(patchify(views.denoised, self.patch), hidden)
        loss = reconstruction_error(prediction, take(patchify(views.noised, self.patch), hidden)).mean()
        return loss, {"train/reconstruction": loss}, {}

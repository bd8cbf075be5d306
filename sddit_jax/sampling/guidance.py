"""The denoiser that a sampler calls: network, preconditioning and classifier-free guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sddit_jax.diffusion import EDM
from sddit_jax.models.transformer import Network

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def make_denoise(network: Network, diffusion: EDM, params: Any, label_B: jax.Array, guidance: float) -> Denoise:
    """denoise(x, sigma) -> D, float32, for a scalar sigma.

    Guidance w (Ho & Salimans 2022) is D_null + w (D_label - D_null) on all channels; with w = 1 the null label is not
    computed at all.
    """
    null_B = jnp.full_like(label_B, network.model.num_classes)

    def denoise(x_BHWC: jax.Array, sigma: jax.Array) -> jax.Array:
        def one(x: jax.Array, label: jax.Array) -> jax.Array:
            sigma_B = jnp.full(x.shape[0], sigma, jnp.float32)
            return diffusion.denoise(lambda x, c_noise: network(params, x, c_noise, label), x, sigma_B)

        if guidance == 1 or not network.model.num_classes:
            return one(x_BHWC, label_B)
        both = one(jnp.concatenate([x_BHWC, x_BHWC]), jnp.concatenate([label_B, null_B]))
        labelled, null = jnp.split(both, 2)
        return null + guidance * (labelled - null)

    return denoise

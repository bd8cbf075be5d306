"""The network as a sampler calls it, with classifier-free guidance, and the denoiser that it makes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sddit_jax.diffusion import Diffusion
from sddit_jax.models.transformer import Network

# (x, scalar sigma) -> the network's output, or the denoised image
Output = Callable[[jax.Array, jax.Array], jax.Array]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def make_output(
    network: Network, diffusion: Diffusion, params: Any, label_B: jax.Array, guidance: float, channels: int = 0
) -> Output:
    """output(x, sigma) -> the network's guided output, [B, H, W, C] or [B, H, W, 2C] with a learnt variance.

    Guidance w (Ho & Salimans 2022) is F_null + w (F_label - F_null) on the first `channels` of F (0: on all of its C),
    and what is behind them is that of the label. With w = 1 the null label is not computed at all. The denoised image
    is linear in F, so this is guidance of the denoised image too.
    """
    null_B = jnp.full_like(label_B, network.model.num_classes)

    def output(x_BHWC: jax.Array, sigma: jax.Array) -> jax.Array:
        def one(x: jax.Array, label: jax.Array) -> jax.Array:
            sigma_B = jnp.full(x.shape[0], sigma, jnp.float32)
            return network(params, *diffusion.network_input(x, sigma_B), label).astype(jnp.float32)

        if guidance == 1 or not network.model.num_classes:
            return one(x_BHWC, label_B)
        both = one(jnp.concatenate([x_BHWC, x_BHWC]), jnp.concatenate([label_B, null_B]))
        labelled, null = jnp.split(both, 2)
        guided = channels or x_BHWC.shape[-1]
        first = null[..., :guided] + guidance * (labelled - null)[..., :guided]
        return jnp.concatenate([first, labelled[..., guided:]], axis=-1)

    return output


def make_denoise(output: Output, diffusion: Diffusion) -> Denoise:
    """denoise(x, sigma) -> D, float32, for a scalar sigma."""

    def denoise(x_BHWC: jax.Array, sigma: jax.Array) -> jax.Array:
        sigma_B = jnp.full(x_BHWC.shape[0], sigma, jnp.float32)
        return diffusion.denoised(x_BHWC, output(x_BHWC, sigma), sigma_B)

    return denoise

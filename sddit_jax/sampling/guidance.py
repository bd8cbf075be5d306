"""The guided output of a network, and the denoiser made of it.

Guidance w replaces an output F by F_worse + w (F - F_worse). F_worse is the output for the null label (classifier-free
guidance, Ho & Salimans 2022), or the output of a weaker network for the same label (autoguidance, Karras et al. 2024,
arXiv 2406.02507). Guidance can be limited to an interval of noise levels; outside it F_worse is not computed
(Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.method.diffusion import Diffusion
from sddit_jax.models.transformer import Network

# (x, scalar sigma) -> the network's output F, or the denoised image D
Output = Callable[[jax.Array, jax.Array], jax.Array]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A function of (x, sigma): `inside` where low < sigma <= high, `outside` elsewhere."""

    inside: Output | Denoise
    outside: Output | Denoise
    low: float
    high: float

    def at(self, sigma: float) -> Output | Denoise:
        """The function to call at a noise level. The comparison is in float32, the dtype of noise levels."""
        return self.inside if np.float32(self.low) < np.float32(sigma) <= np.float32(self.high) else self.outside


def make_output(
    network: Network,
    diffusion: Diffusion,
    params: Any,
    label_B: jax.Array,
    guidance: float,
    channels: int = 0,
    guide: Output | None = None,
) -> Output:
    """output(x, sigma) -> the network's guided output: [B, H, W, C], or [B, H, W, 2C] with a learnt variance.

    The first `channels` channels (0: all C) are F_worse + guidance * (F - F_worse), all others are F. F_worse is the
    output of `guide`, or without a guide the network's for the null label; with a guidance of 1 it is not computed. The
    denoised image is linear in F, so it is guided in the same way.
    """
    null_B = jnp.full_like(label_B, network.null_label)

    def output(x_BHWC: jax.Array, sigma: jax.Array) -> jax.Array:
        def one(x: jax.Array, label: jax.Array) -> jax.Array:
            sigma_B = jnp.full(x.shape[0], sigma, jnp.float32)
            return network(params, *diffusion.network_input(x, sigma_B), label).astype(jnp.float32)

        if guidance == 1 or not (guide or network.model.num_classes):
            return one(x_BHWC, label_B)
        if guide:
            labelled, worse = one(x_BHWC, label_B), guide(x_BHWC, sigma)
        else:
            both = one(jnp.concatenate([x_BHWC, x_BHWC]), jnp.concatenate([label_B, null_B]))
            labelled, worse = jnp.split(both, 2)
        guided = channels or x_BHWC.shape[-1]
        first = worse[..., :guided] + guidance * (labelled[..., :guided] - worse[..., :guided])
        return jnp.concatenate([first, labelled[..., guided:]], axis=-1)

    return output


def make_guided(
    network: Network,
    diffusion: Diffusion,
    params: Any,
    label_B: jax.Array,
    guidance: float,
    interval: tuple[float, float] = (0.0, 0.0),
    channels: int = 0,
    guide: Output | None = None,
) -> Output | Piecewise:
    """The output of `make_output`, guided only where low < sigma <= high of the interval. A high of 0 means no end."""
    unguided = make_output(network, diffusion, params, label_B, 1.0)
    if guidance == 1:
        return unguided
    low, high = interval
    guided = make_output(network, diffusion, params, label_B, guidance, channels, guide)
    return Piecewise(guided, unguided, low, high or math.inf)


def make_denoise(output: Output | Piecewise, diffusion: Diffusion) -> Denoise | Piecewise:
    """denoise(x, sigma) -> the denoised image, float32, for a scalar sigma; `Piecewise` if the output is."""
    if isinstance(output, Piecewise):
        return dataclasses.replace(
            output,
            inside=make_denoise(output.inside, diffusion),
            outside=make_denoise(output.outside, diffusion),
        )

    def denoise(x_BHWC: jax.Array, sigma: jax.Array) -> jax.Array:
        sigma_B = jnp.full(x_BHWC.shape[0], sigma, jnp.float32)
        return diffusion.denoised(x_BHWC, output(x_BHWC, sigma), sigma_B)

    return denoise

"""Solvers of the probability-flow ODE, and of the reverse process of DDPM."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.diffusion import DDPM
from sddit_jax.sampling.guidance import Denoise, Output


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """EDM's noise levels (Karras et al. 2022, Eq. 5), from sigma_max to sigma_min, then 0: float32 [steps + 1]."""
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((ends[0] + ramp * (ends[1] - ends[0])) ** rho, 0.0).astype(np.float32)


def respaced_levels(steps: int, diffusion: DDPM) -> np.ndarray:
    """`steps` of DDPM's own noise levels, evenly spaced from the last to the first, then 0: float32 [steps + 1].

    Rounded as in DiT's code, which adds up the stride from 0; one step starts at the last level.
    """
    if steps == 1:
        chosen = np.array([diffusion.steps - 1])
    else:
        stride = (diffusion.steps - 1) / (steps - 1)
        chosen = np.rint(np.cumsum([0.0, *[stride] * (steps - 1)])).astype(int)
    return np.append(diffusion.sigmas[chosen][::-1], np.float32(0))


def heun(denoise: Denoise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """EDM's deterministic second-order sampler (Karras et al. 2022, Algorithm 1), as one loop.

    noise_BHWC: unit normal. 2 * steps - 1 calls of `denoise`: the last step, to noise level 0, is Euler's, which
    lands on the denoised image itself.
    """

    def step(x: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, following = levels
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        slope_there = (euler - denoise(euler, following)) / following
        return x + (following - sigma) * (slope + slope_there) / 2, None

    x_BHWC, _ = jax.lax.scan(step, noise_BHWC * sigmas[0], (jnp.asarray(sigmas[:-2]), jnp.asarray(sigmas[1:-1])))
    return denoise(x_BHWC, jnp.asarray(sigmas[-2]))


def euler(denoise: Denoise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Euler's method, `steps` calls of `denoise`. On DDPM's noise levels this is DDIM (Song et al. 2021, Eq. 13)."""

    def step(x: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, following = levels
        denoised = denoise(x, sigma)
        return denoised + following / sigma * (x - denoised), None

    x_BHWC, _ = jax.lax.scan(step, noise_BHWC * sigmas[0], (jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:])))
    return x_BHWC


def ancestral(
    output: Output,
    diffusion: DDPM,
    noise_BHWC: jax.Array,
    sigmas: np.ndarray,
    step_noise: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The reverse process of DDPM (Ho et al. 2020, Algorithm 2), `steps` calls of `output`.

    Its variance is the network's own if it has learnt one, between the two bounds (Nichol & Dhariwal 2021, Eq. 15),
    otherwise the upper bound. All is in terms of x = x0 + sigma eps, where a variance-preserving x_t is
    x / sqrt(1 + sigma^2). step_noise(i) is the unit normal noise of step i, [B, H, W, C].
    """
    channels = noise_BHWC.shape[-1]

    def step(x: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, sigma, following = xs
        out = output(x, sigma)
        denoised = diffusion.denoised(x, out, jnp.full(x.shape[0], sigma, jnp.float32))
        between = sigma**2 - following**2
        log_upper = jnp.log(between * (1 + following**2) / (1 + sigma**2))
        log_lower = jnp.log(between * following**2 / sigma**2)
        learnt = out.shape[-1] > channels
        fraction = (out[..., channels:] + 1) / 2 if learnt else jnp.ones_like(x)
        std = jnp.exp((fraction * log_upper + (1 - fraction) * log_lower) / 2)
        x = denoised + (following / sigma) ** 2 * (x - denoised)
        return x + std * step_noise(i), None

    x_BHWC = noise_BHWC * sigmas[0]
    xs = jnp.arange(len(sigmas) - 2), jnp.asarray(sigmas[:-2]), jnp.asarray(sigmas[1:-1])
    x_BHWC, _ = jax.lax.scan(step, x_BHWC, xs)
    last = jnp.full(x_BHWC.shape[0], sigmas[-2], jnp.float32)
    return diffusion.denoised(x_BHWC, output(x_BHWC, jnp.asarray(sigmas[-2])), last)

"""Solvers of the probability-flow ODE."""

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.sampling.guidance import Denoise


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """EDM's noise levels (Karras et al. 2022, Eq. 5), from sigma_max to sigma_min, then 0: float32 [steps + 1]."""
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((ends[0] + ramp * (ends[1] - ends[0])) ** rho, 0.0).astype(np.float32)


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

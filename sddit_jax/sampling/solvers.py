"""Solvers of the probability-flow ODE, and random samplers: EDM's and the reverse process of DDPM.

A denoiser may be `Piecewise`: which of its two functions a call is to is known when the solver is traced, so the loop
over the noise levels is as many loops as there are runs of steps with the same functions.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.method.diffusion import Diffusion
from sddit_jax.sampling.guidance import Denoise, Output, Piecewise

StepNoise = Callable[[jax.Array], jax.Array]


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """EDM's noise levels (Karras et al. 2022, Eq. 5), from sigma_max to sigma_min, then 0: float32 [steps + 1]."""
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((ends[0] + ramp * (ends[1] - ends[0])) ** rho, 0.0).astype(np.float32)


def respaced_levels(steps: int, diffusion: Diffusion) -> np.ndarray:
    """`steps` of a diffusion's own noise levels, evenly spaced from the last to the first, then 0: float32 [steps + 1].

    Rounded as in DiT's code, which adds up the stride from 0; one step starts at the last level.
    """
    last = len(diffusion.sigmas) - 1
    if steps == 1:
        chosen = np.array([last])
    else:
        stride = last / (steps - 1)
        chosen = np.rint(np.cumsum([0.0, *[stride] * (steps - 1)])).astype(int)
    return np.append(diffusion.sigmas[chosen][::-1], np.float32(0))


def churned_levels(
    sigmas: np.ndarray, s_churn: float, s_min: float, s_max: float, highest: float = np.inf
) -> np.ndarray:
    """The level to which `stochastic` raises each but the last of `sigmas` (Karras et al. 2022, Algorithm 2).

    sigma (1 + min(s_churn / steps, 2^(1/2) - 1)) where s_min <= sigma <= s_max, elsewhere sigma: float32 [steps]. None
    is raised above `highest`.
    """
    levels = np.float64(sigmas[:-1])
    gamma = min(s_churn / len(levels), 2**0.5 - 1)
    raised = np.maximum(levels, np.minimum(levels * (1 + gamma), highest))
    return np.where((s_min <= levels) & (levels <= s_max), raised, levels).astype(np.float32)


def heun(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """EDM's deterministic second-order sampler (Karras et al. 2022, Algorithm 1).

    noise_BHWC: unit normal. 2 * steps - 1 calls of `denoise`: the last step, to noise level 0, is Euler's, which
    lands on the denoised image itself.
    """

    def step(x: jax.Array, xs: tuple[jax.Array, jax.Array], denoise: Denoise, denoise_there: Denoise) -> jax.Array:
        sigma, following = xs
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        slope_there = (euler - denoise_there(euler, following)) / following
        return x + (following - sigma) * (slope + slope_there) / 2

    at = functions_at(denoise, sigmas[:-1])
    xs = sigmas[:-2], sigmas[1:-1]
    x_BHWC = loop(step, noise_BHWC * sigmas[0], xs, itertools.pairwise(at))
    return at[-1](x_BHWC, jnp.asarray(sigmas[-2]))


def stochastic(
    denoise: Denoise | Piecewise,
    noise_BHWC: jax.Array,
    sigmas: np.ndarray,
    raised: np.ndarray,
    s_noise: float,
    step_noise: StepNoise,
) -> jax.Array:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): step i adds noise up to raised[i], then is Heun's.

    step_noise(i) is the unit normal noise of step i, [B, H, W, C], which is multiplied by s_noise. With no level raised
    this is `heun`, which see.
    """
    std = (s_noise * np.sqrt(np.float64(raised) ** 2 - np.float64(sigmas[:-1]) ** 2)).astype(np.float32)

    def add_noise(x: jax.Array, i: jax.Array, std: jax.Array) -> jax.Array:
        return x + std * step_noise(i) if is_random else x

    def step(x: jax.Array, xs: tuple[jax.Array, ...], denoise: Denoise, denoise_there: Denoise) -> jax.Array:
        i, std, sigma, following = xs
        x = add_noise(x, i, std)
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        slope_there = (euler - denoise_there(euler, following)) / following
        return x + (following - sigma) * (slope + slope_there) / 2

    is_random, last = std.any(), len(raised) - 1
    at_raised, at_following = functions_at(denoise, raised), functions_at(denoise, sigmas[1:-1])
    xs = np.arange(last), std[:-1], raised[:-1], sigmas[1:-1]
    x_BHWC = loop(step, noise_BHWC * sigmas[0], xs, zip(at_raised[:-1], at_following, strict=True))
    x_BHWC = add_noise(x_BHWC, jnp.asarray(last), jnp.asarray(std[-1]))
    return at_raised[-1](x_BHWC, jnp.asarray(raised[-1]))


def euler(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Euler's method, `steps` calls of `denoise`. On DDPM's noise levels this is DDIM (Song et al. 2021, Eq. 13)."""

    def step(x: jax.Array, xs: tuple[jax.Array, jax.Array], denoise: Denoise) -> jax.Array:
        sigma, following = xs
        denoised = denoise(x, sigma)
        return denoised + following / sigma * (x - denoised)

    xs = sigmas[:-1], sigmas[1:]
    return loop(step, noise_BHWC * sigmas[0], xs, zip(functions_at(denoise, sigmas[:-1]), strict=True))


def dpmpp_2m(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2), `steps` calls of `denoise`.

    In x = x0 + sigma eps alpha is 1 and lambda, half the log-SNR, is -ln sigma; in lambda D is extrapolated linearly to
    the middle of the step. The first step is of first order, having nothing to extrapolate from, and so is the last: to
    noise level 0 lambda is without end, and the step lands on the denoised image.
    """
    lambdas = -np.log(np.float64(sigmas[:-1]))
    h = np.diff(lambdas)
    # 1 / (2 r) with r = (the step before) / (this step).
    extrapolation = np.zeros(len(lambdas))
    extrapolation[1:-1] = h[1:] / h[:-1] / 2
    # exp(-h), and 0 to noise level 0.
    shrinkage = np.float64(sigmas[1:]) / np.float64(sigmas[:-1])

    def step(
        carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...], denoise: Denoise
    ) -> tuple[jax.Array, jax.Array]:
        (x, before), (sigma, extrapolation, shrinkage, approach) = carry, xs
        denoised = denoise(x, sigma)
        extrapolated = denoised + extrapolation * (denoised - before)
        return shrinkage * x + approach * extrapolated, denoised

    xs = tuple(np.float32(a) for a in (sigmas[:-1], extrapolation, shrinkage, 1 - shrinkage))
    start_BHWC = noise_BHWC * sigmas[0]
    x_BHWC, _ = loop(
        step, (start_BHWC, jnp.zeros_like(start_BHWC)), xs, zip(functions_at(denoise, sigmas[:-1]), strict=True)
    )
    return x_BHWC


def ancestral(
    output: Output | Piecewise,
    diffusion: Diffusion,
    noise_BHWC: jax.Array,
    sigmas: np.ndarray,
    step_noise: StepNoise,
) -> jax.Array:
    """The reverse process of DDPM (Ho et al. 2020, Algorithm 2), `steps` calls of `output`.

    Its variance is the network's own if it has learnt one, between the two bounds (Nichol & Dhariwal 2021, Eq. 15),
    otherwise the upper bound. All is in terms of x = x0 + sigma eps, where a variance-preserving x_t is
    x / sqrt(1 + sigma^2). step_noise(i) is the unit normal noise of step i, [B, H, W, C].
    """
    channels = noise_BHWC.shape[-1]

    def step(x: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array], output: Output) -> jax.Array:
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
        return x + std * step_noise(i)

    outputs = functions_at(output, sigmas[:-1])
    xs = np.arange(len(sigmas) - 2), sigmas[:-2], sigmas[1:-1]
    x_BHWC = loop(step, noise_BHWC * sigmas[0], xs, zip(outputs[:-1], strict=True))
    last = jnp.full(x_BHWC.shape[0], sigmas[-2], jnp.float32)
    return diffusion.denoised(x_BHWC, outputs[-1](x_BHWC, jnp.asarray(sigmas[-2])), last)


class Problem(NamedTuple):
    """All that a solver may use.

    denoise(x, sigma) -> D and output(x, sigma) -> F, for a scalar sigma; either may be `Piecewise`. noise_BHWC: unit
    normal; the solver starts from noise_BHWC * sigmas[0]. sigmas: float32 [steps + 1], falling, the last 0. raised:
    `churned_levels`. step_noise(i): the unit normal noise of step i, [B, H, W, C].
    """

    denoise: Denoise | Piecewise
    output: Output | Piecewise
    diffusion: Diffusion
    noise_BHWC: jax.Array
    sigmas: np.ndarray
    raised: np.ndarray
    s_noise: float
    step_noise: StepNoise


class Solver(NamedTuple):
    """solve(problem) -> the image at noise level 0, which is the denoised image at the last level above it.

    own_levels: it goes through the levels of the diffusion's own table (`respaced_levels`), not through EDM's.
    """

    solve: Callable[[Problem], jax.Array]
    own_levels: bool = False


def functions_at(function: Output | Denoise | Piecewise, sigmas: np.ndarray) -> list[Output | Denoise]:
    """The function to call at each noise level."""
    return [function.at(sigma) if isinstance(function, Piecewise) else function for sigma in sigmas]


def loop(
    step: Callable[..., Any], carry: Any, xs: tuple[np.ndarray, ...], functions: Iterable[tuple[Output | Denoise, ...]]
) -> Any:
    """carry = step(carry, xs[i], *functions[i]) for each i: one lax.scan per run of steps with the same functions."""
    start = 0
    for same, run in itertools.groupby(functions):
        stop = start + len(list(run))
        part = tuple(jnp.asarray(a[start:stop]) for a in xs)
        carry, _ = jax.lax.scan(lambda carry, x, same=same: (step(carry, x, *same), None), carry, part)
        start = stop
    return carry

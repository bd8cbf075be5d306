"""Solvers of the probability-flow ODE, and the random samplers of EDM and DDPM.

A solver goes from noise to an image through falling noise levels `sigmas`, float32 [steps + 1], of which the last is 0.
Its other arguments are described at `Problem`; it returns float32 [B, H, W, C]. A denoiser may be `Piecewise`. Which of
its two functions is called at a noise level is known when the solver is traced, so each run of steps with the same
functions is one compiled loop.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.method.diffusion import Diffusion
from sddit_jax.sampling.guidance import Denoise, Output, Piecewise

StepNoise = Callable[[jax.Array], jax.Array]


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """EDM's noise levels, from sigma_max to sigma_min, then 0: float32 [steps + 1] (Karras et al. 2022, Eq. 5)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((first + np.linspace(0.0, 1.0, steps) * (last - first)) ** rho, 0.0).astype(np.float32)


def respaced_levels(steps: int, diffusion: Diffusion) -> np.ndarray:
    """Evenly spaced levels of a diffusion's table, from the last to the first, then 0: float32 [steps + 1].

    Positions are rounded as in DiT's code, which adds up the stride from 0. A single step starts at the last level.
    """
    last = len(diffusion.sigmas) - 1
    positions = np.cumsum([0.0, *[last / (steps - 1)] * (steps - 1)]) if steps > 1 else [last]
    return np.append(diffusion.sigmas[np.rint(positions).astype(int)][::-1], np.float32(0))


def churned_levels(
    sigmas: np.ndarray, s_churn: float, s_min: float, s_max: float, highest: float = np.inf
) -> np.ndarray:
    """The levels to which `stochastic` raises all but the last of `sigmas`: float32 [steps].

    sigma (1 + min(s_churn / steps, 2^(1/2) - 1)), at most `highest`, where s_min <= sigma <= s_max; elsewhere sigma
    (Karras et al. 2022, Algorithm 2).
    """
    levels = np.float64(sigmas[:-1])
    gamma = min(s_churn / len(levels), 2**0.5 - 1)
    raised = np.maximum(levels, np.minimum(levels * (1 + gamma), highest))
    return np.where((s_min <= levels) & (levels <= s_max), raised, levels).astype(np.float32)


def heun(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """EDM's deterministic second-order sampler (Karras et al. 2022, Algorithm 1): 2 * steps - 1 calls of `denoise`.

    The last step, to noise level 0, is Euler's and ends on the denoised image.
    """
    ends = sigmas[:-2], sigmas[1:-1]
    x_BHWC = loop(_heun_step, noise_BHWC * sigmas[0], ends, (denoise, ends[0]), (denoise, ends[1]))
    return _call(denoise, x_BHWC, sigmas[-2])


def stochastic(
    denoise: Denoise | Piecewise,
    noise_BHWC: jax.Array,
    sigmas: np.ndarray,
    raised: np.ndarray,
    s_noise: float,
    step_noise: StepNoise,
) -> jax.Array:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): 2 * steps - 1 calls of `denoise`.

    Step i adds noise up to the level raised[i], s_noise times as strong as the exact one, and goes on as `heun` does.
    """
    std = (s_noise * np.sqrt(np.float64(raised) ** 2 - np.float64(sigmas[:-1]) ** 2)).astype(np.float32)

    def add_noise(x: jax.Array, i: jax.Array, std: jax.Array) -> jax.Array:
        return x + std * step_noise(i) if is_random else x

    def step(x: jax.Array, xs: tuple[jax.Array, ...], *denoise: Denoise) -> jax.Array:
        i, std, *ends = xs
        return _heun_step(add_noise(x, i, std), ends, *denoise)

    is_random, last = std.any(), len(raised) - 1
    ends = raised[:-1], sigmas[1:-1]
    xs = np.arange(last), std[:-1], *ends
    x_BHWC = loop(step, noise_BHWC * sigmas[0], xs, (denoise, ends[0]), (denoise, ends[1]))
    x_BHWC = add_noise(x_BHWC, jnp.asarray(last), jnp.asarray(std[-1]))
    return _call(denoise, x_BHWC, raised[-1])


def _heun_step(x: jax.Array, ends: Sequence[jax.Array], denoise: Denoise, denoise_there: Denoise) -> jax.Array:
    """A step from the noise level ends[0] to ends[1], along the mean of the slopes at both."""
    sigma, following = ends
    slope = (x - denoise(x, sigma)) / sigma
    euler = x + (following - sigma) * slope
    slope_there = (euler - denoise_there(euler, following)) / following
    return x + (following - sigma) * (slope + slope_there) / 2


def euler(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Euler's method, `steps` calls of `denoise`. On DDPM's noise levels this is DDIM (Song et al. 2021, Eq. 13)."""

    def step(x: jax.Array, xs: tuple[jax.Array, jax.Array], denoise: Denoise) -> jax.Array:
        sigma, following = xs
        denoised = denoise(x, sigma)
        return denoised + following / sigma * (x - denoised)

    return loop(step, noise_BHWC * sigmas[0], (sigmas[:-1], sigmas[1:]), (denoise, sigmas[:-1]))


def dpmpp_2m(denoise: Denoise | Piecewise, noise_BHWC: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2), `steps` calls of `denoise`.

    For x = x0 + sigma * eps the paper's alpha is 1, and lambda, half the log-SNR, is -ln sigma. D is extrapolated
    linearly in lambda to the middle of the step. The first step is of first order, since it has no D before it, and so
    is the last: at noise level 0 lambda is infinite, and the step ends on the denoised image.
    """
    lambdas = -np.log(np.float64(sigmas[:-1]))
    h = np.diff(lambdas)
    # The paper's 1 / (2 r), where r is the step before over this step.
    extrapolation = np.zeros(len(lambdas))
    extrapolation[1:-1] = h[1:] / h[:-1] / 2
    # exp(-h), which is 0 for the step to noise level 0.
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
    x_BHWC, _ = loop(step, (start_BHWC, jnp.zeros_like(start_BHWC)), xs, (denoise, sigmas[:-1]))
    return x_BHWC


def ancestral(
    output: Output | Piecewise,
    diffusion: Diffusion,
    noise_BHWC: jax.Array,
    sigmas: np.ndarray,
    step_noise: StepNoise,
) -> jax.Array:
    """The reverse process of DDPM (Ho et al. 2020, Algorithm 2), `steps` calls of `output`.

    The variance is the network's, between the two bounds, if it learnt one (Nichol & Dhariwal 2021, Eq. 15), else the
    upper bound. Everything is written with x = x0 + sigma * eps; a variance-preserving x_t is x / sqrt(1 + sigma^2).
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

    xs = np.arange(len(sigmas) - 2), sigmas[:-2], sigmas[1:-1]
    x_BHWC = loop(step, noise_BHWC * sigmas[0], xs, (output, sigmas[:-2]))
    last = jnp.full(x_BHWC.shape[0], sigmas[-2], jnp.float32)
    return diffusion.denoised(x_BHWC, _call(output, x_BHWC, sigmas[-2]), last)


class Problem(NamedTuple):
    """The arguments of all solvers.

    denoise(x, sigma) -> D and output(x, sigma) -> F, for a scalar sigma; each may be `Piecewise`. noise_BHWC: unit
    normal; a solver starts from noise_BHWC * sigmas[0]. sigmas: float32 [steps + 1], falling to 0. raised: see
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
    """solve(problem) -> the image at noise level 0, which is the denoised image at the last level above 0.

    own_levels: whether the noise levels are those of the diffusion's table (`respaced_levels`), or EDM's.
    """

    solve: Callable[[Problem], jax.Array]
    own_levels: bool = False


def functions_at(function: Output | Denoise | Piecewise, sigmas: np.ndarray) -> list[Output | Denoise]:
    """The function to call at each noise level of `sigmas`."""
    return [function.at(sigma) if isinstance(function, Piecewise) else function for sigma in sigmas]


def loop(step: Callable[..., Any], carry: Any, xs: tuple[np.ndarray, ...], *calls: tuple[Any, np.ndarray]) -> Any:
    """The last carry of carry = step(carry, xs of step i, *functions of step i) for all steps i.

    calls: pairs of a function and the noise level at which each step calls it. Steps that follow each other and call
    the same functions are one lax.scan.
    """
    start = 0
    for same, run in itertools.groupby(zip(*(functions_at(*call) for call in calls), strict=True)):
        stop = start + len(list(run))
        part = tuple(jnp.asarray(a[start:stop]) for a in xs)
        carry, _ = jax.lax.scan(lambda carry, x, same=same: (step(carry, x, *same), None), carry, part)
        start = stop
    return carry


def _call(function: Output | Denoise | Piecewise, x_BHWC: jax.Array, sigma: np.float32) -> jax.Array:
    (function,) = functions_at(function, [sigma])
    return function(x_BHWC, jnp.asarray(sigma))

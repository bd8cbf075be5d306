"""The solvers on a mixture of Gaussians, of which everything is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixture import cdf, covariance, denoised, flow
from tiny import float64

from sddit_jax.sampling.solvers import churned_levels, dpmpp_2m, euler, heun, noise_levels, stochastic

LOWEST, HIGHEST, RHO = 0.002, 80.0, 7.0


def denoise(x, sigma):
    return denoised(jnp, x, sigma.astype(x.dtype))


@pytest.fixture(scope="module")
def exact():
    """Noise, and what lies at the lowest noise level on its trajectory, denoised.

    All solvers end with that one Euler step from the lowest level to 0, which has an error of its own whatever the
    number of steps; the reference takes it too, so that what is left is the error of the steps before.
    """
    noise = np.random.default_rng(0).standard_normal((64, 1, 1, 3))
    first, *_, last, _ = np.float64(noise_levels(2, LOWEST, HIGHEST, RHO))
    return noise, denoised(np, flow(noise, first, last), last)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(exact, solve, order):
    noise, reference = exact
    # Intervals between the noise levels down to the lowest.
    intervals, errors = (32, 64, 128, 256), []
    with float64():
        for count in intervals:
            levels = noise_levels(count + 1, LOWEST, HIGHEST, RHO)
            out = jax.jit(lambda z, levels=levels: solve(denoise, z, levels))(noise)
            errors.append(np.sqrt(np.mean((np.asarray(out) - reference) ** 2)))
    slopes = -np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, order, atol=0.15, err_msg=f"errors {errors}")
    np.testing.assert_allclose(-np.polyfit(np.log2(intervals), np.log2(errors), 1)[0], order, atol=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_dpmpp_2m_is_that_of_the_paper(steps):
    """Lu et al. 2022, Algorithm 2, in its own terms (alpha, sigma, lambda) with alpha = 1, in float64."""
    noise = np.random.default_rng(1).standard_normal((16, 1, 1, 3))
    levels = noise_levels(steps, LOWEST, HIGHEST, RHO)
    sigma = np.float64(levels)
    x = sigma[0] * noise
    answers = [denoised(np, x, sigma[0])]
    for i in range(1, steps):
        h = np.log(sigma[i - 1]) - np.log(sigma[i])
        data = answers[-1]
        if i > 1:
            r = (np.log(sigma[i - 2]) - np.log(sigma[i - 1])) / h
            data = (1 + 1 / (2 * r)) * answers[-1] - 1 / (2 * r) * answers[-2]
        x = sigma[i] / sigma[i - 1] * x - np.expm1(-h) * data
        answers.append(denoised(np, x, sigma[i]))
    assert jax.jit(lambda z: dpmpp_2m(denoise, z, levels))(jnp.float32(noise)).dtype == jnp.float32
    # In float32 this denoiser rounds more at noise level 80.
    with float64():
        out = np.asarray(jax.jit(lambda z: dpmpp_2m(denoise, z, levels))(noise))
    assert np.linalg.norm(out - answers[-1]) <= 1e-6 * np.linalg.norm(answers[-1])


def churned_samples(count, steps, s_churn, s_noise):
    levels = noise_levels(steps, LOWEST, HIGHEST, RHO)
    raised = churned_levels(levels, s_churn, 0.0, 1000.0)
    first, rest = jax.random.split(jax.random.key(5))
    shape = (count, 1, 1, 3)

    def step_noise(i):
        return jax.random.normal(jax.random.fold_in(rest, i), shape)

    out = jax.jit(lambda z: stochastic(denoise, z, levels, raised, s_noise, step_noise))(
        jax.random.normal(first, shape)
    )
    return np.float64(out).reshape(count, 3)


def distances(samples):
    """The largest Kolmogorov-Smirnov statistic of 20 projections, and that of mean and covariance in units of noise.

    Of exact samples each statistic times the root of their number is below 2.2 with a probability of 0.9999, and each
    moment is 0 +- 1.
    """
    count, (mean, second) = len(samples), covariance()
    directions = np.random.default_rng(0).standard_normal((20, 3))
    statistics = []
    for direction in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        expected = cdf(direction, np.sort(samples @ direction))
        steps = np.arange(count + 1) / count
        statistics.append(max(abs(expected - steps[1:]).max(), abs(expected - steps[:-1]).max()))
    centered = samples - mean
    products = np.einsum("ni,nj->nij", centered, centered)
    moments = [
        (centered.mean(0)) / centered.std(0),
        (products.mean(0) - second) / products.std(0),
    ]
    return max(statistics) * count**0.5, max(abs(m).max() for m in moments) * count**0.5


def test_stochastic_samples_the_mixture():
    kolmogorov, moments = distances(churned_samples(40_000, 128, s_churn=60.0, s_noise=1.0))
    assert kolmogorov < 2.2
    assert moments < 4


def test_noise_that_is_too_strong_would_be_seen():
    kolmogorov, moments = distances(churned_samples(40_000, 128, s_churn=60.0, s_noise=1.1))
    assert kolmogorov > 5
    assert moments > 10


def test_noise_is_added_where_it_is_said():
    levels = noise_levels(10, LOWEST, HIGHEST, RHO)
    raised = churned_levels(levels, 2.0, 0.05, 50.0)
    inside = (levels[:-1] >= 0.05) & (levels[:-1] <= 50)
    assert 0 < inside.sum() < 10
    np.testing.assert_allclose(raised / levels[:-1], np.where(inside, 1.2, 1), rtol=1e-6)
    # At most 2^(1/2).
    np.testing.assert_allclose(churned_levels(levels, 40.0, 0.0, 100.0) / levels[:-1], 2**0.5, rtol=1e-6)
    np.testing.assert_array_equal(churned_levels(levels, 0.0, 0.0, 100.0), levels[:-1])


def test_stochastic_steps_are_those_of_the_paper():
    """Karras et al. 2022, Algorithm 2, in float64."""
    rng = np.random.default_rng(2)
    levels = noise_levels(12, LOWEST, HIGHEST, RHO)
    start, noises = rng.standard_normal((16, 1, 1, 3)), rng.standard_normal((12, 16, 1, 1, 3))
    t, x = np.float64(levels), levels[0] * start
    for i in range(12):
        gamma = min(5.0 / 12, 2**0.5 - 1) if 0.01 <= t[i] <= 30 else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * 1.007 * noises[i]
        d = (x_hat - denoised(np, x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1]:
            d_there = (x - denoised(np, x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_there) / 2
    table, raised = jnp.asarray(noises, jnp.float32), churned_levels(levels, 5.0, 0.01, 30.0)
    out = jax.jit(lambda z: stochastic(denoise, z, levels, raised, 1.007, lambda i: table[i]))(jnp.float32(start))
    assert out.dtype == jnp.float32
    assert np.linalg.norm(out - x) <= 1e-5 * np.linalg.norm(x)

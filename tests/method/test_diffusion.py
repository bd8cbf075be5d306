import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import denoise
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.method.diffusion import DDPM, EDM
from sddit_jax.method.diffusions import DiffusionConfig, make_diffusion
from sddit_jax.method.losses import denoising_error

ONE = jnp.ones((1, 1, 1, 1))
SIGMAS = st.floats(1 / 512, 80, width=32)


def coefficients(sigma, diffusion=EDM()):
    """c_skip, c_out, c_in, c_noise and the weight at sigma."""
    sigma_B = jnp.array([sigma])
    c_in, c_noise = diffusion.network_input(ONE, sigma_B)
    c_skip = diffusion.denoised(ONE, 0 * ONE, sigma_B)
    c_out = diffusion.denoised(0 * ONE, ONE, sigma_B)
    return [float(x.squeeze()) for x in (c_skip, c_out, c_in, c_noise, diffusion.weight(sigma_B))]


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (0.5, [0.5, 0.3535534, 1.4142136, -0.1732868, 8.0]),
        (2.0, [0.05882353, 0.4850713, 0.4850713, 0.1732868, 4.25]),
        (0.002, [0.999984, 0.001999984, 1.999984, -1.553652, 250004.0]),
        (80.0, [3.906097e-5, 0.4999902, 0.01249976, 1.095507, 4.00015625]),
    ],
)
def test_preconditioning(sigma, expected):
    np.testing.assert_allclose(coefficients(sigma), expected, rtol=5e-7)


@given(SIGMAS, st.floats(0.125, 2, width=32))
def test_preconditioning_identities(sigma, sigma_data):
    c_skip, c_out, c_in, c_noise, weight = coefficients(sigma, EDM(sigma_data=sigma_data))
    np.testing.assert_allclose(weight * c_out**2, 1, rtol=2e-6)
    # Unit variance of the network's input and of its target, for data of variance sigma_data^2.
    np.testing.assert_allclose(c_in**2 * (sigma**2 + sigma_data**2), 1, rtol=2e-6)
    target = (1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2
    np.testing.assert_allclose(target, c_out**2, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(np.exp(4 * c_noise), sigma, rtol=5e-6)


def test_denoise_feeds_the_network_and_gives_float32():
    diffusion, seen = EDM(), {}

    def network(x, c_noise):
        seen.update(x=x, c_noise=c_noise)
        return jnp.full_like(x, 0.25, jnp.bfloat16)

    x = jnp.array([1.0, -3.0]).reshape(2, 1, 1, 1)
    out = denoise(diffusion, network, x, jnp.array([0.5, 2.0]))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(seen["x"].ravel(), [1.4142136, -1.4552138], rtol=1e-6)
    np.testing.assert_allclose(seen["c_noise"], [-0.1732868, 0.1732868], rtol=1e-6)
    expected = [0.5 + 0.25 * 0.3535534, -3 * 0.05882353 + 0.25 * 0.4850713]
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def sigmas():
    return EDM().sample_sigma(jax.random.key(0), 1 << 20)


def test_training_noise_levels(sigmas):
    log = np.log(np.asarray(sigmas, np.float64))
    np.testing.assert_allclose([log.mean(), log.std()], [-1.2, 1.2], atol=0.005)
    np.testing.assert_allclose(np.percentile(sigmas, [1, 50, 99]), [0.0184, 0.301, 4.93], rtol=0.015)


@pytest.mark.parametrize(("variance", "loss"), [(0.25, 1.000), (0.64, 1.571), (1.0, 2.098)])
def test_loss_of_a_fresh_network(sigmas, variance, loss):
    diffusion = EDM()
    shape = (sigmas.size, 1, 1, 1)
    x0 = variance**0.5 * jax.random.normal(jax.random.key(1), shape)
    x = diffusion.noised(x0, jax.random.normal(jax.random.key(2), shape), sigmas)
    denoised = diffusion.denoised(x, jnp.zeros(shape), sigmas)
    error = denoising_error(denoised, x0, diffusion.weight(sigmas))
    np.testing.assert_allclose(error.mean(), loss, atol=0.012)


@given(SIGMAS, SIGMAS)
def test_two_points_of_one_trajectory(sigma_a, sigma_b):
    x0, eps = (jax.random.normal(jax.random.key(k), (1, 2, 2, 3)) for k in (0, 1))
    a, b = (EDM().noised(x0, eps, jnp.array([s])) for s in (sigma_a, sigma_b))
    # The line through both has slope eps and meets sigma = 0 in the clean image.
    np.testing.assert_allclose(a - b, (sigma_a - sigma_b) * eps, atol=4e-5)
    np.testing.assert_allclose(a - sigma_a * eps, x0, atol=4e-5)


class TestDDPM:
    # Numbers of a few bits, so that float32 computes the products and sums of the tests without rounding.
    EXACT_SIGMAS = jnp.array([2.0**k for k in range(-6, 8)])

    @staticmethod
    def exact_images(seed):
        return jax.random.randint(jax.random.key(seed), (14, 2, 2, 3), -16, 17) / 8

    def test_noise_levels_are_those_of_linear_betas(self):
        logs = [math.log1p(-(1e-4 + (0.02 - 1e-4) * t / 999)) for t in range(1000)]
        expected = [math.expm1(-math.fsum(logs[: t + 1])) ** 0.5 for t in range(1000)]
        sigmas = DDPM().sigmas
        assert sigmas.dtype == np.float32
        np.testing.assert_allclose(sigmas, expected, rtol=1e-7)
        np.testing.assert_allclose(1 / (1 + np.float64(sigmas[[0, -1]]) ** 2), [0.9999, 4.0358e-5], rtol=1e-5)
        assert (DDPM().sigma_min, DDPM().sigma_max) == (sigmas[0], sigmas[-1])

    @pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
    def test_a_level_of_the_table_is_its_step(self, transform):
        c_noise = transform(lambda sigma_B: DDPM().preconditioning(sigma_B).c_noise_B)(jnp.asarray(DDPM().sigmas))
        assert c_noise.dtype == jnp.float32
        np.testing.assert_array_equal(c_noise, np.arange(1000))

    def test_other_levels_are_between_two_steps(self):
        sigmas, parts = np.float64(DDPM().sigmas), np.linspace(0, 1, 9)[1:-1]
        between = sigmas[:-1, None] + np.diff(sigmas)[:, None] * parts
        t = np.asarray(DDPM().preconditioning(jnp.asarray(between.ravel(), jnp.float32)).c_noise_B)
        assert (np.diff(t) > 0).all()
        np.testing.assert_array_equal(np.floor(t), np.repeat(np.arange(999), 7))
        np.testing.assert_allclose(t, (np.arange(999)[:, None] + parts).ravel(), atol=5e-4)
        outside = DDPM().preconditioning(jnp.array([0.001, 1000.0])).c_noise_B
        np.testing.assert_array_equal(outside, [0, 999])

    def test_the_network_sees_the_variance_preserving_image(self):
        sigmas = DDPM().sigmas
        x0, eps = (jax.random.normal(jax.random.key(k), (1000, 2, 2, 3)) for k in (0, 1))
        seen, _ = DDPM().network_input(DDPM().noised(x0, eps, jnp.asarray(sigmas)), jnp.asarray(sigmas))
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[:, None, None, None]
        expected = alpha_bar**0.5 * np.float64(x0) + (1 - alpha_bar) ** 0.5 * np.float64(eps)
        np.testing.assert_allclose(seen, expected, atol=1e-6)

    def test_the_network_predicts_the_noise(self):
        x0, eps = self.exact_images(0), self.exact_images(1)
        x = DDPM().noised(x0, eps, self.EXACT_SIGMAS)
        np.testing.assert_array_equal(denoise(DDPM(), lambda x, t: eps, x, self.EXACT_SIGMAS), x0)
        with_variance = jnp.concatenate([eps, eps + 7], axis=-1)
        np.testing.assert_array_equal(DDPM().denoised(x, with_variance, self.EXACT_SIGMAS), x0)

    def test_the_weighted_error_is_that_of_the_noise(self):
        x0, eps, f = (self.exact_images(k) for k in range(3))
        denoised = DDPM().denoised(DDPM().noised(x0, eps, self.EXACT_SIGMAS), f, self.EXACT_SIGMAS)
        weighted = DDPM().weight(self.EXACT_SIGMAS)[:, None, None, None] * jnp.square(denoised - x0)
        np.testing.assert_array_equal(weighted, jnp.square(f - eps))

    def test_training_draws_all_steps_equally_often(self):
        sigmas, draws = DDPM().sigmas, np.asarray(DDPM().sample_sigma(jax.random.key(0), 1 << 20))
        values, counts = np.unique(draws, return_counts=True)
        np.testing.assert_array_equal(values, sigmas)
        # Chi-square of 999 degrees of freedom: 1 +- 0.045 for each.
        mean = len(draws) / 1000
        assert abs(((counts - mean) ** 2).mean() / mean - 1) < 0.2
        assert abs(counts - mean).max() < 5 * mean**0.5


def test_diffusions_by_name():
    changed = EDM(0.7, -0.4, 1.0, 0.01, 50.0)
    assert make_diffusion(DiffusionConfig(name="ddpm", edm=changed)) == DDPM()
    assert make_diffusion(DiffusionConfig()) == EDM()
    assert make_diffusion(DiffusionConfig(edm=changed)) == changed

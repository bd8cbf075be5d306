import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.diffusion import EDM
from sddit_jax.losses import denoising_error

ONE = jnp.ones((1, 1, 1, 1))
SIGMAS = st.floats(1 / 512, 80, width=32)


def coefficients(sigma, diffusion=EDM()):  # noqa: B008
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
    out = diffusion.denoise(network, x, jnp.array([0.5, 2.0]))
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

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, random_params, tiny_config

from sddit_jax.config.parts import make_network
from sddit_jax.config.schema import SamplingConfig
from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import LatentCodec
from sddit_jax.method.diffusion import DDPM
from sddit_jax.sampling.guidance import make_denoise, make_output
from sddit_jax.sampling.sampler import make_sample
from sddit_jax.sampling.solvers import ancestral, euler, respaced_levels

CODEC = LatentCodec((0.0,), (1.0,))
SHAPE = (4, 3, 3, 2)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def spaced(steps):
    """Steps t of 1,000, from the first to the last, in integers."""
    return [(2 * i * 999 + steps - 1) // (2 * (steps - 1)) for i in range(steps)]


def toy_network(xp, x, t):
    """(eps, v) as smooth functions of the variance-preserving x_t and of t; eps is near what white data have."""
    mixed = xp.roll(x, 1, axis=1) - 0.5 * xp.roll(x, 1, axis=3)
    eps = xp.tanh((t + 20) / 250) * (x + 0.3 * xp.sin(mixed + t / 150))
    return eps, xp.cos(2 * mixed - t / 200)


def toy_output(learnt):
    def output(x, sigma):
        seen, t_B = DDPM().network_input(x, jnp.full(len(x), sigma))
        eps, v = toy_network(jnp, seen, t_B[:, None, None, None])
        return jnp.concatenate([eps, v], axis=-1) if learnt else eps

    return output


def ddpm_in_papers_terms(x, noises, steps, learnt):
    """x_T -> x_0: Ho et al. 2020, Eqs. 6, 7 and 11; Nichol & Dhariwal 2021, Eqs. 15 and 19 and their respacing."""
    t_of = spaced(steps)
    for k in reversed(range(steps)):
        alpha_bar, before = ALPHA_BAR[t_of[k]], ALPHA_BAR[t_of[k - 1]] if k else 1.0
        alpha = alpha_bar / before
        beta = 1 - alpha
        eps, v = toy_network(np, x, t_of[k])
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        mean = before**0.5 * beta / (1 - alpha_bar) * x0 + alpha**0.5 * (1 - before) / (1 - alpha_bar) * x
        if not k:
            return mean
        log_variance = np.log(beta)
        if learnt:
            posterior = (1 - before) / (1 - alpha_bar) * beta
            log_variance = (v + 1) / 2 * log_variance + (1 - v) / 2 * np.log(posterior)
        x = mean + np.exp(log_variance / 2) * noises[steps - 1 - k]


def ddim_in_papers_terms(x, steps):
    """x_T -> x_0: Song et al. 2021 (arXiv 2010.02502), Eq. 12 with sigma_t = 0."""
    t_of = spaced(steps)
    for k in reversed(range(steps)):
        alpha_bar, before = ALPHA_BAR[t_of[k]], ALPHA_BAR[t_of[k - 1]] if k else 1.0
        eps, _ = toy_network(np, x, t_of[k])
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
    return x


def random_start(steps):
    """A variance-preserving x_T in float64, what the solvers take for it, and noise for the steps."""
    rng = np.random.default_rng(steps)
    x_T = rng.standard_normal(SHAPE)
    noises = rng.standard_normal((steps - 1, *SHAPE))
    # The solvers start at sigma_T times what they are given, and that is x_T / alpha_bar_T^(1/2).
    return x_T, jnp.asarray(x_T / (1 - ALPHA_BAR[-1]) ** 0.5, jnp.float32), noises


def relative_error(x, reference):
    return np.linalg.norm(np.float64(x) - reference) / np.linalg.norm(reference)


class TestLevels:
    def test_are_evenly_spaced_steps(self):
        levels = respaced_levels(250, DDPM())
        assert levels.dtype == np.float32
        t = spaced(250)
        assert (t[:4], t[-3:]) == ([0, 4, 8, 12], [991, 995, 999])
        np.testing.assert_array_equal(levels, [*DDPM().sigmas[t][::-1], 0])

    def test_all_steps_are_the_table(self):
        np.testing.assert_array_equal(respaced_levels(1000, DDPM()), [*DDPM().sigmas[::-1], 0])

    def test_one_step_is_the_last_level(self):
        np.testing.assert_array_equal(respaced_levels(1, DDPM()), [DDPM().sigmas[-1], 0])

    def test_every_number_of_steps_is_rounded_as_in_dits_code(self):
        for steps in range(2, 1001):
            stride, position, chosen = 999 / (steps - 1), 0.0, []
            for _ in range(steps):
                chosen.append(round(position))
                position += stride
            np.testing.assert_array_equal(respaced_levels(steps, DDPM())[:-1], DDPM().sigmas[chosen][::-1])

    @pytest.mark.parametrize("steps", [1001, 4000])
    def test_more_than_there_are(self, steps):
        with pytest.raises(ConfigError, match=rf"sampling\.steps is {steps}, but ddpm has 1000"):
            make_config("dit", {"diffusion.name": "ddpm", "sampling.solver": "ddim", "sampling.steps": steps})


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_ddpm_is_that_of_the_papers(steps, learnt):
    x_T, noise, noises = random_start(steps)
    table = jnp.asarray(noises, jnp.float32)
    levels = respaced_levels(steps, DDPM())
    out = ancestral(toy_output(learnt), DDPM(), noise, levels, lambda i: table[i])
    assert out.dtype == jnp.float32
    assert relative_error(out, ddpm_in_papers_terms(x_T, noises, steps, learnt)) <= 1e-5


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_ddim_is_that_of_the_paper(steps, learnt):
    x_T, noise, _ = random_start(steps)
    out = euler(make_denoise(toy_output(learnt), DDPM()), noise, respaced_levels(steps, DDPM()))
    assert out.dtype == jnp.float32
    assert relative_error(out, ddim_in_papers_terms(x_T, steps)) <= 1e-5


@pytest.mark.parametrize(("variance", "learnt", "steps"), [(1.0, False, 250), (0.25, True, 250), (0.01, True, 10)])
def test_ddpm_samples_gaussian_data(variance, learnt, steps):
    """Exact for any number of steps, once with the upper bound (data of variance 1), once with the exact variance."""
    mean, levels = 0.7, respaced_levels(steps, DDPM())

    def output(x, sigma):
        denoised = (x * variance + mean * sigma**2) / (variance + sigma**2)
        eps = (x - denoised) / sigma
        if not learnt:
            return eps
        # The variance of x at the next level s, given x, is (sigma^2 - s^2) (v + s^2) / (v + sigma^2): the upper
        # bound has v = 1 in it, the lower v = 0.
        s = jnp.asarray(levels)[1 + jnp.argmin(jnp.abs(levels[:-1] - sigma))]
        log_upper, log_lower, log_exact = (jnp.log((v + s**2) / (v + sigma**2)) for v in (1, 0, variance))
        return jnp.concatenate([eps, jnp.full_like(x, 2 * (log_exact - log_lower) / (log_upper - log_lower) - 1)], -1)

    shape = (100_000, 1, 1, 1)
    first, rest = jax.random.split(jax.random.key(0))
    samples = ancestral(
        output,
        DDPM(),
        jax.random.normal(first, shape),
        levels,
        lambda i: jax.random.normal(jax.random.fold_in(rest, i), shape),
    )
    samples = np.float64(samples)
    # The last step adds no noise, so the variance is that of the denoised images at the lowest noise level.
    expected = variance**2 / (variance + levels[-2] ** 2)
    np.testing.assert_allclose(samples.mean(), mean, atol=4 * (variance / len(samples)) ** 0.5)
    np.testing.assert_allclose(samples.var(), expected, rtol=4 * (2 / len(samples)) ** 0.5)


@pytest.fixture(scope="module", params=["ddpm", "ddim"])
def generate(request):
    """generate(indices, labels, seed=0) -> latents, from one compiled sampler per batch size."""
    network = make_network(tiny_config(changes={"diffusion.name": "ddpm", "model.learn_sigma": True}))
    params = random_params(network.init)
    sampling = SamplingConfig(solver=request.param, steps=4, guidance=1.5)
    sample = jax.jit(make_sample(network, DDPM(), CODEC, sampling))

    def generate(indices, labels, seed=0):
        return np.asarray(sample(params, seed, jnp.array(indices), jnp.array(labels)))

    return generate


def test_an_image_is_a_function_of_seed_index_and_label(generate):
    alone = generate([5], [2])[0]
    assert alone.shape == (8, 8, 3)
    batches = [([7, 5, 0], [2, 2, 0], 1), ([5, 5, 1], [2, 1, 2], 0)]
    for indices, labels, position in batches:
        for i, image in enumerate(generate(indices, labels)):
            different = relative_error(image, alone)
            assert different <= 1e-5 if i == position else different > 0.02
    assert relative_error(generate([5], [2], seed=1)[0], alone) > 0.5


class Fake:
    """A network with a given F(x, label), [B, H, W, 2C], and the labels of its calls."""

    def __init__(self, f, channels, num_classes=0):
        self.f, self.calls = f, []
        self.model = SimpleNamespace(image_size=16, channels=channels, num_classes=num_classes)
        self.null_label = num_classes

    def __call__(self, params, x, c_noise, label):
        self.calls.append(label)
        return self.f(x, label)


def test_noise_of_the_steps_is_independent_between_images_and_of_the_start():
    # F = 0 leaves the image as it is, and v = 1 asks for the upper bound of the variance.
    network = Fake(lambda x, label: jnp.concatenate([0 * x, 0 * x + 1], axis=-1), channels=4)

    def sample(solver):
        sampling = SamplingConfig(solver=solver, steps=5)
        images = make_sample(network, DDPM(), CODEC, sampling)({}, 3, jnp.arange(16), jnp.zeros(16, jnp.int32))
        return np.float64(images).reshape(16, -1)

    start = sample("ddim")
    added = sample("ddpm") - start
    levels = np.float64(respaced_levels(5, DDPM())) ** 2
    before, after = levels[:-2], levels[1:-1]
    np.testing.assert_allclose(start.var(), 1 + levels[0], rtol=0.05)
    np.testing.assert_allclose(added.var(), ((before - after) * (1 + after) / (1 + before)).sum(), rtol=0.05)
    # Of 1,024 independent numbers a correlation is 0 +- 0.031.
    correlations = np.corrcoef(np.concatenate([start, added])) - np.eye(32)
    assert abs(correlations).max() < 0.15


@pytest.mark.parametrize(("channels", "guided"), [(2, 2), (1, 1), (3, 3), (0, 3)])
def test_guidance_of_the_first_channels_alone(channels, guided):
    number = jnp.arange(1, 7, dtype=jnp.float32)[None, None, None]
    network = Fake(
        lambda x, label: jnp.broadcast_to(label[:, None, None, None] * number, (*x.shape[:3], 6)), 3, num_classes=4
    )
    label, weight = np.array([0, 2, 3]), 1.5
    output = make_output(network, DDPM(), {}, jnp.array(label), weight, channels)
    out = output(jnp.ones((3, 16, 16, 3)), jnp.float32(0.5))
    np.testing.assert_array_equal(np.concatenate(network.calls), [0, 2, 3, 4, 4, 4])
    of_channel = np.where(np.arange(6) < guided, (4 + weight * (label - 4))[:, None], label[:, None])
    expected = of_channel[:, None, None] * np.asarray(number)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, (3, 16, 16, 6)))

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_config
from tiny import jit

from sddit_jax.config.parts import make_network
from sddit_jax.config.schema import SamplingConfig
from sddit_jax.method.codec import LatentCodec, PixelCodec
from sddit_jax.method.diffusion import DDPM, EDM
from sddit_jax.sampling.guidance import make_denoise, make_output
from sddit_jax.sampling.sampler import make_sample, schedule
from sddit_jax.sampling.solvers import dpmpp_2m, euler, heun, noise_levels


def edm_levels(steps):
    return noise_levels(steps, 0.002, 80.0, 7.0)


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (18, [80, 57.5859847, 40.7855738, 28.3745846], [0.0229345184, 0.00752801996, 0.002, 0]),
        (40, [80, 69.450946, 60.1173948, 51.8803181], [0.00643711328, 0.00367658917, 0.002, 0]),
    ],
)
def test_noise_levels(steps, first, last):
    levels = edm_levels(steps)
    assert levels.dtype == np.float32
    assert len(levels) == steps + 1
    np.testing.assert_allclose([*levels[:4], *levels[-4:]], [*first, *last], rtol=2e-7)
    assert (np.diff(levels) < 0).all()


def test_one_step_denoises_pure_noise():
    np.testing.assert_array_equal(edm_levels(1), [80, 0])
    out = heun(lambda x, sigma: x / sigma, jnp.ones((1, 1, 1, 1)), edm_levels(1))
    np.testing.assert_allclose(out, 1, rtol=1e-7)


@pytest.mark.parametrize(("steps", "multiplier"), [(18, 0.527625), (40, 0.504877), (256, 0.500095)])
def test_a_fresh_network_multiplies_the_noise(steps, multiplier):
    diffusion, noise = EDM(), jnp.array([1.0, -2.0]).reshape(1, 1, 2, 1)

    def denoise(x, sigma):
        return diffusion.denoised(x, 0 * x, sigma[None])

    np.testing.assert_allclose(heun(denoise, noise, edm_levels(steps)), multiplier * noise, rtol=3e-6)


def test_heun_is_of_second_order():
    # Data N(0, v): the PF-ODE is solved by x = c (v + sigma^2)^(1/2), c = noise for sigma_max >> v^(1/2).
    variance, exact = 0.25, 80 * (0.25 / (0.25 + 80**2)) ** 0.5

    def error(steps):
        denoised = heun(lambda x, s: x * variance / (variance + s**2), jnp.ones((1, 1, 1, 1)), edm_levels(steps))
        return abs(float(denoised.squeeze()) - exact)

    errors = np.array([error(steps) for steps in (40, 80, 160)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert ((orders > 1.9) & (orders < 2.2)).all(), orders


class Recorder:
    """A network whose F is the label on every channel, and the labels of its calls."""

    def __init__(self, num_classes=4):
        self.model = SimpleNamespace(num_classes=num_classes)
        self.null_label = num_classes
        self.calls = []

    def __call__(self, params, x, c_noise, label):
        self.calls.append(np.asarray(label))
        channels = 1 + jnp.arange(x.shape[-1])[None, None, None]
        return jnp.broadcast_to(label[:, None, None, None] * channels, x.shape)


def recorded(guidance, num_classes=4):
    network = Recorder(num_classes)
    label = jnp.array([0, 2, 3])
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
    output = make_output(network, EDM(), {}, label, guidance)
    out = make_denoise(output, EDM())(x, jnp.float32(0.5))
    # At sigma 0.5: c_skip = 1/2, c_out = 0.125^(1/2).
    return network.calls, (out - 0.5 * x) / 0.125**0.5


@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_guidance_is_on_all_channels(guidance):
    calls, f = recorded(guidance)
    np.testing.assert_array_equal(np.concatenate(calls), [0, 2, 3, 4, 4, 4])
    guided = 4 + guidance * (np.array([0, 2, 3]) - 4)
    expected = guided[:, None, None, None] * np.arange(1, 5)[None, None, None]
    np.testing.assert_allclose(f, np.broadcast_to(expected, f.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("guidance", "num_classes"), [(1.0, 4), (3.0, 0)])
def test_without_guidance_or_classes_there_is_no_null_pass(guidance, num_classes):
    calls, f = recorded(guidance, num_classes)
    assert [list(call) for call in calls] == [[0, 2, 3]]
    np.testing.assert_allclose(f[1, 0, 0], [2, 4, 6, 8], rtol=1e-5)


@pytest.fixture(scope="module", params=["heun", "stochastic"])
def generate(request):
    """generate(indices, labels, seed=0) -> images as int32, from one compiled sampler per batch size."""
    network = make_network(tiny_config())
    params = random_params(network.init)
    sampling = SamplingConfig(solver=request.param, steps=3, guidance=1.5)
    sample = jit(make_sample(network, EDM(), PixelCodec((0.0,), (0.5,)), sampling))

    def generate(indices, labels, seed=0):
        return np.asarray(sample(params, seed, jnp.array(indices), jnp.array(labels)), np.int32)

    return generate


def test_an_image_is_a_function_of_seed_index_and_label(generate):
    alone = generate([5], [2])[0]
    assert alone.shape == (8, 8, 3)
    batches = [([7, 5, 0], [2, 2, 0], 1), ([5, 5, 1], [2, 1, 2], 0)]
    for indices, labels, position in batches:
        images = generate(indices, labels)
        for i, image in enumerate(images):
            different = abs(image - alone).max()
            assert different <= 1 if i == position else different > 10
    assert abs(generate([5], [2], seed=1)[0] - alone).max() > 10


class Smooth:
    """F = sin(x + c_noise)."""

    model = SimpleNamespace(image_size=4, channels=2, num_classes=0)
    null_label = 0

    def __call__(self, params, x, c_noise, label):
        return jnp.sin(x + c_noise[:, None, None, None])


def smooth_samples(**settings):
    codec = LatentCodec((0.0,), (1.0,))
    sample = jax.jit(make_sample(Smooth(), EDM(), codec, SamplingConfig(steps=9, **settings)))
    return np.asarray(sample({}, 3, jnp.arange(5), jnp.zeros(5, jnp.int32)))


def test_without_churn_stochastic_is_heun():
    expected = smooth_samples(solver="heun")
    np.testing.assert_array_equal(smooth_samples(solver="stochastic", s_churn=0.0), expected)
    # Nor is there any if no noise level is within its bounds.
    np.testing.assert_array_equal(smooth_samples(solver="stochastic", s_min=100.0, s_max=200.0), expected)
    assert abs(smooth_samples(solver="stochastic") - expected).max() > 0.1


def test_no_level_is_raised_above_what_ddpm_has():
    """Its last noise level is 157.4, which levels above 111.3 would pass."""
    told = []

    class Recording(DDPM):
        def network_input(self, x_BHWC, sigma_B):
            jax.debug.callback(lambda sigma: told.append(float(sigma)), sigma_B[0], ordered=True)
            return super().network_input(x_BHWC, sigma_B)

    def images(s_max):
        sampling = SamplingConfig(solver="stochastic", steps=20, s_churn=40.0, s_max=s_max)
        sample = jax.jit(make_sample(Smooth(), Recording(), LatentCodec((0.0,), (1.0,)), sampling))
        out = np.asarray(sample({}, 3, jnp.arange(5), jnp.zeros(5, jnp.int32)))
        jax.effects_barrier()
        return out

    assert np.isfinite(images(1000.0)).all()
    levels = np.float64(schedule(DDPM(), SamplingConfig(solver="stochastic", steps=20)))
    assert levels[1] * 2**0.5 > levels[0]
    raised = np.minimum(levels[:-1] * 2**0.5, levels[0])
    raised[levels[:-1] < 0.05] = levels[:-1][levels[:-1] < 0.05]
    np.testing.assert_allclose(told, [s for pair in zip(raised, levels[1:], strict=True) for s in pair][:-1], rtol=1e-6)


def test_each_solver_goes_through_the_levels_that_are_set():
    sampling = SamplingConfig(steps=4, sigma_min=0.1, sigma_max=30.0, rho=3.0)
    levels = schedule(EDM(), sampling)
    np.testing.assert_array_equal(levels, noise_levels(4, 0.1, 30.0, 3.0))
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (4, 4, 2)))(jnp.arange(5))
    denoise = make_denoise(make_output(Smooth(), EDM(), {}, jnp.zeros(5, jnp.int32), 1.0), EDM())
    for solve in (heun, euler, dpmpp_2m):
        sample = make_sample(
            Smooth(), EDM(), LatentCodec((0.0,), (1.0,)), dataclasses.replace(sampling, solver=solve.__name__)
        )
        out = jax.jit(sample)({}, 3, jnp.arange(5), jnp.zeros(5, jnp.int32))
        np.testing.assert_allclose(out, jax.jit(lambda z, s=solve: s(denoise, z, levels))(noise), rtol=1e-5, atol=1e-5)

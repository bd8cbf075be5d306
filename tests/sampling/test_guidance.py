"""Guidance within an interval of noise levels, and by a weaker network."""

import operator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import products, random_params, tiny_config

from sddit_jax.config.checks import check_guide
from sddit_jax.config.parts import make_network
from sddit_jax.config.schema import SamplingConfig
from sddit_jax.errors import UserError
from sddit_jax.method.codec import LatentCodec
from sddit_jax.method.diffusion import DDPM, EDM
from sddit_jax.sampling import solvers
from sddit_jax.sampling.guidance import Piecewise, make_denoise, make_guided, make_output
from sddit_jax.sampling.sampler import make_sample, schedule

CODEC = LatentCodec((0.0,), (1.0,))
LABELS = np.array([0, 2, 3], np.int32)
INDICES = np.arange(3, dtype=np.int32)
WEAKER = {"model.width": 16, "model.depth": 1}


class Counting:
    """F = tanh(x p) + label / 10, and the rows of each call as it is executed, within a loop too."""

    def __init__(self, num_classes=4):
        self.model = SimpleNamespace(image_size=4, channels=2, num_classes=num_classes)
        self.null_label = num_classes
        self.rows = []

    def __call__(self, params, x, c_noise, label):
        jax.debug.callback(lambda rows: self.rows.append(int(rows)), x.shape[0], ordered=True)
        return jnp.tanh(params * x) + label[:, None, None, None] / 10


def run(network, sampling, params=0.7, guide=None, diffusion=None):
    sample = jax.jit(make_sample(network, diffusion or EDM(), CODEC, sampling, guide))
    out = np.asarray(sample(params, 3, INDICES, LABELS))
    jax.effects_barrier()
    return out


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def passes(sampling, diffusion):
    """The noise levels of the calls of the network, in order, counted by hand from each solver's definition."""
    levels = schedule(diffusion, sampling)
    here = levels[:-1]
    if sampling.solver == "stochastic":
        here = solvers.churned_levels(levels, sampling.s_churn, sampling.s_min, sampling.s_max)
    if sampling.solver not in ("heun", "stochastic"):
        return list(here)
    return [s for pair in zip(here[:-1], levels[1:-1], strict=True) for s in pair] + [here[-1]]


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.3, 5.0), (0.0, 1.0), (1.0, 0.0), (90.0, 95.0)])
@pytest.mark.parametrize("solver", ["heun", "euler", "stochastic", "dpmpp_2m", "ddim", "ddpm"])
def test_the_null_label_is_passed_within_the_interval_alone(solver, interval):
    diffusion = DDPM() if solver in ("ddim", "ddpm") else EDM()
    sampling = SamplingConfig(solver=solver, steps=12, guidance=1.5, guidance_interval=interval)
    network = Counting()
    run(network, sampling, diffusion=diffusion)
    low, high = interval[0], interval[1] or np.inf
    assert network.rows == [6 if low < sigma <= high else 3 for sigma in passes(sampling, diffusion)]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["heun", "euler", "stochastic", "dpmpp_2m"])
def test_the_program_has_the_products_of_the_passes_that_count(solver, guidance):
    """Of a real network, in the program before it is compiled, to the last operation: by null label, and by a guide."""
    sampling = SamplingConfig(solver=solver, steps=12, guidance=guidance, guidance_interval=(0.3, 5.0))
    network, guide = (
        make_network(tiny_config()),
        make_network(tiny_config("dit", {"model.width": 16, "model.depth": 1})),
    )
    params, weaker = jax.eval_shape(network.init, jax.random.key(0)), jax.eval_shape(guide.init, jax.random.key(0))
    label = jnp.zeros(3, jnp.int32)

    def counted(f, *arguments):
        return products(jax.make_jaxpr(f)(*arguments).jaxpr)

    image = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label[:1]
    own, other = counted(network, params, *image), counted(guide, weaker, *image)
    levels = passes(sampling, EDM())
    guided = sum(0.3 < sigma <= 5 for sigma in levels) if guidance != 1 else 0
    by_label = make_sample(network, EDM(), CODEC, sampling)
    assert counted(by_label, params, 3, label, label) == 3 * (len(levels) + guided) * own
    by_guide = make_sample(network, EDM(), CODEC, sampling, guide)
    assert counted(by_guide, (params, weaker), 3, label, label) == 3 * (len(levels) * own + guided * other)


def scans(jaxpr):
    """The number of steps of each loop of a jaxpr, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        else:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                found += scans(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("solver", "interval", "loops"),
    [
        # Of the noise levels 80, 42.4, 21.1, 9.72, 4.07, 1.50, 0.470, 0.117, 0.0204 and 0.002 three are in (0.3, 5];
        # a step of Heun's method with an end in and an end out is a loop of its own.
        ("euler", (0.3, 5.0), [4, 3, 3]),
        ("dpmpp_2m", (0.3, 0.0), [7, 3]),
        ("heun", (0.3, 5.0), [3, 1, 2, 1, 2]),
        ("heun", (0.0, 5.0), [3, 1, 5]),
        ("heun", (90.0, 95.0), [9]),
        ("heun", (0.0, 0.0), [9]),
    ],
)
def test_an_interval_costs_a_loop_for_each_run_of_steps(solver, interval, loops):
    sampling = SamplingConfig(solver=solver, steps=10, guidance=1.5, guidance_interval=interval)
    network = SimpleNamespace(image_size=4, channels=2, num_classes=4)

    def call(params, x, c_noise, label):
        return params * x

    call.model, call.null_label = network, 4
    sample = make_sample(call, EDM(), CODEC, sampling)
    assert scans(jax.make_jaxpr(sample)(0.7, 3, INDICES, LABELS).jaxpr) == loops


@pytest.mark.parametrize("solver", ["heun", "euler", "stochastic", "dpmpp_2m"])
def test_an_interval_is_what_a_mask_would_compute(solver):
    network, params = Counting(), 0.7
    sampling = SamplingConfig(solver=solver, steps=8, guidance=3.0, guidance_interval=(0.3, 5.0))
    noise = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    levels = schedule(EDM(), sampling)
    raised = solvers.churned_levels(levels, 3.0, 0.05, 50.0)

    def solve(denoise):
        if solver == "stochastic":
            return solvers.stochastic(denoise, noise, levels, raised, 1.003, lambda i: jnp.sin(noise * (1.0 + i)))
        return getattr(solvers, solver)(denoise, noise, levels)

    def denoise(params, guidance):
        return make_denoise(make_output(network, EDM(), params, jnp.asarray(LABELS), guidance), EDM())

    @jax.jit
    def piecewise(params):
        output = make_guided(network, EDM(), params, jnp.asarray(LABELS), 3.0, (0.3, 5.0))
        return solve(make_denoise(output, EDM()))

    @jax.jit
    def masked(params):
        inside, outside = denoise(params, 3.0), denoise(params, 1.0)
        return solve(lambda x, s: jnp.where((s > 0.3) & (s <= 5.0), inside(x, s), outside(x, s)))

    within, expected = piecewise(params), masked(params)
    assert relative_error(within, expected) <= 1e-6
    everywhere = jax.jit(lambda params: solve(denoise(params, 3.0)))(params)
    assert relative_error(within, everywhere) > 1e-3


def test_an_interval_leaves_out_its_low_end_and_has_its_high_one():
    inside, outside = (lambda x, sigma: x), (lambda x, sigma: -x)
    # 0.3 and 80.1 are no float32: a noise level that is rounded from one of them is that end.
    piecewise = Piecewise(inside, outside, 0.3, 80.1)
    assert piecewise.at(np.float32(0.3)) is outside
    assert piecewise.at(np.nextafter(np.float32(0.3), np.float32(1))) is inside
    assert piecewise.at(np.float32(80.1)) is inside
    assert piecewise.at(np.nextafter(np.float32(80.1), np.float32(100))) is outside


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.7, 3.0])
@pytest.mark.parametrize("channels", [0, 1])
def test_autoguidance_moves_away_from_the_weaker_network(guidance, channels):
    """Karras et al. 2024, Eq. 3: D_w(x) = w D_1(x) + (1 - w) D_0(x), both for the same label."""
    network, guide = Counting(), Counting()
    x, sigma = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), jnp.float32(0.5)
    label = jnp.asarray(LABELS)
    plain = [make_denoise(make_output(network, EDM(), p, label, 1.0), EDM())(x, sigma) for p in (0.7, 0.4)]
    worse = make_output(guide, EDM(), 0.4, label, 1.0)
    guided = make_denoise(make_output(network, EDM(), 0.7, label, guidance, channels, worse), EDM())(x, sigma)
    expected = guidance * np.float64(plain[0]) + (1 - guidance) * np.float64(plain[1])
    if channels:
        expected[..., channels:] = plain[0][..., channels:]
    np.testing.assert_allclose(guided, expected, rtol=0, atol=1e-6)
    jax.effects_barrier()
    # The null label is never asked for.
    assert network.rows == [3] * 3
    assert guide.rows == [3]


@pytest.mark.parametrize(("own", "other"), [(True, False), (False, True)])
def test_a_learnt_variance_is_the_networks_own(own, other):
    """With or without one the guide moves the mean, and what is behind the mean stays as it is."""

    class Learnt(Counting):
        def __init__(self, learnt):
            super().__init__()
            self.learnt = learnt

        def __call__(self, params, x, c_noise, label):
            mean = super().__call__(params, x, c_noise, label)
            return jnp.concatenate([mean, jnp.cos(mean)], axis=-1) if self.learnt else mean

    x, sigma, label = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), jnp.float32(0.5), jnp.asarray(LABELS)
    network, guide = Learnt(own), Learnt(other)
    worse = make_output(guide, DDPM(), 0.4, label, 1.0)
    out = np.float64(make_output(network, DDPM(), 0.7, label, 2.0, 0, worse)(x, sigma))
    plain = np.float64(make_output(network, DDPM(), 0.7, label, 1.0)(x, sigma))
    weak = np.float64(worse(x, sigma))[..., :2]
    assert out.shape == (3, 4, 4, 4 if own else 2)
    np.testing.assert_allclose(out[..., :2], 2 * plain[..., :2] - weak, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out[..., 2:], plain[..., 2:])
    for solver in ("ddpm", "ddim"):
        assert np.isfinite(
            run(network, SamplingConfig(solver=solver, steps=4, guidance=2.0), (0.7, 0.4), guide, DDPM())
        ).all()


@pytest.mark.parametrize("num_classes", [0, 4])
def test_samples_by_a_weaker_network(num_classes):
    sampling = SamplingConfig(steps=6, guidance=2.0, guidance_interval=(0.3, 5.0))
    network, guide = Counting(num_classes), Counting(num_classes)
    guided = run(network, sampling, (0.7, 0.4), guide)
    levels = passes(sampling, EDM())
    inside = sum(0.3 < sigma <= 5 for sigma in levels)
    assert 0 < inside < len(levels)
    assert network.rows == [3] * len(levels)
    assert guide.rows == [3] * inside
    plain, weak = (run(Counting(num_classes), SamplingConfig(steps=6), p) for p in (0.7, 0.4))
    assert relative_error(guided, plain) > 1e-2
    # Guided by itself a network is as it is, and with a guidance of 0 only the guide speaks.
    itself = run(network, sampling, (0.7, 0.7), guide)
    assert relative_error(itself, plain) <= 1e-6
    instead = run(network, SamplingConfig(steps=6, guidance=0.0), (0.7, 0.4), guide)
    assert relative_error(instead, weak) <= 1e-6


def test_a_smaller_network_of_another_method_guides():
    network, guide = (
        make_network(tiny_config()),
        make_network(tiny_config("dit", {"model.width": 16, "model.depth": 1})),
    )
    check_guide(tiny_config(), tiny_config("dit", WEAKER))
    params = random_params(network.init), random_params(guide.init)
    out = run(network, SamplingConfig(steps=4, guidance=2.0), params, guide)
    plain = run(network, SamplingConfig(steps=4), params[0])
    assert np.isfinite(out).all()
    assert relative_error(out, plain) > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.image_size", 16),
        ("model.channels", 4),
        ("model.num_classes", 5),
        ("diffusion.name", "ddpm"),
        ("diffusion.edm.sigma_data", 0.7),
        ("codec.name", "latents"),
        ("codec.scale", (0.3,)),
    ],
)
def test_what_cannot_guide_is_said(key, value):
    config = tiny_config()
    with pytest.raises(UserError) as error:
        check_guide(
            config, tiny_config("sd_dit", {key: value} | ({"data.source": "latents:x"} if value == "latents" else {}))
        )
    said = {"diffusion.name": "diffusion ('DDPM', None)", "diffusion.edm.sigma_data": "diffusion ('EDM', 0.7)"}
    own = "('EDM', 0.5)" if key in said else operator.attrgetter(key)(config)
    expected = f"the guide has {said.get(key, f'{key} {value}')}, but the network to guide has {own}"
    assert expected in str(error.value)

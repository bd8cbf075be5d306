"""Guidance in an interval of noise levels, and by another network: what is computed, and at what cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, products, random_params, tiny_config

from sddit_jax.codec import LatentCodec
from sddit_jax.diffusion import DDPM, EDM
from sddit_jax.errors import ConfigError, UserError
from sddit_jax.models.transformer import Network
from sddit_jax.sampling import solvers
from sddit_jax.sampling.guidance import check_guide, make_denoise, make_output
from sddit_jax.sampling.sampler import make_sample, schedule
from sddit_jax.schema import Sampling

CODEC = LatentCodec((0.0,), (1.0,))
NETWORK = Network(tiny_config())
PARAMS = random_params(NETWORK.init)
INDEX, LABEL = jnp.arange(5), jnp.array([0, 1, 2, 3, 1])
STEPS, INTERVAL = 8, (0.1, 5.0)


def setting(solver, **changes):
    return Sampling(solver=solver, steps=STEPS, s_churn=4.0, guidance=3.0, **changes)


def draw(sampling, network=NETWORK, params=PARAMS, guide=None, diffusion=None):
    diffusion = diffusion or EDM()
    return np.float64(jax.jit(make_sample(network, diffusion, CODEC, sampling, guide))(params, 3, INDEX, LABEL))


def evaluations(solver, diffusion):
    """Noise levels of a sampler's calls of the network."""
    sampling = setting(solver)
    sigmas = schedule(diffusion, sampling)
    if solver in ("heun", "stochastic"):
        s_churn = sampling.s_churn if solver == "stochastic" else 0.0
        first = solvers.churned_levels(sigmas, s_churn, sampling.s_min, sampling.s_max)
        return np.concatenate([first, sigmas[1:-1]])
    return sigmas[:-1]


def masked(solver):
    """The sampler that guides everywhere and then picks, by noise level, the guided or the unguided answer."""
    sampling, diffusion = setting(solver), EDM()
    sigmas = schedule(diffusion, sampling)
    raised = solvers.churned_levels(sigmas, sampling.s_churn, sampling.s_min, sampling.s_max)

    def sample(params, seed, index, label):
        key = jax.random.key(seed)
        shape = (8, 8, 3)

        def normal(key):
            return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)

        def step_noise(i):
            return normal(jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), i))

        guided, plain = (make_denoise(make_output(NETWORK, diffusion, params, label, w), diffusion) for w in (3.0, 1.0))

        def denoise(x, sigma):
            inside = (sigma > INTERVAL[0]) & (sigma <= INTERVAL[1])
            return jnp.where(inside, guided(x, sigma), plain(x, sigma))

        if solver == "stochastic":
            return solvers.stochastic(denoise, normal(key), sigmas, raised, sampling.s_noise, step_noise)
        return getattr(solvers, solver)(denoise, normal(key), sigmas)

    return np.float64(jax.jit(sample)(PARAMS, 3, INDEX, LABEL))


@pytest.mark.parametrize("solver", ["heun", "euler", "stochastic", "dpmpp_2m"])
def test_an_interval_is_what_masking_gives(solver):
    levels = evaluations(solver, EDM())
    inside = (levels > INTERVAL[0]) & (levels <= INTERVAL[1])
    assert 0 < inside.sum() < len(inside)
    images = draw(setting(solver, guidance_interval=INTERVAL))
    expected = masked(solver)
    assert np.linalg.norm(images - expected) <= 1e-5 * np.linalg.norm(expected)
    for other in (draw(setting(solver)), draw(dataclasses.replace(setting(solver), guidance=1.0))):
        assert np.linalg.norm(images - other) > 1e-2 * np.linalg.norm(expected)


def row_passes(sampling, diffusion, guide=None):
    """Passes of an image through the network and through the guide, from the products in the program."""
    config = tiny_config(changes={"diffusion.name": "ddpm"} if diffusion == DDPM() else None)
    network, params = Network(config), PARAMS

    def pass_of(network, params):
        one = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        return products(jax.make_jaxpr(lambda *a: network(params, *a))(*one).jaxpr)

    sample = make_sample(network, diffusion, CODEC, sampling, guide)
    own = pass_of(network, params)
    if guide:
        weaker = random_params(guide.init)
        counted = products(jax.make_jaxpr(sample)((params, weaker), 3, INDEX, LABEL).jaxpr)
        return counted / len(INDEX), own, pass_of(guide, weaker)
    return products(jax.make_jaxpr(sample)(params, 3, INDEX, LABEL).jaxpr) / len(INDEX), own


@pytest.mark.parametrize("solver", ["heun", "euler", "stochastic", "dpmpp_2m", "ddim", "ddpm"])
@pytest.mark.parametrize("interval", [(0.0, 0.0), INTERVAL, (0.0, 5.0), (5.0, 0.0), (0.0, 0.001), (1000.0, 0.0)])
def test_outside_the_interval_the_null_label_costs_nothing(solver, interval):
    diffusion = DDPM() if solver in ("ddim", "ddpm") else EDM()
    levels = evaluations(solver, diffusion)
    guided = (levels > interval[0]) & (levels <= (interval[1] or np.inf))
    counted, one = row_passes(setting(solver, guidance_interval=interval), diffusion)
    assert counted == (len(levels) + guided.sum()) * one
    # Nothing is guided, so nothing is split either.
    unguided, _ = row_passes(dataclasses.replace(setting(solver), guidance=1.0, guidance_interval=interval), diffusion)
    assert unguided == len(levels) * one


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp_2m"])
def test_the_loops_are_as_many_as_the_runs_of_steps(solver):
    def loops(**changes):
        sample = make_sample(NETWORK, EDM(), CODEC, setting(solver, **changes))
        jaxpr = jax.make_jaxpr(sample)(PARAMS, 3, INDEX, LABEL).jaxpr
        return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]

    in_loop = STEPS - (solver == "heun")
    assert loops() == [in_loop]
    assert loops(guidance_interval=(0.001, 100.0)) == [in_loop]
    parts = loops(guidance_interval=INTERVAL)
    assert sum(parts) == in_loop
    # The two steps of Heun that cross a border are loops of their own.
    assert len(parts) == (5 if solver == "heun" else 3)


def test_the_ends_of_the_interval():
    """low < sigma <= high."""
    levels = schedule(EDM(), setting("euler"))[:-1]
    counted, one = row_passes(setting("euler", guidance_interval=(float(levels[5]), float(levels[2]))), EDM())
    assert counted == (STEPS + 3) * one


@pytest.mark.parametrize("solver", ["heun", "stochastic", "dpmpp_2m"])
def test_an_image_is_a_function_of_seed_index_and_label(solver):
    sample = jax.jit(make_sample(NETWORK, EDM(), CODEC, setting(solver, guidance_interval=INTERVAL)))

    def one(index, label, position, seed=0):
        return np.float64(sample(PARAMS, seed, jnp.array(index), jnp.array(label))[position])

    alone = one([5], [2], 0)
    scale = np.linalg.norm(alone)
    assert np.linalg.norm(one([7, 5, 0], [2, 2, 0], 1) - alone) <= 1e-4 * scale
    assert np.linalg.norm(one([7, 5, 0], [2, 2, 0], 0) - alone) > 0.05 * scale
    assert np.linalg.norm(one([5], [2], 0, seed=1) - alone) > 0.05 * scale


def test_stochastic_without_churn_is_heun_bit_for_bit():
    heun = draw(setting("heun"))
    np.testing.assert_array_equal(draw(dataclasses.replace(setting("stochastic"), s_churn=0.0)), heun)
    # All levels lie outside.
    np.testing.assert_array_equal(draw(setting("stochastic", s_min=81.0, s_max=90.0)), heun)
    assert np.linalg.norm(draw(setting("stochastic")) - heun) > 0.05 * np.linalg.norm(heun)


def test_noise_levels_of_the_samples_own():
    sampling = Sampling(steps=5, sigma_min=0.01, sigma_max=20.0, rho=3.0)
    levels = schedule(EDM(), sampling)
    np.testing.assert_allclose(levels[[0, -2, -1]], [20, 0.01, 0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 3), 2), 0, atol=1e-5)
    np.testing.assert_array_equal(schedule(EDM(), Sampling(steps=5)), solvers.noise_levels(5, 0.002, 80.0, 7.0))


class TestAutoguidance:
    GUIDE = Network(tiny_config("dit", {"model.width": 16, "model.depth": 1, "model.patch": 4}))
    WEAKER = random_params(GUIDE.init)
    BOTH = (PARAMS, WEAKER)

    def denoisers(self, weight):
        """D of the network, of the guide, and guided."""
        diffusion = EDM()
        own, weaker = (
            make_output(n, diffusion, p, LABEL, 1.0) for n, p in ((NETWORK, PARAMS), (self.GUIDE, self.WEAKER))
        )
        guided = make_output(NETWORK, diffusion, PARAMS, LABEL, weight, guide=weaker)
        x = jax.random.normal(jax.random.key(1), (5, 8, 8, 3))
        return [np.float64(make_denoise(f, diffusion)(x, jnp.float32(0.7))) for f in (own, weaker, guided)]

    @pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 3.5])
    def test_is_the_formula(self, weight):
        own, weaker, guided = self.denoisers(weight)
        assert np.linalg.norm(own - weaker) > 0.1 * np.linalg.norm(own)
        expected = weaker + weight * (own - weaker)
        assert np.linalg.norm(guided - expected) <= 1e-6 * np.linalg.norm(expected)

    @pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
    def test_weight_1_is_no_guidance(self, solver):
        sampling = dataclasses.replace(setting(solver), guidance=1.0)
        np.testing.assert_array_equal(draw(sampling, params=self.BOTH, guide=self.GUIDE), draw(sampling))

    def test_a_network_guided_by_itself_is_not_guided(self):
        guided = draw(setting("heun"), params=(PARAMS, PARAMS), guide=NETWORK)
        plain = draw(dataclasses.replace(setting("heun"), guidance=1.0))
        assert np.linalg.norm(guided - plain) <= 1e-4 * np.linalg.norm(plain)

    def test_samples_are_those_of_the_guided_denoiser(self):
        sampling = setting("euler")

        def denoise(x, sigma):
            own, weaker = (
                make_denoise(make_output(n, EDM(), p, LABEL, 1.0), EDM())(x, sigma)
                for n, p in ((NETWORK, PARAMS), (self.GUIDE, self.WEAKER))
            )
            return weaker + 3.0 * (own - weaker)

        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (8, 8, 3)))(INDEX)
        expected = np.float64(solvers.euler(denoise, noise, schedule(EDM(), sampling)))
        guided = draw(sampling, params=self.BOTH, guide=self.GUIDE)
        assert np.linalg.norm(guided - expected) <= 1e-5 * np.linalg.norm(expected)

    @pytest.mark.parametrize("interval", [(0.0, 0.0), INTERVAL])
    def test_the_guide_is_computed_in_the_interval_alone(self, interval):
        levels = evaluations("heun", EDM())
        guided = (levels > interval[0]) & (levels <= (interval[1] or np.inf))
        counted, own, weaker = row_passes(setting("heun", guidance_interval=interval), EDM(), self.GUIDE)
        assert counted == len(levels) * own + guided.sum() * weaker

    def test_of_a_learnt_variance_the_guide_needs_none(self):
        own = Network(tiny_config(changes={"diffusion.name": "ddpm", "model.learn_sigma": True}))
        params = random_params(own.init)
        guide = Network(tiny_config(changes={"diffusion.name": "ddpm"}))
        x, sigma = jax.random.normal(jax.random.key(0), (5, 8, 8, 3)), jnp.float32(2.0)
        plain = make_output(own, DDPM(), params, LABEL, 1.0)
        weaker = make_output(guide, DDPM(), PARAMS, LABEL, 1.0)
        guided = make_output(own, DDPM(), params, LABEL, 2.0, guide=weaker)(x, sigma)
        assert guided.shape == (5, 8, 8, 6)
        np.testing.assert_array_equal(guided[..., 3:], plain(x, sigma)[..., 3:])
        expected = 2 * plain(x, sigma)[..., :3] - weaker(x, sigma)
        np.testing.assert_allclose(guided[..., :3], expected, rtol=1e-4, atol=1e-5)

    def test_what_may_differ(self):
        check_guide(
            tiny_config(), tiny_config("dit", {"model.width": 16, "model.patch": 4, "diffusion.log_sigma_mean": -0.4})
        )

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("model.image_size", 16, "model.image_size 16, .* 8"),
            ("model.channels", 1, "model.channels 1, .* 3"),
            ("model.num_classes", 7, "model.num_classes 7, .* 4"),
            ("diffusion.name", "ddpm", "diffusion.name ddpm, .* edm"),
            ("diffusion.sigma_data", 1.0, r"diffusion.sigma_data 1\.0, .* 0\.5"),
            ("codec.name", "latents", "codec.name latents, .* pixels"),
            ("codec.scale", (1.0,), r"codec.scale \(1\.0,\), .* \(0\.5,\)"),
        ],
    )
    def test_what_may_not(self, key, value, words):
        with pytest.raises(UserError, match=words):
            check_guide(tiny_config(), tiny_config(changes={key: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling.guidance_interval": (2.0, 1.0)}, r"guidance_interval is \(2\.0, 1\.0\)"),
        ({"sampling.guidance_interval": (1.0, 1.0)}, r"guidance_interval is \(1\.0, 1\.0\)"),
        ({"sampling.sigma_min": 90.0}, r"from noise level 80\.0 .* to 90\.0"),
        ({"sampling.sigma_max": 0.001}, r"from noise level 0\.001 .* to 0\.002"),
        ({"sampling.sigma_min": 2.0, "sampling.sigma_max": 1.0}, r"from noise level 1\.0 .* to 2\.0"),
        ({"diffusion.name": "ddpm", "sampling.sigma_max": 100.0}, r"sampling\.sigma_max 100\.0, but diffusion\.name"),
        ({"sampling.solver": "stochastic", "sampling.s_min": 60.0}, r"s_max 50\.0 is below sampling\.s_min 60\.0"),
        ({"sampling.solver": "ddim"}, "set heun, euler, stochastic or dpmpp_2m"),
        ({"sampling.guidance": 2.0, "model.num_classes": 0}, "trained null label"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_config("sd_dit", changes)

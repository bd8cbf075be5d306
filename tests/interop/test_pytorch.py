"""The PyTorch network against the Flax one: the same weights and inputs, in the same numbers."""

import dataclasses
import fcntl
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import denoise, make_config, random_params, tiny_config
from tiny import CONDITION, draw_batch, float64, jit, make_batch, noised_state, smallest_config, tiny_parts
from twin import make_teacher, make_twin, namespaces, to_numpy, to_torch, twin_arrays

from sddit_jax.config.parts import make_network
from sddit_jax.config.presets import METHODS
from sddit_jax.config.sizes import parse_size
from sddit_jax.interop import pytorch
from sddit_jax.interop.state_dict import from_state_dict, to_state_dict
from sddit_jax.method.diffusions import make_diffusion
from sddit_jax.method.train_step import draw, gradients_of, make_train_step
from sddit_jax.models.masking import sample_mask
from sddit_jax.sampling.guidance import make_denoise, make_guided, make_output
from sddit_jax.sampling.sampler import schedule
from sddit_jax.sampling.solvers import heun, noise_levels

DIT = {"model.learn_sigma": True, "model.null_label": "row", "diffusion.name": "ddpm"}


def random_network(config, scale=0.02):
    """Network and parameters of which every output depends."""
    network = make_network(config)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda leaf: scale * rng.standard_normal(leaf.shape, np.float32), shapes)


def random_inputs(config, batch=2):
    m, rng = config.model, np.random.default_rng(4)
    x_BHWC = rng.standard_normal((batch, m.image_size, m.image_size, m.channels), np.float32)
    sigma_B = np.geomspace(0.05, 5.0, batch, dtype=np.float32)
    label_B = np.array([*rng.integers(0, max(m.num_classes, 1), batch - 1), m.num_classes], np.int32)
    return x_BHWC, sigma_B, label_B


def assert_same_network(config, bound):
    """D plain, guided (on all and on some channels) and masked, of both networks."""
    network, params = random_network(config)
    diffusion = make_diffusion(config.diffusion)
    twin = make_twin(config, params)
    x_BHWC, sigma_B, label_B = random_inputs(config)
    tensors = [to_torch(a) for a in (x_BHWC, sigma_B, label_B)]

    @jit
    def denoised(params, mask):
        def f(x, c_noise):
            return network.predict(params, network.encode(params, x, c_noise, label_B, mask), mask)

        return denoise(diffusion, f, x_BHWC, sigma_B)

    def assert_close(ours, theirs):
        assert np.abs(ours).max() > 0.1
        np.testing.assert_allclose(to_numpy(theirs), ours, rtol=0, atol=bound)

    with torch.no_grad():
        assert_close(denoised(params, None), twin(*tensors))
        if config.model.num_classes:
            sigma = jnp.float32(0.7)
            for channels in (0, 1):

                @jit
                def guided(params, channels=channels):
                    output = make_output(network, diffusion, params, label_B, 1.5, channels)
                    return make_denoise(output, diffusion)(x_BHWC, sigma)

                theirs = twin.guided(tensors[0], torch.full((2,), 0.7), tensors[2], 1.5, channels)
                assert_close(guided(params), theirs)
        if config.model.decoder_depth:
            mask = sample_mask(jax.random.key(1), 2, network.model.tokens, config.masking.ratio or 0.3)
            assert_close(denoised(params, mask), twin(*tensors, to_torch(mask.visible_BV)))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in METHODS),
        ("dit", DIT),
        ("maskdit", {"masking.fill": "zeros"}),
        ("maskdit", {"model.num_classes": 0}),
        ("sd_dit", {"model.scan": False, "model.null_label": "row", "model.mlp_ratio": 2.5}),
    ],
)
def test_the_same_network(method, changes):
    assert_same_network(tiny_config(method, changes), 5e-6)


@pytest.fixture
def much_memory():
    """For a test that takes up to 15 GB: of pytest's workers one at a time runs such a test."""
    with open(Path(tempfile.gettempdir()) / "sddit_jax_tests_much_memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("size", ["S/2", "S/8", "B/4", "L/8", "XL/2", "H/8"])
@pytest.mark.parametrize(("method", "changes"), [("maskdit", {}), ("dit", DIT)])
def test_the_same_network_at_published_sizes(size, method, changes):
    model = {f"model.{key}": value for key, value in parse_size(size).items()}
    assert_same_network(make_config(method, model | changes), 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_the_same_network_at_512_pixels():
    model = {f"model.{key}": value for key, value in parse_size("S/2").items()}
    assert_same_network(make_config("sd_dit", model | {"model.image_size": 64}), 1e-4)


def test_a_tree_comes_back_from_the_state_dict_bit_for_bit():
    for method in METHODS:
        network, params = random_network(tiny_config(method))
        jax.tree.map(np.testing.assert_array_equal, params, from_state_dict(to_state_dict(params, network), network))


def test_bfloat16_is_as_near_to_float32_as_in_flax():
    config = tiny_config("sd_dit")
    network, params = random_network(config, scale=0.1)
    x_BHWC, sigma_B, label_B = random_inputs(config, batch=8)
    diffusion = make_diffusion(config.diffusion)
    exact = denoise(diffusion, lambda x, c: network(params, x, c, jnp.asarray(label_B)), x_BHWC, sigma_B)
    low = make_network(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")))
    flax = denoise(diffusion, lambda x, c: low(params, x, c, jnp.asarray(label_B)), x_BHWC, sigma_B)
    twin = pytorch.cast(make_twin(config, params), torch.bfloat16)
    with torch.no_grad():
        theirs = twin(*map(to_torch, (x_BHWC, sigma_B, label_B)))
    assert theirs.dtype == torch.float32
    assert twin.encoder.time.out.weight.dtype == twin.encoder.label.table.dtype == torch.float32
    error_flax, error_twin = (np.linalg.norm(d - exact) for d in (flax, to_numpy(theirs)))
    assert 0 < error_twin < 1.5 * error_flax < 0.05 * np.linalg.norm(exact)


def drawn_tensors(drawn):
    """x0, eps, sigma and label as PyTorch takes them."""
    return [to_torch(x) for x in (drawn.x0_BHWC, drawn.eps_BHWC, drawn.sigma_B, drawn.label_B)]


def step_in_both(method, changes):
    """One training step: (metrics, gradients, parameters after it) of ours, and (losses, network) of PyTorch's."""
    parts = tiny_parts(method, {"optimizer.learning_rate": 1e-4} | changes)
    state, batch = noised_state(parts), make_batch(parts)
    if jax.config.jax_enable_x64:
        state = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, state)
    key = jax.random.fold_in(jax.random.key(parts.seed), state["step"])
    drawn = jit(lambda batch: draw(key, parts, parts.codec.encode(batch["image"]), batch))(batch)
    gradients, _, _ = jit(lambda state, drawn: gradients_of(parts, state, drawn))(state, drawn)
    after, metrics = jit(make_train_step(parts))(state, batch)

    config = smallest_config(method, {"optimizer.learning_rate": 1e-4} | changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    twin = make_twin(config, state["params"])
    teacher = None
    if "discrimination" in state["aux"]:
        teacher = make_teacher(config, state["params"], state["aux"]["discrimination"])
    tensors = drawn_tensors(drawn)
    visible = None if drawn.mask is None else to_torch(drawn.mask.visible_BV)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, weight_decay=0)
    losses = pytorch.training_losses(twin, *tensors, visible, teacher)
    losses["total"].backward()
    optimizer.step()
    ours = twin_arrays(config, gradients), twin_arrays(config, after["params"])
    return (metrics, *ours), ({name: float(loss.detach()) for name, loss in losses.items()}, twin)


STEPS = [*((method, {}) for method in METHODS), ("sd_dit", CONDITION), ("maskdit", {"masking.fill": "zeros"})]


def all_but(fast):
    """STEPS, of which all but those of the `fast` methods as they are take long."""
    return [pytest.param(*step, marks=() if step in [(m, {}) for m in fast] else pytest.mark.slow) for step in STEPS]


@pytest.mark.parametrize(("method", "changes"), all_but(["sd_dit"]))
def test_a_training_step_has_the_same_losses_and_gradients(method, changes):
    """In float32; and of AdamW's step what is not rounding.

    AdamW moves an element by lr g / (|g| + 1e-8): where the gradient is rounding noise, such as a key's bias, whose
    gradient is exactly zero, the step is noise too. The whole of it is compared in float64, below.
    """
    (metrics, gradients, after), (losses, twin) = step_in_both(method, changes)
    for name, loss in losses.items():
        key = "train/loss" if name == "total" else f"train/{name}"
        np.testing.assert_allclose(loss, float(metrics[key]), rtol=1e-5)
    assert len(losses) == 1 + sum(key.startswith(("train/d", "train/r")) for key in metrics)
    for name, parameter in twin.named_parameters():
        gradient = parameter.grad.numpy()
        assert np.linalg.norm(gradient - gradients[name]) <= 1e-4 * np.linalg.norm(gradients[name]), name
        clear = np.abs(gradient) > 1e-7
        if name.endswith("qkv.bias"):
            # The keys' share is 0 here, and in PyTorch noise of whatever size.
            assert not np.split(gradients[name], 3)[1].any()
            np.split(clear, 3)[1][:] = False
        np.testing.assert_allclose(parameter.detach()[clear], after[name][clear], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), STEPS)
def test_a_training_step_in_float64_ends_at_the_same_parameters(method, changes):
    with float64():
        (metrics, gradients, after), (losses, twin) = step_in_both(method, changes)
        np.testing.assert_allclose(losses["total"], float(metrics["train/loss"]), rtol=1e-8)
        for name, parameter in twin.named_parameters():
            gradient = parameter.grad.numpy()
            if "qkv.bias" not in name:
                assert np.linalg.norm(gradient - gradients[name]) <= 1e-6 * np.linalg.norm(gradients[name]), name
            np.testing.assert_allclose(parameter.detach(), after[name], rtol=0, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(("method", "changes"), [("sd_dit", {}), ("dit", DIT)])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_heun_gives_the_same_images_from_the_same_noise(method, changes, guidance):
    config = tiny_config(method, changes | {"codec.name": "latents", "codec.scale": (0.5,), "codec.mean": (0.1,)})
    network, params = random_network(config, scale=0.1)
    diffusion = make_diffusion(config.diffusion)
    noise_BHWC, _, label_B = random_inputs(config, batch=3)
    sigmas = noise_levels(18, diffusion.sigma_min, diffusion.sigma_max, 7.0)

    @jit
    def ours(params):
        output = make_output(network, diffusion, params, label_B, guidance)
        return heun(make_denoise(output, diffusion), noise_BHWC, sigmas) / 0.5 + 0.1

    theirs = pytorch.sample(
        make_twin(config, params), label_B, steps=18, guidance=guidance, noise_BCHW=to_torch(noise_BHWC)
    )
    images, largest = ours(params), np.abs(ours(params)).max()
    # A random network that predicts eps leaves most of the first noise in place, of standard deviation 157.
    assert 0.5 < largest < (10 if config.diffusion.name == "edm" else 2000)
    np.testing.assert_allclose(to_numpy(theirs), images, rtol=0, atol=1e-4 if largest < 10 else 1e-6 * largest)


def test_noise_levels_and_the_interval_of_guidance_are_the_runs():
    settings = {"sampling.sigma_min": 0.01, "sampling.sigma_max": 40.0, "sampling.guidance_interval": (0.3, 40.0)}
    config = tiny_config("dit", settings | {"sampling.guidance": 2.0, "codec.name": "latents", "codec.scale": (1.0,)})
    network, params = random_network(config, scale=0.1)
    noise_BHWC, _, _ = random_inputs(config, batch=3)
    label_B = np.array([0, 1, 2], np.int32)
    levels = schedule(make_diffusion(config.diffusion), dataclasses.replace(config.sampling, steps=5))

    @functools.partial(jit, static_argnames="sampling")
    def ours(params, sampling):
        diffusion = make_diffusion(config.diffusion)
        output = make_guided(network, diffusion, params, label_B, sampling.guidance, sampling.guidance_interval)
        return heun(make_denoise(output, diffusion), noise_BHWC, levels)

    theirs = pytorch.sample(make_twin(config, params), label_B, steps=5, noise_BCHW=to_torch(noise_BHWC))
    images = ours(params, config.sampling)
    np.testing.assert_allclose(to_numpy(theirs), images, rtol=0, atol=1e-4)
    everywhere = ours(params, dataclasses.replace(config.sampling, guidance_interval=(0.0, 0.0)))
    assert np.abs(images - everywhere).max() > 1e-2


@pytest.mark.parametrize(
    ("steps", "multiplier"), [(18, 0.527625), (40, 0.504877), pytest.param(256, 0.500095, marks=pytest.mark.slow)]
)
def test_a_network_of_zeros_multiplies_the_noise(steps, multiplier):
    config = tiny_config("maskdit", {"codec.name": "latents", "codec.scale": (1.0,)})
    network = pytorch.SDDiT(namespaces(config))
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    noise = torch.randn(2, 3, 8, 8)
    images = pytorch.sample(network, [0, 1], steps=steps, noise_BCHW=noise)
    torch.testing.assert_close(images, multiplier * noise, rtol=5e-6, atol=0)


def test_pixels_are_decoded_as_ours_are():
    parts, config = tiny_parts("dit_decoder"), smallest_config("dit_decoder")
    params = random_params(parts.network.init)
    twin = make_twin(config, params)
    noise_BHWC, _, _ = random_inputs(config, batch=4)
    images = pytorch.sample(twin, [0, 1, 2, 3], steps=4, noise_BCHW=to_torch(noise_BHWC))
    assert images.dtype == torch.uint8
    assert images.shape == (4, 8, 8, 3)
    output = make_output(parts.network, parts.diffusion, params, jnp.arange(4), 1.0)
    z = heun(make_denoise(output, parts.diffusion), noise_BHWC, noise_levels(4, 0.002, 80.0, 7.0))
    assert np.abs(images.numpy().astype(int) - np.asarray(parts.codec.as_stored(z), int)).max() <= 1


def test_a_mask_in_any_order_is_the_same_mask():
    """MaskDiT keeps its visible tokens in the order of the draw."""
    parts = tiny_parts("maskdit")
    twin = make_twin(smallest_config("maskdit"), noised_state(parts)["params"])
    drawn = draw_batch(parts)
    tensors = drawn_tensors(drawn)
    visible = to_torch(drawn.mask.visible_BV)
    shuffled = visible[:, torch.randperm(visible.shape[1])]
    one, other = (pytorch.training_losses(twin, *tensors, v) for v in (visible, shuffled))
    for name, loss in one.items():
        torch.testing.assert_close(loss, other[name], rtol=1e-6, atol=0)


def wave(shape, a, b):
    return torch.sin(a * torch.arange(np.prod(shape), dtype=torch.float64) + b).float().reshape(shape)


def test_the_cross_entropy_has_the_values_of_ibots_code():
    """Of two crops of two images: classes across the crops, patches where a crop is masked; centers are 0."""

    def loss(student, teacher):
        return pytorch.prototype_cross_entropy(student, teacher, torch.zeros(8), 0.1, 0.04)

    student, teacher = wave((4, 8), 0.7, 0.1), wave((4, 8), 0.9, 0.4)
    np.testing.assert_allclose(loss(student[[2, 3, 0, 1]], teacher), 14.0608892, rtol=1e-6)
    student, teacher = wave((4, 4, 8), 0.3, 0.2), wave((4, 4, 8), 0.5, 0.6)
    masked = [[0, 3], [0, 1], [], [0, 1, 2]]
    total = sum(loss(student[b, m], teacher[b, m]) for b, m in enumerate(masked) if m)
    np.testing.assert_allclose(total / 4, 4.6339908, rtol=1e-6)


def test_what_an_objective_lacks_is_said():
    parts = tiny_parts("sd_dit")
    twin = make_twin(smallest_config("sd_dit"), noised_state(parts)["params"])
    drawn = draw_batch(parts)
    tensors = drawn_tensors(drawn)
    with pytest.raises(ValueError, match="discrimination needs a teacher, and reconstruction a mask"):
        pytorch.training_losses(twin, *tensors, to_torch(drawn.mask.visible_BV))


def test_labels_steps_and_the_sampler_are_checked():
    config = tiny_config("dit", DIT | {"sampling.solver": "ddpm", "sampling.steps": 250})
    _, params = random_network(config)
    twin = make_twin(config, params)
    for labels in ([99], [-1], [[0]]):
        with pytest.raises(ValueError, match="labels are 0 to 4"):
            pytorch.sample(twin, labels, steps=2)
    with pytest.raises(ValueError, match="steps at least 1"):
        pytorch.sample(twin, [0], steps=0)
    with pytest.raises(ValueError, match="the run samples with ddpm, and this function with heun: give steps"):
        pytorch.sample(twin, [0])
    short, long = (
        pytorch.sample(twin, torch.tensor([1, 4], dtype=kind), steps=2) for kind in (torch.uint8, torch.int64)
    )
    assert torch.equal(short, long)

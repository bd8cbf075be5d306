"""Who gets gradient from which loss, measured on parameters with noise (a fresh network has gradients of zero)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import draw_batch, jit, make_views, noised_state, tiny_parts

from sddit_jax.method.train_step import student_views
from sddit_jax.models.transformer import patchify, unpatchify

# Parts of the encoder's parameters, by what they compute.
EMBEDDINGS = {"patch", "time", "label"}
ENCODER = EMBEDDINGS | {"stack"}


def reached(gradients):
    """The groups in which every array has gradient. A group may not be reached in part."""
    modules = gradients.get("network", {}) | {name: tree for name, tree in gradients.items() if name != "network"}
    groups = {f"{module}/{name}": subtree for module, children in modules.items() for name, subtree in children.items()}
    found = set()
    for name, tree in groups.items():
        nonzero = [bool(np.any(leaf)) for leaf in jax.tree.leaves(tree)]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
        assert all(nonzero) or not any(nonzero), name
        if any(nonzero):
            found.add(name)
    return found


def groups_of(params, *modules):
    found = params["network"] | params
    return {f"{module}/{name}" for module in modules for name in found[module]}


def loss_gradients(parts, objective, stop=()):
    """Gradients of one objective for (params, aux, ema), with some of the encoder's outputs held constant."""
    state, drawn = noised_state(parts), draw_batch(parts)
    network, diffusion = parts.network, parts.diffusion

    def loss(params, aux, ema):
        views = student_views(params["network"], parts, drawn)
        if stop:
            held = {name: jax.lax.stop_gradient(getattr(views.encoded, name)) for name in stop}
            encoded = views.encoded.replace(**held)
            output = network.predict(params["network"], encoded, drawn.mask)
            denoised = diffusion.denoised(views.noised_BHWC, output, views.sigma_B)
            views = views.replace(encoded=encoded, denoised_BHWC=denoised)
        return objective.loss(params, aux, ema, views, state["step"])[0]

    return jit(jax.grad(loss, argnums=(0, 1, 2)))(
        state["params"], state["aux"][objective.name], state["ema"]["default"]
    )


def objective_of(parts, name):
    return next(objective for objective in parts.objectives if objective.name == name)


@pytest.mark.parametrize(
    ("method", "name", "modules"),
    [
        ("sd_dit", "denoising", ("encoder", "decoder")),
        ("sd_dit", "discrimination", ("encoder", "discrimination")),
        ("maskdit", "denoising", ("encoder", "decoder")),
        ("maskdit", "reconstruction", ("encoder", "decoder")),
        pytest.param("dit_decoder", "denoising", ("encoder", "decoder"), marks=pytest.mark.slow),
        pytest.param("dit", "denoising", ("encoder", "decoder"), marks=pytest.mark.slow),
    ],
)
def test_each_loss_reaches_its_own_modules_whole_and_no_other(method, name, modules):
    parts = tiny_parts(method)
    gradients, aux, ema = loss_gradients(parts, objective_of(parts, name))
    assert reached(gradients) == groups_of(gradients, *modules)
    assert reached(ema) == set()
    if name == "discrimination":
        assert reached(aux["teacher"]) == set()
    if method == "sd_dit":
        assert {"encoder/cls", "discrimination/prototypes"} <= groups_of(gradients, "encoder", "discrimination")
    if method == "maskdit":
        assert "decoder/mask_token" in groups_of(gradients, "decoder")


def test_a_teacher_that_reads_the_sampling_ema_gets_no_gradient():
    parts = tiny_parts("sd_dit", {"objectives.discrimination.teacher": "ema"})
    _, _, ema = loss_gradients(parts, objective_of(parts, "discrimination"))
    assert reached(ema) == set()


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("sd_dit", "tokens_BVD", {"patch", "time", "label", "stack", "cls"}),
        ("sd_dit", "embedded_BND", {"patch"}),
        ("sd_dit", "condition_BD", {"time", "label"}),
        pytest.param("maskdit", "tokens_BVD", {"patch", "time", "label", "stack"}, marks=pytest.mark.slow),
        ("maskdit", "embedded_BND", set()),
        pytest.param("maskdit", "condition_BD", {"time", "label"}, marks=pytest.mark.slow),
    ],
)
def test_denoising_reaches_the_embeddings_through_the_encoder_and_directly(method, path, expected):
    """Each output of the encoder alone: encoded tokens, embedded noisy tokens, condition."""
    parts = tiny_parts(method)
    stop = {"tokens_BVD", "embedded_BND", "condition_BD"} - {path}
    gradients, _, _ = loss_gradients(parts, objective_of(parts, "denoising"), stop)
    assert reached(gradients) == {f"encoder/{name}" for name in expected} | groups_of(gradients, "decoder")


@pytest.fixture(scope="module")
def hidden_pixels():
    """An sd_dit, its parameters, views, and an image that is 1 at the invisible pixels."""
    parts = tiny_parts("sd_dit")
    params = noised_state(parts)["params"]
    views = make_views(parts, params)
    params, model, mask = params["network"], parts.network.model, views.mask
    hidden_BN1 = (
        jnp.zeros((len(views.x0_BHWC), model.tokens, 1))
        .at[jnp.arange(len(views.x0_BHWC))[:, None], mask.hidden_BM]
        .set(1.0)
    )
    ones = jnp.ones((1, 1, model.patch**2 * model.channels))
    return parts, params, views, unpatchify(hidden_BN1 * ones, model.patch, model.channels)


def encoder_outputs(parts, params, views, noised):
    inputs = parts.diffusion.network_input(noised, views.sigma_B)
    return parts.network.encode(params, *inputs, views.label_B, views.mask)


def test_invisible_pixels_do_not_change_the_encoders_output_but_the_decoders(hidden_pixels):
    parts, params, views, hidden_BHWC = hidden_pixels

    @jit
    def outputs(noised):
        encoded = encoder_outputs(parts, params, views, noised)
        return encoded.cls_BD, encoded.tokens_BVD, parts.network.predict(params, encoded, views.mask)

    before = outputs(views.noised_BHWC)
    after = outputs(views.noised_BHWC + 3.0 * hidden_BHWC)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    visible_changes = take_patches(parts, before[2] - after[2], views.mask.visible_BV)
    assert np.abs(visible_changes).max() > 0  # the decoder attends to the invisible noisy tokens


def take_patches(parts, image_BHWC, positions_BV):
    return np.take_along_axis(
        np.asarray(patchify(image_BHWC, parts.network.model.patch)), np.asarray(positions_BV)[:, :, None], axis=1
    )


def test_the_encoders_output_has_no_gradient_for_invisible_pixels(hidden_pixels):
    parts, params, views, hidden_BHWC = hidden_pixels
    keys = jax.random.split(jax.random.key(5))

    @jit
    @jax.grad
    def gradient(noised):
        encoded = encoder_outputs(parts, params, views, noised)
        cls = (encoded.cls_BD * jax.random.normal(keys[0], encoded.cls_BD.shape)).sum()
        return cls + (encoded.tokens_BVD * jax.random.normal(keys[1], encoded.tokens_BVD.shape)).sum()

    gradient_BHWC = np.asarray(gradient(views.noised_BHWC))
    hidden = np.asarray(hidden_BHWC) == 1
    assert 0 < hidden.mean() < 0.5
    assert np.all(gradient_BHWC[hidden] == 0)
    assert np.all(gradient_BHWC[~hidden] != 0)

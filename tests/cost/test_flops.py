"""The arithmetic on paper against that of the traced programs."""

import jax
import jax.numpy as jnp
import pytest
from helpers import products, tiny_config

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import imagenet
from sddit_jax.cost import flops
from sddit_jax.method.train_step import make_train_step
from sddit_jax.models.masking import visible_count

VARIANTS = {
    "sd_dit": ("sd_dit", {}),
    "sd_dit, another mask and head": (
        "sd_dit",
        {"masking.ratio": 0.5, "objectives.discrimination.head_width": 24, "model.mlp_ratio": 3.0},
    ),
    "maskdit": ("maskdit", {}),
    "maskdit with zeros": ("maskdit", {"masking.fill": "zeros", "masking.ratio": 0.75}),
    "dit_decoder": ("dit_decoder", {"model.patch": 4}),
    "dit": ("dit", {}),
    "dit with a learnt variance": ("dit", {"model.learn_sigma": True, "model.null_label": "row"}),
}


def traced_training(config, batch_size):
    parts, m = make_parts(config), config.model
    state = jax.eval_shape(parts.init_state, jax.random.key(0))
    image = jax.ShapeDtypeStruct((batch_size, m.image_size, m.image_size, m.channels), jnp.uint8)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    return products(jax.make_jaxpr(make_train_step(parts))(state, batch).jaxpr)


def beside(config):
    """What the step computes that `flops` leaves out: labels as products with one-hot rows, and what it recomputes."""
    m, d = config.model, config.objectives.discrimination
    tokens = (m.image_size // m.patch) ** 2
    visible = visible_count(tokens, config.masking.ratio)
    label = 2 * (m.num_classes + (m.null_label == "row")) * m.width
    # Attention's backward pass computes its logits again.
    total = 2 * m.depth * (visible + m.cls_token) ** 2 * m.width + 2 * label
    if m.decoder_depth:
        total += 2 * m.decoder_depth * tokens**2 * m.decoder_width
    if d.weight:
        padded = visible + -visible % min(d.chunk, visible)
        logits = 2 * d.bottleneck * d.prototypes
        # The loss recomputes the student's logits and the teacher's. Its last chunk of positions is padded.
        total += label + 2 * logits * (padded + m.cls_token) + 4 * logits * (padded - visible)
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_what_the_step_multiplies(variant):
    method, changes = VARIANTS[variant]
    config = tiny_config(method, changes)
    image = traced_training(config, 2) - traced_training(config, 1)
    assert sum(flops.training(config).values()) + beside(config) == pytest.approx(image, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_is_what_the_network_multiplies(variant):
    method, changes = VARIANTS[variant]
    config = tiny_config(method, changes)
    network, m = make_parts(config).network, config.model
    params = jax.eval_shape(network.init, jax.random.key(0))
    arguments = [jax.ShapeDtypeStruct((1, m.image_size, m.image_size, m.channels), jnp.float32)]
    arguments += [jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)]
    traced = products(jax.make_jaxpr(network)(params, *arguments).jaxpr)
    label = 2 * (m.num_classes + (m.null_label == "row")) * m.width
    assert flops.sampling(config) + label == traced


def test_published_numbers():
    """Peebles & Xie 2023, Table 4: 118.64, 23.01 and 80.71 G multiply-adds for XL/2, B/2 and L/2."""
    for size, published in (("XL/2", 118.64), ("L/2", 80.71), ("B/2", 23.01)):
        config = resolve(imagenet(256, f"size={size},method=dit"))
        assert flops.sampling(config) / 2e9 == pytest.approx(published, rel=1e-3)

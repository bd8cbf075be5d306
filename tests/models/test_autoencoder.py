"""The autoencoders compute what diffusers computes from the same weights."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoders import image, in_torch, make_kl, make_tiny, normal
from helpers import random_params
from tiny import jit

from sddit_jax.errors import ConfigError
from sddit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, SpatialAttention, group_norm
from sddit_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from sddit_jax.weights.autoencoder import load_autoencoder, load_tiny_autoencoder

STABLE_DIFFUSION = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
SMALL = AutoencoderConfig(widths=(8, 16), blocks=1, norm_groups=4)
SMALL_TINY = TinyAutoencoderConfig(width=8, encoder_blocks=(1, 2), decoder_blocks=(2, 1))


def assert_near(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert theirs.std() > 0.05
    difference = abs(np.asarray(ours) - theirs).max()
    assert difference < tolerance, f"off by {difference:.3g}"


def posterior(model, what):
    return lambda x: getattr(model.encode(x).latent_dist, what)


def compare(model, folder, x_BHWC, z_BHWC, wrap=jit):
    """Saves diffusers' model, loads it and compares both halves."""
    model.save_pretrained(folder)
    config, params = load_autoencoder(folder)
    autoencoder = Autoencoder(config)
    mean, std = wrap(autoencoder.encode)(params, x_BHWC)
    assert_near(mean, in_torch(posterior(model, "mean"), x_BHWC))
    assert_near(std, in_torch(posterior(model, "std"), x_BHWC))
    assert_near(wrap(autoencoder.decode)(params, z_BHWC), in_torch(lambda z: model.decode(z).sample, z_BHWC))
    return config


def test_stable_diffusion(tmp_path):
    model = make_kl(**STABLE_DIFFUSION)
    assert compare(model, tmp_path, image(32), normal(2, 4, 4, 4)) == AutoencoderConfig()


@pytest.mark.slow
def test_stable_diffusion_at_512_px(tmp_path):
    compare(make_kl(**STABLE_DIFFUSION), tmp_path, image(512)[:1], normal(1, 64, 64, 4), jax.jit)


def test_sixteen_channels_without_quant_convs(tmp_path):
    model = make_kl(
        block_out_channels=(16, 32, 32), latent_channels=16, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    config = compare(model, tmp_path, image(16), normal(2, 4, 4, 16))
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    assert (config.quant_conv, config.post_quant_conv) == (False, False)


def test_other_depth_without_attention_not_square(tmp_path):
    model = make_kl(
        block_out_channels=(8, 16, 16, 24), layers_per_block=3, in_channels=1, out_channels=2,
        mid_block_add_attention=False, use_post_quant_conv=False,
    )  # fmt: skip
    config = compare(model, tmp_path, image(32, 1)[:, :16], normal(2, 2, 3, 4))
    assert config.blocks == 3
    assert not config.mid_attention


def test_tiny(tmp_path):
    model = make_tiny()
    model.save_pretrained(tmp_path)
    config, params = load_tiny_autoencoder(tmp_path)
    assert config == TinyAutoencoderConfig(width=8)
    autoencoder = TinyAutoencoder(config)
    # Latents far from 0 tell whether the decoder's soft clamp is there.
    x_BHWC, z_BHWC = image(32), 4 * normal(2, 4, 4, 4)
    assert_near(jit(autoencoder.encode)(params, x_BHWC), in_torch(lambda x: model.encode(x).latents, x_BHWC))
    assert_near(jit(autoencoder.decode)(params, z_BHWC), in_torch(lambda z: model.decode(z).sample, z_BHWC))


MODELS = {"kl": Autoencoder(SMALL), "tiny": TinyAutoencoder(SMALL_TINY)}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


def encode(model, params, x_BHWC):
    """Latents or their means."""
    encoded = jit(model.encode)(params, x_BHWC)
    return encoded if isinstance(model, TinyAutoencoder) else encoded[0]


def test_bfloat16_is_close_and_gives_float32(model):
    params = random_params(model.init, scale=0.2)
    half = type(model)(model.config, jnp.bfloat16)
    for run, x_BHWC in ((encode, image(16)), (lambda m, *x: jit(m.decode)(*x), normal(2, 8, 8, 4))):
        exact, rounded = run(model, params, x_BHWC), run(half, params, x_BHWC)
        assert rounded.dtype == jnp.float32
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.02


def test_parameters_are_float32_whatever_the_dtype_of_the_products(model):
    half = type(model)(model.config, jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_products_of_float32_are_asked_to_be_exact(model):
    params = random_params(model.init)
    for dtype, wanted in (("float32", "HIGHEST"), ("bfloat16", "DEFAULT")):
        text = str(jax.make_jaxpr(type(model)(model.config, dtype).encode)(params, image(8)))
        assert {name for name in ("HIGHEST", "DEFAULT") if name in text} == {wanted}


def test_each_half_needs_only_its_own_parameters(model):
    params = random_params(model.init)
    assert encode(model, {"encoder": params["encoder"]}, image(4)).shape == (2, 2, 2, 4)
    assert jit(model.decode)({"decoder": params["decoder"]}, normal(1, 2, 3, 4)).shape == (1, 4, 6, 3)


def test_fresh_parameters_give_finite_images(model):
    params = jit(model.init)(jax.random.key(0, impl="unsafe_rbg"))
    decoded = jit(model.decode)(params, encode(model, params, image(8)))
    assert decoded.shape == (2, 8, 8, 3)
    assert np.isfinite(decoded).all()


def normalised(x_BHWC):
    """GroupNorm of two groups in float64."""
    groups = np.asarray(x_BHWC, np.float64).reshape(2, 16, 2, 4)
    centered = groups - groups.mean((1, 3), keepdims=True)
    return (centered / np.sqrt(np.square(centered).mean((1, 3), keepdims=True) + 1e-6)).reshape(x_BHWC.shape)


def test_norm_keeps_float32_statistics_for_bfloat16():
    x = (100 + normal(2, 4, 4, 8)).astype(jnp.bfloat16)
    normed, _ = group_norm(2, jnp.bfloat16, "norm").init_with_output(jax.random.key(0), x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(normed.astype(jnp.float32), normalised(x), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(("mean", "scale", "tolerance"), [(0, 1e-3, 1e-5), (1000, 1, 1e-3)])
def test_norm_where_epsilon_and_cancellation_matter(mean, scale, tolerance):
    x = mean + scale * normal(2, 4, 4, 8)
    normed, _ = group_norm(2, jnp.float32, "norm").init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(normed, normalised(x), atol=tolerance)


def test_softmax_and_its_logits_are_float32_for_bfloat16():
    attention = SpatialAttention(2, jnp.bfloat16)
    x = normal(2, 4, 4, 8).astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: attention.init_with_output(jax.random.key(0), x)[0])(x))
    (logits,) = re.findall(r":(\w+)\[2,16,16\] = dot_general", text)
    (weights,) = re.findall(r":(\w+)\[2,16,16\] = exp ", text)
    assert (logits, weights) == ("f32", "f32")


def test_logarithm_of_the_variance_is_clipped():
    autoencoder = MODELS["kl"]
    params = random_params(autoencoder.init)
    params["encoder"]["quant_conv"]["bias"][4:] = [-1e4, -29.0, 0.0, 1e4]
    params["encoder"]["quant_conv"]["kernel"][:, 4:] = 0
    _, std = jit(autoencoder.encode)(params, image(4))
    np.testing.assert_allclose(std[0, 0, 0], np.exp([-15, -14.5, 0, 10]), rtol=1e-5)


def test_size_of_stable_diffusions():
    autoencoder = Autoencoder(AutoencoderConfig())
    shapes = jax.eval_shape(autoencoder.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    assert autoencoder.factor == TinyAutoencoder(TinyAutoencoderConfig()).factor == 8


def test_sides_that_do_not_divide_are_named(model):
    with pytest.raises(ConfigError, match=r"8 x 7 pixels.*multiples of 2"):
        model.encode({}, image(8)[:, :, :7])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SMALL, {"widths": ()}, "widths is empty"),
        (SMALL, {"widths": (8, 18)}, "width 18 must be a multiple of norm_groups, 4"),
        (SMALL, {"widths": (0,)}, "width 0"),
        (SMALL, {"blocks": 0}, "blocks 0"),
        (SMALL, {"latent_channels": -1}, "latent_channels -1"),
        (SMALL, {"scaling_factor": 0.0}, "scaling_factor 0.0"),
        (SMALL, {"scaling_factor": math.nan}, "scaling_factor nan"),
        (SMALL, {"shift_factor": math.inf}, "shift_factor inf"),
        (SMALL_TINY, {"width": 0}, "width 0"),
        (SMALL_TINY, {"encoder_blocks": (1,)}, r"encoder_blocks \(1,\) and decoder_blocks \(2, 1\)"),
        (SMALL_TINY, {"scaling_factor": -1.0}, "scaling_factor -1.0"),
    ],
)
def test_impossible_configs_are_named(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)

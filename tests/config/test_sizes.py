import math

import jax
import pytest
from helpers import make_config

from sddit_jax.config import sizes
from sddit_jax.config.parts import make_network
from sddit_jax.errors import ConfigError

DIT = {"model.learn_sigma": True, "model.null_label": "row"}


def shapes(method, size, **changes):
    model = {f"model.{key}": value for key, value in sizes.parse_size(size).items()}
    config = make_config(method, {**model, **changes})
    return config.model, jax.eval_shape(make_network(config).init, jax.random.key(0))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def frozen(model, *widths):
    """The fixed position tables, which the reference codes keep among their parameters."""
    return (model.image_size // model.patch) ** 2 * sum(widths)


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("S/2", 68_346_256), ("S/4", 68_217_280), ("S/8", 68_346_496),
        ("B/2", 175_909_648), ("B/4", 175_725_376), ("B/8", 175_909_888),
        ("L/2", 510_176_272), ("L/4", 509_955_136), ("L/8", 510_176_512),
        ("XL/2", 730_541_200), ("XL/4", 730_301_632), ("XL/8", 730_541_440),
        ("H/2", 1_010_002_192), ("H/4", 1_009_744_192), ("H/8", 1_010_002_432),
    ],
)  # fmt: skip
def test_total_parameters_of_maskdit(size, total):
    model, params = shapes("maskdit", size)
    assert count(params) + frozen(model, model.width, 512) == total


def test_total_parameters_of_maskdit_at_512_px():
    model, params = shapes("maskdit", "XL/2", **{"model.image_size": 64})
    assert count(params) + frozen(model, model.width, 512) == 731_819_152


@pytest.mark.parametrize(
    ("size", "trainable", "decoder", "without_decoder"),
    [
        ("S/2", 68_116_880, 35_288_832, 32_956_816),
        ("B/2", 175_581_968, 45_808_128, 130_499_344),
        ("L/2", 509_783_056, 53_148_672, 458_085_392),
        ("XL/2", 730_115_216, 56_917_248, 675_110_032),
        ("H/2", 1_009_543_440, 60_751_360, 951_230_736),
    ],
)
def test_parts_of_maskdit(size, trainable, decoder, without_decoder):
    model, params = shapes("maskdit", size)
    assert count(params) == trainable
    of_decoder = {key: value for key, value in params["decoder"].items() if key != "final"}
    assert count(of_decoder) + frozen(model, 512) == decoder
    model, params = shapes("dit", size)
    assert count(params) + frozen(model, model.width) == without_decoder


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("S/2", 32_963_360), ("S/4", 32_945_024), ("S/8", 33_148_160),
        ("B/2", 130_512_416), ("B/4", 130_475_648), ("B/8", 130_881_536),
        ("L/2", 458_102_816), ("L/4", 458_053_760), ("L/8", 458_594_816),
        ("XL/2", 675_129_632), ("XL/4", 675_074_432), ("XL/8", 675_683_072),
    ],
)  # fmt: skip
def test_total_parameters_of_dit(size, total):
    model, params = shapes("dit", size, **DIT)
    assert count(params) + frozen(model, model.width) == total


@pytest.mark.parametrize("size", ["", "XL", "M/2", "XL/3", "xl/2", "DiT-XL/2", "S/2/2", "S/02"])
def test_unknown_sizes_are_named(size):
    with pytest.raises(ConfigError) as error:
        sizes.parse_size(size)
    assert repr(size) in str(error.value)
    assert "S, B, L, XL, H" in str(error.value)

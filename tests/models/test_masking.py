import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.config.parts import make_network
from sddit_jax.models.masking import Mask, put_back, sample_mask, take, visible_count


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"),
    [(256, 0.2, 204), (256, 0.5, 128), (256, 0.3, 179), (256, 0.0, 256), (16, 0.2, 12), (10, 0.9, 1)],
)
def test_visible_count(tokens, ratio, visible):
    assert visible_count(tokens, ratio) == visible


@given(st.integers(1, 4096), st.integers(0, 999))
def test_visible_count_is_that_of_exact_decimals(tokens, thousandths):
    exact = tokens * (1 - Fraction(thousandths, 1000))
    assert visible_count(tokens, thousandths / 1000) == exact.numerator // exact.denominator


def test_every_set_of_visible_tokens_is_equally_likely():
    mask = sample_mask(jax.random.key(0), 6000, 4, 0.5)
    sets = [tuple(row) for row in np.asarray(mask.visible_BV)]
    counts = [sets.count(pair) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 6000
    assert all(abs(count - 1000) < 4 * (6000 * (1 / 6) * (5 / 6)) ** 0.5 for count in counts)


def test_masks_differ_between_images_and_keys_and_are_in_raster_order():
    a, b = (sample_mask(jax.random.key(seed), 8, 256, 0.2) for seed in (0, 1))
    assert a.visible_BV.shape == (8, 204)
    assert a.hidden_BM.shape == (8, 52)
    assert len(np.unique(np.concatenate([a.visible_BV, b.visible_BV]), axis=0)) == 16
    for positions in (a.visible_BV, a.hidden_BM):
        assert (np.diff(positions, axis=1) > 0).all()
    both = np.concatenate([a.visible_BV, a.hidden_BM], axis=1)
    np.testing.assert_array_equal(np.sort(both, axis=1), np.tile(np.arange(256), (8, 1)))


@given(st.lists(st.permutations(range(6)), min_size=2, max_size=2), st.integers(0, 6))
def test_put_back_inverts_take(orders, visible):
    order = np.array(orders)
    mask = Mask(order[:, :visible], order[:, visible:], np.argsort(order, axis=1))
    tokens = np.arange(36.0, dtype=np.float32).reshape(2, 6, 3)
    apart = take(tokens, mask.visible_BV), take(tokens, mask.hidden_BM)
    for b, n in itertools.product(range(2), range(visible)):
        np.testing.assert_array_equal(apart[0][b, n], tokens[b, order[b, n]])
    np.testing.assert_array_equal(put_back(*apart, mask), tokens)


def test_put_back_inverts_take_for_a_sampled_mask():
    mask = sample_mask(jax.random.key(2), 3, 16, 0.3)
    tokens = jax.random.normal(jax.random.key(0), (3, 16, 5))
    apart = take(tokens, mask.visible_BV), take(tokens, mask.hidden_BM)
    np.testing.assert_array_equal(put_back(*apart, mask), tokens)


@pytest.mark.parametrize("fill", ["noisy", "mask_token"])
def test_invisible_pixels_reach_the_decoder_only_and_only_as_noisy_tokens(fill):
    network = make_network(tiny_config(changes={"masking.fill": fill}))
    params = random_params(network.init)
    mask = sample_mask(jax.random.key(0), 2, network.model.tokens, 0.5)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    other = x.copy()
    for b, n in itertools.product(range(2), range(8)):
        row, column = np.divmod(mask.hidden_BM[b, n], 4)
        other[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1

    @jax.jit
    def run(x):
        encoded = network.encode(params, x, jnp.array([-1.0, 0.5]), jnp.array([0, 1]), mask)
        return encoded.tokens_BVD, encoded.cls_BD, network.predict(params, encoded, mask)

    (tokens, cls, output), (other_tokens, other_cls, other_output) = run(x), run(other)
    assert tokens.shape == (2, 8, 32)
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_array_equal(cls, other_cls)
    changed = abs(output - other_output).max(axis=(1, 2, 3))
    assert (changed > 1e-3).all() if fill == "noisy" else (changed == 0).all()

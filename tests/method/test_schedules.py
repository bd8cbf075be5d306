import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.method.schedules import cosine, ema_decay, learning_rate, linear


def test_linear():
    values = linear(jnp.array([0, 15, 30, 31, 1000]), 0.04, 0.07, 30)
    np.testing.assert_allclose(values, [0.04, 0.055, 0.07, 0.07, 0.07], rtol=1e-6)
    np.testing.assert_allclose(linear(jnp.array([1, 5]), 0.04, 0.07, 0), [0.07, 0.07], rtol=1e-6)


def test_cosine_is_ibots():
    values = cosine(jnp.array([0, 250, 500, 999, 1000, 2000]), 0.996, 1.0, 1000)
    np.testing.assert_allclose(values, [0.996, 0.99658579, 0.998, 0.99999999, 1, 1], atol=1e-7)


def test_learning_rate_warms_up():
    steps = jnp.arange(6)
    rates = learning_rate(steps, 1e-3, "constant", 4, 100)
    np.testing.assert_allclose(rates, [2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(learning_rate(steps, 1e-4, "constant", 0, 100), np.full(6, 1e-4), rtol=1e-6)


def test_learning_rate_falls_by_cosine_to_zero():
    rates = learning_rate(jnp.array([20, 60, 100, 200]), 1e-3, "cosine", 20, 100)
    np.testing.assert_allclose(rates, [1e-3, 5e-4, 0, 0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@given(warmup=st.integers(0, 50), steps=st.integers(1, 100))
def test_learning_rate_is_within_bounds_and_never_nan(kind, warmup, steps):
    rates = learning_rate(np.arange(120), 1e-3, kind, warmup, steps)
    assert ((rates >= 0) & (rates <= 1.0001e-3)).all()
    assert rates[0] > 0


def test_ema_decay():
    decay = ema_decay(jnp.array([0, 1, 8990, 89_989, 89_991, 10**7]), 0.9999)
    expected = [0.1, 2 / 11, 8991 / 9000, 89_990 / 89_999, 0.9999, 0.9999]
    np.testing.assert_allclose(decay, expected, rtol=2e-7)
    assert ema_decay(jnp.int32(5), 0.0) == 0


def test_steps_may_be_traced():
    @jax.jit
    def run(step):
        return (
            linear(step, 0, 1, 10),
            cosine(step, 0, 1, 10),
            learning_rate(step, 1, "cosine", 2, 10),
            ema_decay(step, 1),
        )

    expected = [0.4, 0.5 - 0.5 * np.cos(0.4 * np.pi), 0.5 + 0.5 * np.cos(0.25 * np.pi), 5 / 14]
    np.testing.assert_allclose(run(jnp.int32(4)), expected, rtol=1e-6)

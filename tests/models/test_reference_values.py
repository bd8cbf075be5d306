"""What the PyTorch codes of MaskDiT and DiT compute from weights that a formula gives.

Entry j of the state_dict, in its order, is 0.02 sin(0.37 n + j) for flat index n; the fixed positions count as
entries too, but keep their values.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import denoise, make_config
from twin import make_twin, to_numpy, to_torch

from sddit_jax.config.parts import make_network
from sddit_jax.config.sizes import parse_size
from sddit_jax.interop.layouts import DIT, MASKDIT
from sddit_jax.interop.state_dict import from_state_dict
from sddit_jax.method.diffusion import EDM


def wave(shape, a, b, s):
    return (s * np.sin(a * np.arange(np.prod(shape)) + b)).astype(np.float32).reshape(shape)


def recipe(network, layout):
    """Our tree with the recipe's weights."""
    entries = layout.entries(network)
    arrays = {}
    for j, entry in enumerate(entries.values()):
        array = wave(entry.shape, 0.37, j, 0.02)
        arrays[entry.ours] = array.T if entry.transposed else array
    return from_state_dict(arrays, network)


def assert_row(output_BHWC, total, total_abs, first, last):
    flat = np.asarray(output_BHWC, np.float64).transpose(0, 3, 1, 2).ravel()
    np.testing.assert_allclose(np.abs(flat).sum(), total_abs, rtol=1e-6)
    np.testing.assert_allclose(flat.sum(), total, rtol=1e-5)
    np.testing.assert_allclose(flat[[0, 1, 2, 3, -1]], [*first, last], rtol=5e-6, atol=5e-7)


@pytest.fixture(scope="module")
def x_BHWC():
    return wave((2, 4, 32, 32), 0.11, 0, 1.3).transpose(0, 2, 3, 1)


def small(method, **changes):
    model = {**parse_size("S/2"), **changes}
    return make_config(method, {f"model.{key}": value for key, value in model.items()})


def test_maskdit_s_2(x_BHWC):
    config = small("maskdit")
    network = make_network(config)
    params = recipe(network, MASKDIT)
    sigma, label = np.array([0.5, 2.0], np.float32), np.array([3, 1000], np.int32)

    @jax.jit
    def denoised(params):
        return denoise(EDM(), lambda x, c_noise: network(params, x, c_noise, label), x_BHWC, sigma)

    first = (-0.1153954, 0.1584244, 0.0744439, 0.2613828)
    assert_row(denoised(params), -67.46686, 2243.28887, first, -0.2277997)
    twin = make_twin(config, params)
    assert_row(to_numpy(twin(*map(to_torch, (x_BHWC, sigma, label)))), -67.46686, 2243.28887, first, -0.2277997)


def test_dit_s_2(x_BHWC):
    config = small("dit", learn_sigma=True, null_label="row")
    network = make_network(config)
    params = recipe(network, DIT)
    t, label = np.array([10.0, 500.0], np.float32), np.array([3, 1000], np.int32)
    first = (0.3867253, 0.5535273, 0.2919512, 0.5769653)
    output = jax.jit(network)(params, x_BHWC, t, jnp.asarray(label))
    assert output.shape == (2, 32, 32, 8)
    assert_row(output, -3.50448, 6001.56095, first, -0.2219728)
    twin = make_twin(config, params)
    with torch.no_grad():
        assert_row(to_numpy(twin.output(*map(to_torch, (x_BHWC, t, label)))), -3.50448, 6001.56095, first, -0.2219728)

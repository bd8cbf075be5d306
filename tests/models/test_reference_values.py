"""What the PyTorch codes of MaskDiT and DiT compute from weights that a formula gives.

Entry j of the state_dict, in its order, is 0.02 sin(0.37 n + j) for flat index n; the fixed positions count as
entries too, but keep their values.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config

from sddit_jax.diffusion import EDM
from sddit_jax.models.sizes import decode
from sddit_jax.models.transformer import Network

BLOCK = {
    "attn.qkv": "attention/qkv",
    "attn.proj": "attention/out",
    "mlp.fc1": "mlp/hidden",
    "mlp.fc2": "mlp/out",
    "adaLN_modulation.1": "modulation/linear",
}


def wave(shape, a, b, s):
    return (s * np.sin(a * np.arange(np.prod(shape)) + b)).astype(np.float32).reshape(shape)


def entries(depth, decoder_depth):
    """(path of ours, block or None) of each tensor of the state_dict, in its order; None: not ours."""

    def linear(path, block=None):
        return [(f"{path}/kernel", block), (f"{path}/bias", block)]

    def blocks(part, depth):
        for i in range(depth):
            for path in BLOCK.values():
                yield from linear(f"{part}/stack/blocks/{path}", i)

    fixed = [(None, None)]
    yield from fixed
    if decoder_depth:
        yield from [*fixed, ("decoder/mask_token", None)]
    yield from linear("encoder/patch")
    yield from linear("encoder/time/hidden")
    yield from linear("encoder/time/out")
    yield ("encoder/label/table", None)
    yield from blocks("encoder", depth)
    if decoder_depth:
        yield from linear("decoder/bridge/linear")
        yield from linear("decoder/bridge/modulation/linear")
        yield from blocks("decoder", decoder_depth)
    yield from linear("decoder/final/linear")
    yield from linear("decoder/final/modulation/linear")


def recipe(network, label_is_linear):
    """Our tree with the recipe's weights. In torch a kernel is (out, in), a convolution (out, C, row, column)."""
    m = network.model
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), shapes)
    for j, (path, block) in enumerate(entries(m.depth, m.decoder_depth)):
        if path is None:
            continue
        leaf = tree
        for key in path.split("/"):
            leaf = leaf[key]
        leaf = leaf if block is None else leaf[block]
        flat = wave(leaf.size, 0.37, j, 0.02)
        if path == "encoder/patch/kernel":
            torch = flat.reshape(m.width, m.channels, m.patch, m.patch)
            leaf[...] = torch.transpose(2, 3, 1, 0).reshape(leaf.shape)
        elif path == "encoder/label/table" and label_is_linear:
            leaf[...] = flat.reshape(leaf.shape[::-1]).T
        elif path.endswith("kernel"):
            inputs = m.decoder_width if path.startswith("decoder/stack") else m.width
            if path.endswith("modulation/linear/kernel"):
                inputs = m.width
            elif path == "decoder/final/linear/kernel" and m.decoder_depth:
                inputs = m.decoder_width
            elif path.endswith("mlp/out/kernel"):
                inputs = int(inputs * m.mlp_ratio)
            elif path == "encoder/time/hidden/kernel":
                inputs = 256
            leaf[...] = flat.reshape(-1, inputs).T.reshape(leaf.shape)
        else:
            leaf[...] = flat.reshape(leaf.shape)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    return tree


def assert_row(output_BHWC, total, total_abs, first, last):
    flat = np.asarray(output_BHWC, np.float64).transpose(0, 3, 1, 2).ravel()
    np.testing.assert_allclose(np.abs(flat).sum(), total_abs, rtol=1e-6)
    np.testing.assert_allclose(flat.sum(), total, rtol=1e-5)
    np.testing.assert_allclose(flat[[0, 1, 2, 3, -1]], [*first, last], rtol=5e-6, atol=5e-7)


@pytest.fixture(scope="module")
def x_BHWC():
    return wave((2, 4, 32, 32), 0.11, 0, 1.3).transpose(0, 2, 3, 1)


def small(method, **changes):
    model = {**decode("S/2"), **changes}
    return Network(make_config(method, {f"model.{key}": value for key, value in model.items()}))


def test_maskdit_s_2(x_BHWC):
    network = small("maskdit")
    params = recipe(network, label_is_linear=True)
    label = jnp.array([3, 1000])

    @jax.jit
    def denoised(params, x, sigma):
        return EDM().denoise(lambda x, c_noise: network(params, x, c_noise, label), x, sigma)

    output = denoised(params, x_BHWC, jnp.array([0.5, 2.0]))
    first = (-0.1153954, 0.1584244, 0.0744439, 0.2613828)
    assert_row(output, -67.46686, 2243.28887, first, -0.2277997)


def test_dit_s_2(x_BHWC):
    network = small("dit", learn_sigma=True, null_label="row")
    params = recipe(network, label_is_linear=False)
    # The decoder gives F alone; with 8 channels of its own it shows DiT's second half too.
    whole = type(network.decoder)(
        dataclasses.replace(network.model, channels=8, learn_sigma=False), network.decoder.fill
    )

    @jax.jit
    def run(params, x, t):
        encoded = network.encode(params, x, t, jnp.array([3, 1000]))
        output = whole.apply({"params": params["decoder"]}, encoded)
        return output, network.decode(params, encoded)

    output, f = run(params, x_BHWC, jnp.array([10.0, 500.0]))
    first = (0.3867253, 0.5535273, 0.2919512, 0.5769653)
    assert_row(output, -3.50448, 6001.56095, first, -0.2219728)
    np.testing.assert_array_equal(f, output[..., :4])

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_config

from sddit_jax.config.parts import make_network
from sddit_jax.models.attention import Attention, cudnn_attention, product_attention
from sddit_jax.models.layers import Block, LabelEmbedding, Stack, layer_norm, positions_2d, sinusoid
from sddit_jax.models.transformer import patchify, unpatchify
from sddit_jax.parallel.hooks import has_cudnn_attention

DEPTH = 2
# Compiles faster than the default generator.
KEY = jax.random.key(0, impl="unsafe_rbg")


def stack(scan=True, remat="none"):
    return Stack(depth=DEPTH, heads=2, mlp_ratio=4.0, dtype=jnp.float32, scan=scan, remat=remat)


@pytest.fixture(scope="module")
def tokens():
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (2, 5, 16)), jax.random.normal(keys[1], (2, 24))


@pytest.fixture(scope="module")
def wide():
    """A fresh network, wide enough for statistics."""
    changes = {"model.width": 128, "model.num_classes": 200, "masking.fill": "mask_token"}
    return jax.jit(make_network(tiny_config(changes=changes)).init)(KEY)


def inputs(model, batch=2):
    shape = (batch, model.image_size, model.image_size, model.channels)
    x = jax.random.normal(jax.random.key(3), shape)
    return x, jnp.linspace(-1.5, 1.0, batch), jnp.arange(batch, dtype=jnp.int32)


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


@pytest.mark.parametrize("scan", [True, False])
def test_parameters_of_another_depth_are_refused(tokens, scan):
    deeper = Stack(depth=DEPTH + 1, heads=2, mlp_ratio=4.0, dtype=jnp.float32, scan=scan, remat="none")
    params = deeper.init(KEY, *tokens)
    with pytest.raises((TypeError, ValueError), match=str(DEPTH + 1)):
        stack(scan).apply(params, *tokens)


def test_positions():
    positions = positions_2d(384, 16)
    assert positions.shape == (256, 384)
    np.testing.assert_allclose(np.linalg.norm(positions), 221.702503, rtol=1e-7)
    np.testing.assert_allclose(positions[1, [0, 192]], [0.841471, 0], atol=1e-6)
    np.testing.assert_allclose(positions[16, [0, 192]], [0, 0.841471], atol=1e-6)
    # In each half 96 sines, then 96 cosines; the second frequency is 10000^(-1/96).
    second = 5 * 10000 ** (-1 / 96)
    expected = [np.sin(second), np.cos(second)]
    np.testing.assert_allclose(positions[5, [1, 97]], expected, rtol=1e-6)
    np.testing.assert_allclose(positions[80, [193, 289]], expected, rtol=1e-6)


def test_sinusoid():
    embedded = sinusoid(jnp.array([np.log(0.002) / 4]))[0]
    assert embedded.shape == (256,)
    expected = [0.017143, 0.12469, 1.0, -0.99985, -1.6696e-4]
    np.testing.assert_allclose(embedded[np.array([0, 1, 127, 128, 255])], expected, 5e-5, 5e-7)


def test_patches_are_row_column_channel():
    x = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = patchify(x, 2)
    np.testing.assert_array_equal(patches[0, 1], x[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(patches[1, 2], x[1, 2:, :2].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, 3), x)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("sd_dit", "bfloat16"), ("maskdit", "float32"), ("dit", "float32")],
)
def test_a_fresh_network_outputs_exactly_zero(method, dtype):
    network = make_network(tiny_config(method, {"model.dtype": dtype}))
    output = jax.jit(lambda key, *x: network(network.init(key), *x))(KEY, *inputs(network.model))
    assert output.shape == (2, 8, 8, 3)
    assert not output.any()


def test_blocks_start_as_the_identity(tokens):
    (out, _), _ = jax.jit(stack().init_with_output)(KEY, *tokens)
    np.testing.assert_array_equal(out, tokens[0])


def test_parameters_are_float32_whatever_the_dtype_of_the_products():
    network = make_network(tiny_config(changes={"model.dtype": "bfloat16"}))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    encoded = jax.eval_shape(network.encode, params, *inputs(network.model))
    assert encoded.condition_BD.dtype == jnp.float32
    assert encoded.tokens_BVD.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("path", "fans"),
    [
        ("encoder/patch/kernel", (12, 128)),
        ("encoder/stack/blocks/attention/qkv/kernel", (128, 3 * 128)),
        ("encoder/stack/blocks/attention/out/kernel", (128, 128)),
        ("encoder/stack/blocks/mlp/hidden/kernel", (128, 512)),
        ("encoder/stack/blocks/mlp/out/kernel", (512, 128)),
    ],
)
def test_linear_maps_start_xavier_uniform(wide, path, fans):
    kernel = leaf_at(wide, path)
    for one in kernel if "blocks" in path else kernel[None]:
        bound = (6 / sum(fans)) ** 0.5
        assert one.size == np.prod(fans)
        assert 0.98 * bound < abs(one).max() <= bound
        np.testing.assert_allclose(one.std(), bound / 3**0.5, rtol=0.05)
    if "blocks" in path:
        assert not np.isclose(kernel[0], kernel[1]).all()


@pytest.mark.parametrize(
    "path",
    ["encoder/label/table", "encoder/time/hidden/kernel", "encoder/time/out/kernel",
     "encoder/cls", "decoder/mask_token"],
)  # fmt: skip
def test_embeddings_start_normal(wide, path):
    leaf = leaf_at(wide, path)
    assert abs(leaf.mean()) < 5 * 0.02 / leaf.size**0.5
    assert abs(leaf.std() - 0.02) < 5 * 0.02 / (2 * leaf.size) ** 0.5


def test_what_starts_at_zero(wide):
    zeros = ("bias", "modulation", "bridge", "final")
    for path, leaf in jax.tree_util.tree_leaves_with_path(wide):
        name = jax.tree_util.keystr(path)
        assert any(part in name for part in zeros) == (not leaf.any()), name


def leaf_at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)


def test_stacked_parameters_do_not_depend_on_how_they_are_computed(tokens):
    trees = [jax.jit(stack(scan).init)(KEY, *tokens) for scan in (True, False)]
    assert all(leaf.shape[0] == DEPTH for leaf in jax.tree.leaves(trees[0]))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def gradients(way, tokens):
    """The gradients of a stack computed in one way, and its output."""

    def loss(params, x, c):
        out = stack(*way).apply(params, x, c)[0]
        return jnp.sin(out).sum(), out

    params = random_params(stack().init, *tokens, scale=0.3)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, *tokens)


@pytest.fixture(scope="module")
def scanned(tokens):
    return gradients((True, "none"), tokens)


@pytest.mark.parametrize("way", [(False, "none"), (True, "dots"), (True, "full"), (False, "full")])
def test_scan_and_remat_change_neither_outputs_nor_gradients(tokens, scanned, way):
    assert all(abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(scanned))
    assert_close(gradients(way, tokens), scanned, 1e-4)


def test_the_bias_of_the_keys_changes_nothing_and_gets_no_gradient(tokens):
    """Rounding errors in its stead would depend on the layout, and Adam would make whole steps of them."""
    attention, x_BND = Attention(4, jnp.float32), tokens[0]
    params = random_params(lambda key: attention.init(key, x_BND)["params"])
    shifted = jax.tree.map(np.copy, params)
    shifted["qkv"]["bias"][1] += 1.0
    outputs = [attention.apply({"params": p}, x_BND) for p in (params, shifted)]
    assert_close(*outputs)
    bias = jax.grad(lambda p: jnp.square(attention.apply({"params": p}, x_BND)).sum())(params)["qkv"]["bias"]
    assert [bool(jnp.all(part != 0)) for part in bias] == [True, False, True]
    assert not bias[1].any()


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_the_kernel_is_attention(implementation, count):
    if implementation == "cudnn" and not has_cudnn_attention(jax.local_devices()[0]):
        pytest.skip("needs a GPU: PYTHONPATH=tests pytest --noconftest tests/models/test_layers.py -k kernel")
    dtype, tolerance = (jnp.float32, 2e-6) if implementation == "xla" else (jnp.bfloat16, 2e-2)
    q, k, v, d_out = jax.random.normal(jax.random.key(5), (4, 2, 3, count, 16)).astype(dtype)

    def value_and_gradients(attention, *operands):
        out, pullback = jax.vjp(attention, *operands[:3])
        return out, pullback(operands[3])

    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients(product_attention, *(x.astype(jnp.float32) for x in (q, k, v, d_out)))
        ours = value_and_gradients(lambda *qkv: cudnn_attention(*qkv, implementation), q, k, v, d_out)
    assert_close(jax.tree.map(lambda x: np.asarray(x, np.float32), ours), exact, tolerance)


def test_initialisation_needs_no_kernel(tokens):
    def refuse(*operands):
        raise NotImplementedError

    block = Block(heads=2, mlp_ratio=4.0, dtype=jnp.float32, attend=refuse)
    params = block.init(KEY, *tokens)
    with pytest.raises(NotImplementedError):
        block.apply(params, *tokens)


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_taps_are_the_outputs_of_blocks(scan, remat, tokens):
    """Of blocks in any order, with the gradients that reach the blocks through them."""
    deep = Stack(depth=3, heads=2, mlp_ratio=4.0, dtype=jnp.float32, scan=scan, remat=remat)
    params = random_params(deep.init, *tokens)["params"]

    def first_blocks(params, depth):
        alone = Stack(depth=depth, heads=2, mlp_ratio=4.0, dtype=jnp.float32, scan=scan, remat=remat)
        return alone.apply({"params": jax.tree.map(lambda leaf: leaf[:depth], params)}, *tokens)[0]

    def by_taps(params):
        out, tapped = deep.apply({"params": params}, *tokens, taps=(2, 1))
        return {3: out, **tapped}

    def by_parts(params):
        return {depth: first_blocks(params, depth) for depth in (1, 2, 3)}

    def gradient(outputs):
        return jax.jit(jax.grad(lambda p: sum(depth * jnp.square(x).sum() for depth, x in outputs(p).items())))(params)

    assert_close(jax.jit(by_taps)(params), jax.jit(by_parts)(params))
    assert_close(gradient(by_taps), gradient(by_parts), 1e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_tapped_tokens_have_cls_first(scan):
    network = make_network(tiny_config(changes={"model.scan": scan}))
    params = {"params": random_params(network.init)["encoder"]}
    visible = jnp.array([[0, 3, 4], [1, 2, 15]])
    encode = jax.jit(network.encoder.apply, static_argnames="taps")
    encoded = encode(params, *inputs(network.model), visible, taps=(1, 2))
    assert encoded.tapped[1].shape == encoded.tapped[2].shape == (2, 4, 32)
    np.testing.assert_array_equal(encoded.tapped[2][:, 0], encoded.cls_BD)
    np.testing.assert_array_equal(encoded.tapped[2][:, 1:], encoded.tokens_BVD)
    assert abs(encoded.tapped[1] - encoded.tapped[2]).max() > 1e-2
    without = encode(params, *inputs(network.model), visible)
    assert without.tapped == {}
    assert_close(without.tokens_BVD, encoded.tokens_BVD)


@pytest.mark.parametrize("null", ["zero", "row"])
def test_null_label_is_zero_or_a_row(null):
    embedding = LabelEmbedding(4, 32, null)
    params = random_params(embedding.init, jnp.zeros(1, jnp.int32))
    table = params["params"]["table"]
    assert len(table) == 4 + (null == "row")
    embedded = embedding.apply(params, jnp.array([0, 3, 4]))
    null_row = table[4] if null == "row" else np.zeros(32)
    np.testing.assert_array_equal(embedded, [table[0], table[3], null_row])


def test_layer_norm_keeps_float32_statistics_for_bfloat16():
    x = (100 + jax.random.normal(jax.random.key(0), (4, 512))).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    normed = layer_norm(x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(normed.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)

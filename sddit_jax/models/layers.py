"""The layers of a DiT (Peebles & Xie 2023): positions, conditioning, adaLN-Zero blocks and stacks of blocks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sddit_jax.models.attention import ATTENDED, XAVIER, Attend, Attention, product_attention

Constrain = Callable[[Any, str], Any]
# (output of the last block [B, N, D], outputs of tapped blocks by the block's number, from 1)
StackOutput = tuple[jax.Array, dict[int, jax.Array]]
NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
FREQUENCIES = 256
# The name of gathered weights, by which the policies of `rematerialise` do not keep them.
WEIGHTS = "weights"


def unconstrained(x: Any, kind: str) -> Any:
    """The default of `Hooks.constrain`, which leaves the layout of `x` to the compiler."""
    return x


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions by which code that knows the devices changes how the network is computed.

    constrain(x, kind): gives a tree of arrays its layout on the devices; kind is "tokens", "block" or "weights".
    attend(q, k, v): computes attention.
    """

    constrain: Constrain = unconstrained
    attend: Attend = product_attention


def positions_2d(width: int, side: int) -> np.ndarray:
    """Fixed sine-cosine embeddings of a side x side grid in raster order: float32 [side^2, width].

    The first width / 2 channels encode the column, the others the row. In each half the sines come first.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(coordinate, frequencies) for coordinate in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def sinusoid(t_B: jax.Array) -> jax.Array:
    """[cos | sin] of t at geometrically spaced frequencies from 1 to 1/10000: float32 [B, FREQUENCIES]."""
    half = FREQUENCIES // 2
    # Exponents in float32, as in DiT's code: with DDPM's t, up to 999, float64 gives other values.
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without affine parameters; statistics in float32, output in x's dtype."""
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def modulate(x_BND: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """x * (1 + scale) + shift, with one shift and scale for all tokens of an image."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


class TimeEmbedding(nn.Module):
    """c_noise [B] -> [B, width] in float32: bfloat16 would give neighbouring noise levels the same embedding."""

    width: int

    @nn.compact
    def __call__(self, c_noise_B: jax.Array) -> jax.Array:
        """`sinusoid`, then a two-layer MLP with SiLU."""
        highest = {"kernel_init": NORMAL, "precision": jax.lax.Precision.HIGHEST}
        hidden = nn.silu(nn.Dense(self.width, name="hidden", **highest)(sinusoid(c_noise_B)))
        return nn.Dense(self.width, name="out", **highest)(hidden)


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, width]. The label `num_classes` is the null label.

    null: the embedding of the null label, "zero" for zeros (MaskDiT) or "row" for a learnt row (DiT).
    """

    num_classes: int
    width: int
    null: str

    @nn.compact
    def __call__(self, label_B: jax.Array) -> jax.Array:
        """int32 [B] -> float32 [B, width]."""
        rows = self.num_classes + (self.null == "row")
        table = self.param("table", NORMAL, (rows, self.width))
        # A matrix product in place of a look-up: the look-up's gradient is a scatter-add, whose order is not fixed on
        # every device. A label without a row gives zeros.
        return jnp.matmul(jax.nn.one_hot(label_B, rows), table, precision=jax.lax.Precision.HIGHEST)


class Modulation(nn.Module):
    """`count` arrays [B, width] from the condition [B, C], for adaLN. They start at zero."""

    count: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, condition_BC: jax.Array) -> list[jax.Array]:
        """SiLU, then a linear map."""
        linear = nn.DenseGeneral((self.count, self.width), dtype=self.dtype, kernel_init=ZEROS, name="linear")
        out_BKD = linear(nn.silu(condition_BC).astype(self.dtype))
        return [out_BKD[:, k] for k in range(self.count)]


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        # All tokens as one matrix: XLA's CPU backend takes 1.4 times as long in three dimensions.
        width = x_BND.shape[-1]
        hidden = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=XAVIER, name="hidden")(x_BND.reshape(-1, width))
        hidden = nn.gelu(hidden, approximate=True)
        return nn.Dense(width, dtype=self.dtype, kernel_init=XAVIER, name="out")(hidden).reshape(x_BND.shape)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: x += gate * branch(modulated norm of x), for attention and MLP."""

    heads: int
    mlp_ratio: float
    dtype: Any
    attend: Attend = product_attention

    @nn.compact
    def __call__(self, x_BND: jax.Array, condition_BC: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D] under the condition [B, C]."""
        width = x_BND.shape[-1]
        attention = Attention(self.heads, self.dtype, self.attend, name="attention")
        mlp = MLP(int(width * self.mlp_ratio), self.dtype, name="mlp")
        modulation = Modulation(6, width, self.dtype, name="modulation")(condition_BC)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x_BND = x_BND + gate_a[:, None] * attention(modulate(layer_norm(x_BND), shift_a, scale_a))
        return x_BND + gate_m[:, None] * mlp(modulate(layer_norm(x_BND), shift_m, scale_m))


def rematerialise(function: Callable, policy: str, prevent_cse: bool) -> Callable:
    """`function`, of which the backward pass recomputes a part that `policy` names.

    "none": only the gathering of weights; "dots": everything but matrix products and attention; "full": everything.
    """
    policies = jax.checkpoint_policies
    policies = {
        "none": policies.save_anything_except_these_names(WEIGHTS),
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENDED)
        ),
        "full": None,
    }
    return jax.checkpoint(function, policy=policies[policy], prevent_cse=prevent_cse)


class Stack(nn.Module):
    """`depth` blocks, with parameters stacked on axis 0. scan: compile one block and loop over it, else unroll."""

    depth: int
    heads: int
    mlp_ratio: float
    dtype: Any
    scan: bool
    remat: str
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(self, x_BND: jax.Array, condition_BC: jax.Array, taps: Sequence[int] = ()) -> StackOutput:
        """[B, N, D] under the condition [B, C] -> the output. taps: numbers of the tapped blocks."""
        constrain = self.hooks.constrain
        block = Block(self.heads, self.mlp_ratio, self.dtype, self.hooks.attend, parent=None)

        def init(key: jax.Array) -> Any:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda k: block.init(k, x_BND, condition_BC)["params"])(keys)

        def body(x_BND: jax.Array, block_params: Any) -> jax.Array:
            # Cast before the weights are gathered: in bfloat16 half as many bytes are sent.
            block_params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), block_params)
            block_params = checkpoint_name(constrain(block_params, "block"), WEIGHTS)
            x_BND = block.apply({"params": block_params}, x_BND, condition_BC)
            return constrain(x_BND, "tokens")

        # self.param would trace `init` at each call to compare shapes; blocks and loop compare them anyway.
        params = self.param("blocks", init) if self.is_initializing() else self.variables["params"]["blocks"]
        # On one device nothing is gathered, and jax.checkpoint would only copy what it keeps.
        if self.remat != "none" or constrain is not unconstrained:
            body = rematerialise(body, self.remat, prevent_cse=not self.scan)
        if self.scan:
            return _scanned(body, x_BND, params, self.depth, taps)
        return _unrolled(body, x_BND, params, self.depth, taps)


def _scanned(body: Callable, x_BND: jax.Array, params: Any, depth: int, taps: Sequence[int]) -> StackOutput:
    """A compiled loop over the blocks. Each tapped output has a row; a further row takes all others and is dropped."""
    if not taps:
        return jax.lax.scan(lambda x, p: (body(x, p), None), x_BND, params, length=depth)[0], {}
    row_of = {block: row for row, block in enumerate(taps)}
    rows = jnp.asarray([row_of.get(block, len(taps)) for block in range(1, depth + 1)])

    def tapping(carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple, None]:
        (x_BND, tapped), (block_params, row) = carry, xs
        x_BND = body(x_BND, block_params)
        return (x_BND, jax.lax.dynamic_update_index_in_dim(tapped, x_BND, row, axis=0)), None

    start = x_BND, jnp.zeros((len(taps) + 1, *x_BND.shape), x_BND.dtype)
    (x_BND, tapped), _ = jax.lax.scan(tapping, start, (params, rows), length=depth)
    return x_BND, {block: tapped[row] for block, row in row_of.items()}


def _unrolled(body: Callable, x_BND: jax.Array, params: Any, depth: int, taps: Sequence[int]) -> StackOutput:
    """A Python loop over the blocks, whose body is traced once."""
    body, tapped = jax.jit(body), {}
    # The transpose of lax.split is one concatenation; that of slicing would add `depth` arrays padded to full size.
    leaves, treedef = jax.tree.flatten(params)
    layers = zip(*(jax.lax.split(leaf, (1,) * depth) for leaf in leaves), strict=True)
    for block, layer in enumerate(layers, 1):
        x_BND = body(x_BND, treedef.unflatten([leaf.squeeze(0) for leaf in layer]))
        if block in taps:
            tapped[block] = x_BND
    return x_BND, tapped

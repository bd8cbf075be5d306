"""The layers of a DiT (Peebles & Xie 2023): positions, conditioning, adaLN-Zero blocks and their stack."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Constrain = Callable[[Any, str], Any]
XAVIER = nn.initializers.xavier_uniform()
NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
FREQUENCIES = 256
# Names of values that rematerialisation may keep.
WEIGHTS, ATTENDED = "weights", "attended"


def unconstrained(x: Any, kind: str) -> Any:
    """The default of `constrain`: leaves the layout of `x` to the compiler."""
    del kind
    return x


def positions_2d(width: int, side: int) -> np.ndarray:
    """Fixed sine-cosine positions of a side x side grid in raster order: float32 [side^2, width].

    Channels [0, width/2) encode the column and the others the row; in each half the sines come first.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(coordinate, frequencies) for coordinate in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def sinusoid(t_B: jax.Array, width: int = FREQUENCIES) -> jax.Array:
    """[cos | sin] of t at geometrically spaced frequencies from 1 to 1/10000: float32 [B, width]."""
    half = width // 2
    # DiT's code has the exponents in float32; with DDPM's t, up to 999, the difference shows.
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
    """x * (1 + scale) + shift, the same for all tokens of an image."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


class TimeEmbedding(nn.Module):
    """c_noise [B] -> [B, width], wholly in float32: bfloat16 could not tell neighbouring noise levels apart."""

    width: int

    @nn.compact
    def __call__(self, c_noise_B: jax.Array) -> jax.Array:
        """Sinusoid and a two-layer MLP."""
        highest = {"kernel_init": NORMAL, "precision": jax.lax.Precision.HIGHEST}
        hidden = nn.silu(nn.Dense(self.width, name="hidden", **highest)(sinusoid(c_noise_B)))
        return nn.Dense(self.width, name="out", **highest)(hidden)


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, width]. The label `num_classes` is the null label, and is defined only here.

    null "zero": it has no parameters and embeds to zeros (MaskDiT); "row": it is a learnt row (DiT).
    """

    num_classes: int
    width: int
    null: str

    @nn.compact
    def __call__(self, label_B: jax.Array) -> jax.Array:
        """float32 [B, width]."""
        rows = self.num_classes + (self.null == "row")
        table = self.param("table", NORMAL, (rows, self.width))
        # As a product: its gradient is one too, and no scatter-add, whose order is not fixed on every device. A label
        # that is no row gives zeros.
        return jnp.matmul(jax.nn.one_hot(label_B, rows), table, precision=jax.lax.Precision.HIGHEST)


class Modulation(nn.Module):
    """adaLN's parameters from the condition [B, C]: `count` arrays [B, width], zero at the start."""

    count: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, condition_BC: jax.Array) -> list[jax.Array]:
        """SiLU, then a linear map."""
        out_BKD = nn.DenseGeneral((self.count, self.width), dtype=self.dtype, kernel_init=ZEROS, name="linear")(
            nn.silu(condition_BC).astype(self.dtype)
        )
        return [out_BKD[:, k] for k in range(self.count)]


def promote_without_key_bias(
    x_BND: jax.Array, kernel_DTHC: jax.Array, bias_THC: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Flax's promotion to `dtype`, after which k's bias gets no gradient.

    It adds one number to all logits of a query, and the softmax takes no notice: the gradient is 0. What is computed
    instead are rounding errors, which depend on the layout, and of which Adam would make steps of full length.
    """
    x_BND, kernel_DTHC, bias_THC = nn.dtypes.promote_dtype(x_BND, kernel_DTHC, bias_THC, dtype=dtype)
    return x_BND, kernel_DTHC, bias_THC.at[1].set(jax.lax.stop_gradient(bias_THC[1]))


def attention(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v, [B, H, N, C] in v's dtype; the softmax is float32.

    The backward pass computes the softmax again, as in FlashAttention (Dao et al. 2022): what is kept of a block does
    not grow with N^2. On NVIDIA's GPUs and in bfloat16 it is cuDNN's kernel, elsewhere products as XLA fuses them.
    """
    channels = q_BHNC.shape[-1]
    in_one_kernel = q_BHNC.dtype == jnp.bfloat16 and channels % 8 == 0 and channels <= 128 and has_cudnn_attention()
    return (flash_attention if in_one_kernel else product_attention)(q_BHNC, k_BHNC, v_BHNC)


def has_cudnn_attention() -> bool:
    """Whether the devices are GPUs that cuDNN has a fused attention for, NVIDIA's since Ampere."""
    device = jax.local_devices()[0]
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return cuda and float(device.compute_capability) >= 8


def flash_attention(
    q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """`attention`, [B, H, N, C], by jax.nn's `implementation`: cuDNN's takes bfloat16 and multiples of 8 channels.

    Where a backward pass recomputes anything it computes all of this again: the kernel's own residuals have no name.
    """
    tokens = q_BHNC.shape[2]
    # JAX refuses odd numbers of tokens for cuDNN: they get one more, which nothing attends to.
    padding = ((0, 0), (0, tokens % 2), (0, 0), (0, 0))
    q_BNHC, k_BNHC, v_BNHC = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q_BHNC, k_BHNC, v_BHNC))
    keys_B = jnp.full(len(q_BNHC), tokens, jnp.int32) if tokens % 2 else None
    out_BNHC = jax.nn.dot_product_attention(
        q_BNHC, k_BNHC, v_BNHC, key_value_seq_lengths=keys_B, implementation=implementation
    )
    return out_BNHC[:, :tokens].swapaxes(1, 2)


@jax.custom_vjp
def product_attention(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> jax.Array:
    """`attention`, [B, H, N, C], as matrix products and a softmax."""
    return _attention_forward(q_BHNC, k_BHNC, v_BHNC)[0]


def _attention_logits(q_BHNC: jax.Array, k_BHNC: jax.Array) -> jax.Array:
    scaled_BHNC = q_BHNC * q_BHNC.shape[-1] ** -0.5
    return jnp.einsum("bhqc,bhkc->bhqk", scaled_BHNC, k_BHNC, preferred_element_type=jnp.float32)


def _attention_forward(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> tuple[jax.Array, tuple]:
    logits_BHNN = _attention_logits(q_BHNC, k_BHNC)
    exp_BHNN = jnp.exp(logits_BHNN - logits_BHNN.max(axis=-1, keepdims=True))
    # Divided after the product: C numbers of a query instead of N. The sums are not kept for the backward pass: with a
    # second result XLA would not make one kernel of softmax and products, on TPU and CPU.
    out_BHNC = jnp.einsum("bhqk,bhkc->bhqc", exp_BHNN.astype(v_BHNC.dtype), v_BHNC, preferred_element_type=jnp.float32)
    out_BHNC = (out_BHNC / exp_BHNN.sum(axis=-1, keepdims=True)).astype(v_BHNC.dtype)
    out_BHNC = checkpoint_name(out_BHNC, ATTENDED)
    return out_BHNC, (q_BHNC, k_BHNC, v_BHNC, out_BHNC)


def _attention_backward(residuals: tuple, d_out_BHNC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BHNC, k_BHNC, v_BHNC, out_BHNC = residuals
    dtype, scale = v_BHNC.dtype, q_BHNC.shape[-1] ** -0.5
    p_BHNN = jax.nn.softmax(_attention_logits(q_BHNC, k_BHNC))
    d_p_BHNN = jnp.einsum("bhqc,bhkc->bhqk", d_out_BHNC, v_BHNC, preferred_element_type=jnp.float32)
    mean_BHN1 = (d_out_BHNC.astype(jnp.float32) * out_BHNC).sum(axis=-1, keepdims=True)
    d_logits_BHNN = (p_BHNN * (d_p_BHNN - mean_BHN1)).astype(dtype)
    d_q_BHNC = jnp.einsum("bhqk,bhkc->bhqc", d_logits_BHNN, k_BHNC) * scale
    d_k_BHNC = jnp.einsum("bhqk,bhqc->bhkc", d_logits_BHNN, q_BHNC * scale)
    d_v_BHNC = jnp.einsum("bhqk,bhqc->bhkc", p_BHNN.astype(dtype), d_out_BHNC)
    return d_q_BHNC, d_k_BHNC, d_v_BHNC


product_attention.defvjp(_attention_forward, _attention_backward)


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D] with biases; q, k and v are one kernel (D, 3, heads, D/heads)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """[B, N, D] in the policy's dtype; the softmax is float32."""
        width = x_BND.shape[-1]
        qkv_BNTHC = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=XAVIER,
            promote_dtype=promote_without_key_bias,
            name="qkv",
        )(x_BND)
        # lax.split's transpose is one concatenation; that of slicing adds three arrays padded to full size.
        q, k, v = (x.squeeze(0) for x in jax.lax.split(qkv_BNTHC.transpose(2, 0, 3, 1, 4), (1, 1, 1)))
        # Parameters need no kernel, and some versions of JAX cannot vmap cuDNN's, as Stack's init does.
        attend = product_attention if self.is_initializing() else attention
        out_BNHC = attend(q, k, v).swapaxes(1, 2)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, kernel_init=XAVIER, name="out")(out_BNHC)


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        # As a matrix of all tokens: XLA's CPU backend takes 1.4 times as long for the same in three dimensions.
        x_TD = x_BND.reshape(-1, x_BND.shape[-1])
        hidden = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=XAVIER, name="hidden")(x_TD)
        out_TD = nn.Dense(x_BND.shape[-1], dtype=self.dtype, kernel_init=XAVIER, name="out")(
            nn.gelu(hidden, approximate=True)
        )
        return out_TD.reshape(x_BND.shape)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: x += gate * branch(modulated norm of x), for attention and MLP."""

    heads: int
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, condition_BC: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D] under the condition [B, C]."""
        width = x_BND.shape[-1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = Modulation(6, width, self.dtype, name="modulation")(
            condition_BC
        )
        attended = Attention(self.heads, self.dtype, name="attention")(modulate(layer_norm(x_BND), shift_a, scale_a))
        x_BND = x_BND + gate_a[:, None] * attended
        hidden = MLP(int(width * self.mlp_ratio), self.dtype, name="mlp")(modulate(layer_norm(x_BND), shift_m, scale_m))
        return x_BND + gate_m[:, None] * hidden


def rematerialise(function: Callable, policy: str, prevent_cse: bool) -> Callable:
    """`function` whose backward pass recomputes: 'none', all but matrix products ('dots'), or 'full'.

    Gathered weights are always gathered again rather than kept.
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
    """`depth` blocks. Their parameters are stacked on axis 0 however they are computed.

    `scan` compiles one block and loops over it; otherwise the loop is unrolled.
    """

    depth: int
    heads: int
    mlp_ratio: float
    dtype: Any
    scan: bool
    remat: str
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, condition_BC: jax.Array, return_hidden: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """The last block's output [B, N, D], and if asked for each block's, stacked: [depth, B, N, D]."""
        block = Block(self.heads, self.mlp_ratio, self.dtype, parent=None)

        def init(key: jax.Array) -> Any:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda k: block.init(k, x_BND, condition_BC)["params"])(keys)

        def body(x_BND: jax.Array, block_params: Any) -> tuple[jax.Array, jax.Array | None]:
            # Cast first: half as much is gathered.
            block_params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), block_params)
            block_params = checkpoint_name(self.constrain(block_params, "block"), WEIGHTS)
            x_BND = block.apply({"params": block_params}, x_BND, condition_BC)
            x_BND = self.constrain(x_BND, "tokens")
            return x_BND, x_BND if return_hidden else None

        # Flax would trace `init` at each call to compare shapes: the blocks compare theirs, scan and split the depth.
        params = self.param("blocks", init) if self.is_initializing() else self.variables["params"]["blocks"]
        # jax.checkpoint copies what it keeps, and on one device there is nothing to gather again.
        if self.remat != "none" or self.constrain is not unconstrained:
            body = rematerialise(body, self.remat, prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(body, x_BND, params, length=self.depth)
        # Traced once for all blocks.
        body = jax.jit(body)
        # lax.split's transpose is one concatenation; that of slicing adds `depth` arrays padded to full size.
        leaves, treedef = jax.tree.flatten(params)
        layers = zip(*(jax.lax.split(leaf, (1,) * self.depth) for leaf in leaves), strict=True)
        hidden = []
        for layer in layers:
            x_BND, out = body(x_BND, treedef.unflatten([leaf.squeeze(0) for leaf in layer]))
            hidden.append(out)
        return x_BND, jnp.stack(hidden) if return_hidden else None

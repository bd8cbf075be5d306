"""Self-attention: as matrix products, as cuDNN's kernel, and the layer that uses either."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# (q, k, v), each [B, H, N, C] -> [B, H, N, C]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
XAVIER = nn.initializers.xavier_uniform()
# The name of attention's result, by which a policy of rematerialisation keeps it.
ATTENDED = "attended"


@jax.custom_vjp
def product_attention(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v as matrix products: [B, H, N, C] in v's dtype; the softmax is float32.

    The backward pass computes the softmax again, as in FlashAttention (Dao et al. 2022), so that the memory kept for it
    does not grow with N^2.
    """
    return _attention_forward(q_BHNC, k_BHNC, v_BHNC)[0]


def _attention_logits(q_BHNC: jax.Array, k_BHNC: jax.Array) -> jax.Array:
    scaled_BHNC = q_BHNC * q_BHNC.shape[-1] ** -0.5
    return jnp.einsum("bhqc,bhkc->bhqk", scaled_BHNC, k_BHNC, preferred_element_type=jnp.float32)


def _attention_forward(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> tuple[jax.Array, tuple]:
    logits_BHNN = _attention_logits(q_BHNC, k_BHNC)
    exp_BHNN = jnp.exp(logits_BHNN - logits_BHNN.max(axis=-1, keepdims=True))
    # The division comes after the product, on C values of a query instead of N. The sums are not kept for the backward
    # pass: with a second result XLA would not fuse softmax and products into one kernel on TPU and CPU.
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


def cudnn_attention(
    q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """`product_attention` by an implementation of jax.nn: cuDNN's takes bfloat16 and a C up to 128, a multiple of 8.

    A backward pass that recomputes anything computes attention again, since the kernel's residuals have no name.
    """
    tokens = q_BHNC.shape[2]
    # JAX refuses an odd number of tokens for cuDNN. Such a sequence gets one more token, to which no token attends.
    padding = ((0, 0), (0, tokens % 2), (0, 0), (0, 0))
    q_BNHC, k_BNHC, v_BNHC = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q_BHNC, k_BHNC, v_BHNC))
    keys_B = jnp.full(len(q_BNHC), tokens, jnp.int32) if tokens % 2 else None
    out_BNHC = jax.nn.dot_product_attention(
        q_BNHC, k_BNHC, v_BNHC, key_value_seq_lengths=keys_B, implementation=implementation
    )
    return out_BNHC[:, :tokens].swapaxes(1, 2)


def promote_without_key_bias(
    x_BND: jax.Array, kernel_DTHC: jax.Array, bias_THC: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Flax's promotion to `dtype`, without a gradient for the bias of k.

    The bias of k adds one value to all logits of a query, which does not change the softmax: its gradient is 0. A
    computed gradient would consist of rounding errors, which Adam would scale up to steps of full length.
    """
    x_BND, kernel_DTHC, bias_THC = nn.dtypes.promote_dtype(x_BND, kernel_DTHC, bias_THC, dtype=dtype)
    return x_BND, kernel_DTHC, bias_THC.at[1].set(jax.lax.stop_gradient(bias_THC[1]))


class Attention(nn.Module):
    """Multi-head self-attention with biases. q, k and v have one kernel: (D, 3, heads, D / heads)."""

    heads: int
    dtype: Any
    attend: Attend = product_attention

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D] in `dtype`; the softmax is float32."""
        width = x_BND.shape[-1]
        qkv_BNTHC = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=XAVIER,
            promote_dtype=promote_without_key_bias,
            name="qkv",
        )(x_BND)
        # The transpose of lax.split is one concatenation; that of slicing would add three arrays padded to full size.
        q, k, v = (x.squeeze(0) for x in jax.lax.split(qkv_BNTHC.transpose(2, 0, 3, 1, 4), (1, 1, 1)))
        # `Stack` initialises its blocks by vmap, which some versions of JAX cannot do to cuDNN's kernel.
        attend = product_attention if self.is_initializing() else self.attend
        out_BNHC = attend(q, k, v).swapaxes(1, 2)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, kernel_init=XAVIER, name="out")(out_BNHC)

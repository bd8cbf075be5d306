"""The encoder, the decoder and the projection head of SD-DiT.

They are three modules with three parameter trees, {"encoder", "decoder", "head"}, since the teacher is the EMA of
the first and the last, and each loss reaches its own share of them. The embeddings of patches, noise level and
label belong to the encoder; the decoder reads their outputs.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sddit_jax.config import schema
from sddit_jax.models.layers import (
    NORMAL,
    XAVIER,
    ZEROS,
    Constrain,
    LabelEmbedding,
    Modulation,
    Stack,
    TimeEmbedding,
    layer_norm,
    modulate,
    positions_2d,
    unconstrained,
)
from sddit_jax.models.masking import Mask, put_back, take


@flax.struct.dataclass
class Encoded:
    """What the encoder gives: [CLS] or None, the encoded visible tokens, all embedded tokens, the condition."""

    cls_BD: jax.Array | None
    tokens_BVD: jax.Array
    embedded_BND: jax.Array
    condition_BD: jax.Array
    hidden: jax.Array | None = None


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """Non-overlapping patches in raster order, each flattened as (row, column, channel): [B, N, p*p*C]."""
    batch, height, width, channels = x_BHWC.shape
    grid = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches_BNP: jax.Array, patch: int, channels: int) -> jax.Array:
    """The inverse of `patchify` for square images."""
    batch, tokens, _ = patches_BNP.shape
    side = round(tokens**0.5)
    grid = patches_BNP.reshape(batch, side, side, patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * patch, side * patch, channels)


class Encoder(nn.Module):
    """Patch, position, time and label embeddings, an optional [CLS] token, and adaLN-Zero blocks."""

    model: schema.Model
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        c_noise_B: jax.Array,
        label_B: jax.Array,
        visible_BV: jax.Array | None = None,
        return_hidden: bool = False,
    ) -> Encoded:
        """Encodes the tokens at `visible_BV` (all of them if None).

        x_BHWC: c_in * x. label_B: int32, `num_classes` for the null label; not read when there are no classes.
        return_hidden: also give every block's output, [CLS] first if there is one: [depth, B, 1 + V, D].
        """
        m = self.model
        dtype = jnp.dtype(m.dtype)
        condition_BD = TimeEmbedding(m.width, name="time")(c_noise_B)
        if m.num_classes:
            condition_BD += LabelEmbedding(m.num_classes, m.width, m.null_label, name="label")(label_B)
        patches_BNP = patchify(x_BHWC.astype(dtype), m.patch)
        embedded_BND = nn.Dense(m.width, dtype=dtype, kernel_init=XAVIER, name="patch")(patches_BNP)
        embedded_BND += positions_2d(m.width, m.image_size // m.patch).astype(dtype)[None]
        embedded_BND = self.constrain(embedded_BND, "tokens")
        tokens = embedded_BND if visible_BV is None else take(embedded_BND, visible_BV)
        if m.cls_token:
            cls_D = self.param("cls", NORMAL, (m.width,)).astype(dtype)
            cls_B1D = jnp.broadcast_to(cls_D, (tokens.shape[0], 1, m.width))
            tokens = jnp.concatenate([cls_B1D, tokens], axis=1)
        tokens, hidden = Stack(m.depth, m.heads, m.mlp_ratio, dtype, m.scan, m.remat, self.constrain, name="stack")(
            self.constrain(tokens, "tokens"), condition_BD, return_hidden
        )
        return Encoded(
            cls_BD=tokens[:, 0] if m.cls_token else None,
            tokens_BVD=tokens[:, 1:] if m.cls_token else tokens,
            embedded_BND=embedded_BND,
            condition_BD=condition_BD,
            hidden=hidden,
        )


class FinalLayer(nn.Module):
    """Norm, modulation and a linear map, zero at the start: tokens [B, N, D] -> [B, N, width]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BND: jax.Array, condition_BC: jax.Array) -> jax.Array:
        """Also serves as the projection from the encoder's width to the decoder's."""
        shift, scale = Modulation(2, tokens_BND.shape[-1], self.dtype, name="modulation")(condition_BC)
        modulated = modulate(layer_norm(tokens_BND), shift, scale)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=ZEROS, name="linear")(modulated)


class Decoder(nn.Module):
    """From encoded tokens to the network's output F, in the layout of MaskDiT's decoder.

    fill "noisy": invisible positions get the embedded noisy tokens, through the same projection; "mask_token": a
    learnt token after the projection; "zeros": zeros after it. With decoder_depth 0 only the final layer is left, as
    in DiT.
    """

    model: schema.Model
    fill: str = "noisy"
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, encoded: Encoded, mask: Mask | None = None) -> jax.Array:
        """F as an image [B, H, W, C]; with `learn_sigma` [B, H, W, 2C], the learnt variance behind it."""
        m = self.model
        dtype = jnp.dtype(m.dtype)
        tokens, condition = encoded.tokens_BVD, encoded.condition_BD
        if m.decoder_depth:
            bridge = FinalLayer(m.decoder_width, dtype, name="bridge")
            if self.fill == "noisy":
                if mask is not None:
                    tokens = put_back(tokens, take(encoded.embedded_BND, mask.hidden_BM), mask)
                tokens = bridge(tokens, condition)
            else:
                fill_D = jnp.zeros(m.decoder_width, dtype)
                if self.fill == "mask_token":
                    fill_D = self.param("mask_token", NORMAL, (m.decoder_width,)).astype(dtype)
                tokens = bridge(tokens, condition)
                if mask is not None:
                    hidden_shape = (*mask.hidden_BM.shape, m.decoder_width)
                    tokens = put_back(tokens, jnp.broadcast_to(fill_D, hidden_shape), mask)
            tokens += positions_2d(m.decoder_width, m.image_size // m.patch).astype(dtype)[None]
            tokens, _ = Stack(
                m.decoder_depth, m.decoder_heads, m.mlp_ratio, dtype, m.scan, m.remat,
                self.constrain, name="stack",
            )(self.constrain(tokens, "tokens"), condition)  # fmt: skip
        channels = m.channels * (1 + m.learn_sigma)
        patches_BNP = FinalLayer(m.patch**2 * channels, dtype, name="final")(tokens, condition)
        return unpatchify(patches_BNP, m.patch, channels)


class Head(nn.Module):
    """The projection head: LayerNorm, a three-layer GELU MLP, and K prototypes of unit norm (DINO, iBOT).

    The residual stream that it reads has no norm of its own, hence the LayerNorm.
    """

    width: int
    bottleneck: int
    prototypes: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [..., D] -> unit vectors [..., E] and prototypes [K, E], float32; logits are their products."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.truncated_normal(0.02), name=name)

        hidden = nn.gelu(dense(self.width, "mlp_0")(layer_norm(tokens)), approximate=False)
        hidden = nn.gelu(dense(self.width, "mlp_1")(hidden), approximate=False)
        out = dense(self.bottleneck, "mlp_2")(hidden)
        bound = self.bottleneck**-0.5
        prototypes_KE = self.param(
            "prototypes",
            lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (self.prototypes, self.bottleneck),
        )
        return unit(out.astype(jnp.float32)), unit(prototypes_KE)


def unit(x: jax.Array) -> jax.Array:
    """x over its norm on the last axis, at least 1e-12, with a finite gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class Network:
    """The three modules of one configuration and what is computed with them. Holds no arrays.

    A tree of parameters is {"encoder": ..., "decoder": ..., "head": ...}; without the discrimination objective
    there is no head.
    """

    def __init__(self, config: schema.Config, constrain: Constrain = unconstrained) -> None:
        self.model = config.model
        self.constrain = constrain
        self.encoder = Encoder(config.model, constrain)
        self.decoder = Decoder(config.model, config.masking.fill, constrain)
        d = config.objectives.discrimination
        self.head = Head(d.head_width, d.bottleneck, d.prototypes, jnp.dtype(config.model.dtype)) if d.weight else None

    @property
    def tokens(self) -> int:
        """Patch tokens of an image."""
        return (self.model.image_size // self.model.patch) ** 2

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters."""
        m = self.model
        encoder_key, decoder_key, head_key = jax.random.split(key, 3)
        x_BHWC = jnp.zeros((1, m.image_size, m.image_size, m.channels))
        zeros_B = jnp.zeros((1,))
        encoded, encoder = self.encoder.init_with_output(encoder_key, x_BHWC, zeros_B, zeros_B.astype(jnp.int32))
        params = {
            "encoder": encoder["params"],
            "decoder": self.decoder.init(decoder_key, encoded)["params"],
        }
        if self.head is not None:
            params["head"] = self.head.init(head_key, encoded.tokens_BVD)["params"]
        return params

    def encode(
        self,
        params: Any,
        x_BHWC: jax.Array,
        c_noise_B: jax.Array,
        label_B: jax.Array,
        mask: Mask | None = None,
        return_hidden: bool = False,
    ) -> Encoded:
        """The encoder on the visible tokens (all if `mask` is None); see `Encoder`."""
        visible_BV = None if mask is None else mask.visible_BV
        variables = {"params": self.constrain(params["encoder"], "weights")}
        return self.encoder.apply(variables, x_BHWC, c_noise_B, label_B, visible_BV, return_hidden)

    def decode(self, params: Any, encoded: Encoded, mask: Mask | None = None) -> jax.Array:
        """The decoder: F, [B, H, W, C], or with `learn_sigma` [B, H, W, 2C]."""
        return self.decoder.apply({"params": self.constrain(params["decoder"], "weights")}, encoded, mask)

    def project(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The head: unit vectors [..., E] and prototypes [K, E]."""
        vectors, prototypes_KE = self.head.apply({"params": self.constrain(params["head"], "weights")}, tokens)
        return self.constrain(vectors, "tokens"), prototypes_KE

    def __call__(self, params: Any, x_BHWC: jax.Array, c_noise_B: jax.Array, label_B: jax.Array) -> jax.Array:
        """F as inference computes it: encoder and decoder on all tokens; see `decode`."""
        return self.decode(params, self.encode(params, x_BHWC, c_noise_B, label_B))

"""The encoder and the decoder of SD-DiT.

They are two modules with two parameter trees, {"encoder", "decoder"}, since the teacher is an EMA of the first alone.
The embeddings of patches, noise level and label belong to the encoder; the decoder reads their outputs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError
from sddit_jax.models.attention import XAVIER
from sddit_jax.models.layers import (
    NORMAL,
    ZEROS,
    Hooks,
    LabelEmbedding,
    Modulation,
    Stack,
    TimeEmbedding,
    layer_norm,
    modulate,
    positions_2d,
)
from sddit_jax.models.masking import Mask, put_back, take
from sddit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. `config.sizes.parse_size` names the published sizes; any other numbers are as good."""

    image_size: int = setting(32, "I", "height and width of what the network sees (latents of 256 px: 32)", least=1)
    channels: int = setting(4, "I", "channels of what the network sees", least=1)
    num_classes: int = setting(1000, "I", "class labels; 0 trains without labels", least=0)
    patch: int = setting(2, "I", "height and width of a patch", least=1)
    depth: int = setting(28, "I", "encoder blocks", least=1)
    width: int = setting(1152, "I", "encoder width", least=1)
    heads: int = setting(16, "I", "encoder attention heads", least=1)
    mlp_ratio: float = setting(4.0, "I", "hidden width of a block's MLP over its width", above=0)
    decoder_depth: int = setting(8, "I", "decoder blocks; 0 puts the final layer on the encoder (DiT)", least=0)
    decoder_width: int = setting(512, "I", "decoder width", least=1)
    decoder_heads: int = setting(16, "I", "decoder attention heads", least=1)
    cls_token: bool = setting(True, "S", "whether the encoder carries a [CLS] token")
    null_label: str = setting(
        "zero", "I", "the dropped label: 'zero' vector (MaskDiT) or a learnt 'row' (DiT)", choices=("zero", "row")
    )
    learn_sigma: bool = setting(False, "I", "twice the output channels, as DiT's checkpoints have")
    attention: str = setting(
        "auto",
        "C",
        "kernel of attention: matrix 'products', 'cudnn', or 'auto': cudnn on the GPUs that have it, in bfloat16",
        choices=("auto", "products", "cudnn"),
    )
    scan: bool = setting(True, "C", "one compiled block in a loop (fast to compile), or unrolled")
    remat: str = setting(
        "none", "C", "what the backward pass recomputes: none, dots or full", choices=("none", "dots", "full")
    )
    dtype: str = setting(
        "float32", "C", "dtype of the matrix products: float32 or bfloat16", choices=("float32", "bfloat16")
    )

    @property
    def tokens(self) -> int:
        """Patch tokens of an image."""
        return (self.image_size // self.patch) ** 2

    def check(self) -> None:
        """Raises ConfigError for sizes that do not divide each other."""
        if self.image_size % self.patch:
            raise ConfigError(f"model.image_size {self.image_size} is not divisible by model.patch {self.patch}")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            if w % h:
                raise ConfigError(f"model.{width} {w} is not divisible by model.{heads} {h}")
            if w % 4:
                raise ConfigError(f"model.{width} {w} is not divisible by 4, as the 2-D sine-cosine positions need")


@flax.struct.dataclass
class Encoded:
    """What the encoder gives: [CLS] or None, the encoded visible tokens, all embedded tokens, the condition.

    tapped: number of a block, from 1, -> its output [B, 1 + V, D], [CLS] first; without [CLS] it is [B, V, D].
    """

    cls_BD: jax.Array | None
    tokens_BVD: jax.Array
    embedded_BND: jax.Array
    condition_BD: jax.Array
    tapped: dict[int, jax.Array]


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

    model: ModelConfig
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        c_noise_B: jax.Array,
        label_B: jax.Array,
        visible_BV: jax.Array | None = None,
        taps: Sequence[int] = (),
    ) -> Encoded:
        """Encodes the tokens at `visible_BV` (all of them if None).

        x_BHWC: c_in * x. label_B: int32, `Network.null_label` for the null label; not read when there are no classes.
        taps: the blocks, from 1, whose outputs `Encoded.tapped` is to have.
        """
        m = self.model
        dtype = jnp.dtype(m.dtype)
        condition_BD = TimeEmbedding(m.width, name="time")(c_noise_B)
        if m.num_classes:
            condition_BD += LabelEmbedding(m.num_classes, m.width, m.null_label, name="label")(label_B)
        patches_BNP = patchify(x_BHWC.astype(dtype), m.patch)
        embedded_BND = nn.Dense(m.width, dtype=dtype, kernel_init=XAVIER, name="patch")(patches_BNP)
        embedded_BND += positions_2d(m.width, m.image_size // m.patch).astype(dtype)[None]
        embedded_BND = self.hooks.constrain(embedded_BND, "tokens")
        tokens = embedded_BND if visible_BV is None else take(embedded_BND, visible_BV)
        if m.cls_token:
            cls_D = self.param("cls", NORMAL, (m.width,)).astype(dtype)
            cls_B1D = jnp.broadcast_to(cls_D, (tokens.shape[0], 1, m.width))
            tokens = jnp.concatenate([cls_B1D, tokens], axis=1)
        tokens, tapped = Stack(m.depth, m.heads, m.mlp_ratio, dtype, m.scan, m.remat, self.hooks, name="stack")(
            self.hooks.constrain(tokens, "tokens"), condition_BD, taps
        )
        return Encoded(
            cls_BD=tokens[:, 0] if m.cls_token else None,
            tokens_BVD=tokens[:, 1:] if m.cls_token else tokens,
            embedded_BND=embedded_BND,
            condition_BD=condition_BD,
            tapped=tapped,
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

    model: ModelConfig
    fill: str = "noisy"
    hooks: Hooks = Hooks()

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
                m.decoder_depth, m.decoder_heads, m.mlp_ratio, dtype, m.scan, m.remat, self.hooks, name="stack"
            )(self.hooks.constrain(tokens, "tokens"), condition)  # fmt: skip
        channels = m.channels * (1 + m.learn_sigma)
        patches_BNP = FinalLayer(m.patch**2 * channels, dtype, name="final")(tokens, condition)
        return unpatchify(patches_BNP, m.patch, channels)


class Network:
    """The two modules and what is computed with them. Holds no arrays.

    A tree of its parameters is {"encoder": ..., "decoder": ...}. fill: what the decoder gets in the place of invisible
    tokens; see `Decoder`.
    """

    def __init__(self, model: ModelConfig, fill: str = "noisy", hooks: Hooks = Hooks()) -> None:
        self.model, self.hooks = model, hooks
        self.encoder = Encoder(model, hooks)
        self.decoder = Decoder(model, fill, hooks)

    @property
    def null_label(self) -> int:
        """The label that stands for none: the one behind the classes."""
        return self.model.num_classes

    @functools.cached_property
    def abstract(self) -> dict[str, Any]:
        """Shape and dtype of each parameter."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters."""
        m = self.model
        # The third key is that of the objectives' own parameters.
        encoder_key, decoder_key, _ = jax.random.split(key, 3)
        x_BHWC = jnp.zeros((1, m.image_size, m.image_size, m.channels))
        zeros_B = jnp.zeros((1,))
        encoded, encoder = self.encoder.init_with_output(encoder_key, x_BHWC, zeros_B, zeros_B.astype(jnp.int32))
        return {"encoder": encoder["params"], "decoder": self.decoder.init(decoder_key, encoded)["params"]}

    def encode(
        self,
        params: Any,
        x_BHWC: jax.Array,
        c_noise_B: jax.Array,
        label_B: jax.Array,
        mask: Mask | None = None,
        taps: Sequence[int] = (),
    ) -> Encoded:
        """The encoder on the visible tokens (all if `mask` is None); see `Encoder`."""
        visible_BV = None if mask is None else mask.visible_BV
        variables = {"params": self.hooks.constrain(params["encoder"], "weights")}
        return self.encoder.apply(variables, x_BHWC, c_noise_B, label_B, visible_BV, taps)

    def predict(self, params: Any, encoded: Encoded, mask: Mask | None = None) -> jax.Array:
        """The decoder: F, [B, H, W, C], or with `learn_sigma` [B, H, W, 2C]."""
        return self.decoder.apply({"params": self.hooks.constrain(params["decoder"], "weights")}, encoded, mask)

    def __call__(self, params: Any, x_BHWC: jax.Array, c_noise_B: jax.Array, label_B: jax.Array) -> jax.Array:
        """F as inference computes it: encoder and decoder on all tokens; see `predict`."""
        return self.predict(params, self.encode(params, x_BHWC, c_noise_B, label_B))

"""The encoder and the decoder of SD-DiT.

They are two modules with a parameter tree each, since the teacher is an EMA of the encoder alone. The encoder owns the
embeddings of patches, noise level and label; the decoder reads the embedded values.
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
    """The network: an encoder and a decoder of transformer blocks. `config.sizes` has the published sizes."""

    image_size: int = setting(
        32, "I", "height and width of what the network sees, in pixels or latents (of a 256-pixel image: 32)", least=1
    )
    channels: int = setting(
        4, "I", "channels of what the network sees: grey 1, RGB 3, latents of Stable Diffusion 4", least=1
    )
    num_classes: int = setting(1000, "I", "class labels, as many as the data has; 0: train without labels", least=0)
    patch: int = setting(
        2, "I", "height and width of a patch, which becomes one token; image_size is divisible by it", least=1
    )
    depth: int = setting(28, "I", "transformer blocks of the encoder", least=1)
    width: int = setting(1152, "I", "channels of a token in the encoder, divisible by heads and by 4", least=1)
    heads: int = setting(16, "I", "attention heads of an encoder block", least=1)
    mlp_ratio: float = setting(4.0, "I", "hidden width of a block's MLP, as a multiple of the block's width", above=0)
    decoder_depth: int = setting(
        8, "I", "transformer blocks of the decoder; 0: no decoder, the final layer reads the encoder (DiT)", least=0
    )
    decoder_width: int = setting(
        512, "I", "channels of a token in the decoder, divisible by decoder_heads and by 4", least=1
    )
    decoder_heads: int = setting(16, "I", "attention heads of a decoder block", least=1)
    cls_token: bool = setting(
        True, "S", "whether the encoder has a [CLS] token; the discrimination compares it beside the patch tokens"
    )
    null_label: str = setting(
        "zero",
        "I",
        "embedding of the null label: 'zero', a vector of zeros (MaskDiT), or 'row', a learnt vector (DiT)",
        choices=("zero", "row"),
    )
    learn_sigma: bool = setting(
        False,
        "I",
        "whether to output a variance too, as DiT's checkpoints do; the solver ddpm uses it, no loss trains it",
    )
    attention: str = setting(
        "auto",
        "C",
        "how attention is computed: 'products', matrix products on any device; 'cudnn', cuDNN's kernel for bfloat16 "
        "on NVIDIA GPUs since Ampere; 'auto', cudnn where it is possible",
        choices=("auto", "products", "cudnn"),
    )
    scan: bool = setting(
        True, "C", "whether to compile one block and loop over it, which compiles faster; false: compile each block"
    )
    remat: str = setting(
        "none",
        "C",
        "what the backward pass computes again instead of keeping it in memory: 'none'; 'dots', all but the results "
        "of matrix products and attention; 'full', all within a block",
        choices=("none", "dots", "full"),
    )
    dtype: str = setting(
        "float32",
        "C",
        "dtype of the network's matrix products; parameters, losses and optimiser state are float32 always",
        choices=("float32", "bfloat16"),
    )

    @property
    def tokens(self) -> int:
        """Patch tokens of an image."""
        return (self.image_size // self.patch) ** 2

    def check(self, prefix: str) -> None:
        """Raises ConfigError for an image that patches, or a width that heads, do not divide."""
        if self.image_size % self.patch:
            raise ConfigError(f"{prefix}image_size {self.image_size} is not divisible by {prefix}patch {self.patch}")
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads:
                raise ConfigError(f"{prefix}{part}width {width} is not divisible by {prefix}{part}heads {heads}")
            if width % 4:
                raise ConfigError(
                    f"{prefix}{part}width {width} is not divisible by 4, as the sine-cosine positions need"
                )


@flax.struct.dataclass
class Encoded:
    """The results of the encoder.

    cls_BD: the encoded [CLS] token, or None. tokens_BVD: the encoded visible tokens. embedded_BND: all patch tokens as
    they enter the blocks. condition_BD: the embedding of noise level and label, float32. tapped: the output of a block
    by the block's number, from 1: [B, 1 + V, D] with [CLS] first, or [B, V, D] without [CLS].
    """

    cls_BD: jax.Array | None
    tokens_BVD: jax.Array
    embedded_BND: jax.Array
    condition_BD: jax.Array
    tapped: dict[int, jax.Array]


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """Patches in raster order, each flattened as (row, column, channel): [B, H, W, C] -> [B, N, patch * patch * C]."""
    batch, height, width, channels = x_BHWC.shape
    grid = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches_BNP: jax.Array, patch: int, channels: int) -> jax.Array:
    """The inverse of `patchify`, for square images."""
    batch, tokens, _ = patches_BNP.shape
    side = round(tokens**0.5)
    grid = patches_BNP.reshape(batch, side, side, patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * patch, side * patch, channels)


class Encoder(nn.Module):
    """The embeddings of patches, positions, noise level and label, an optional [CLS] token, and adaLN-Zero blocks."""

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
        """Encodes the tokens at the positions `visible_BV`, or all tokens if it is None.

        x_BHWC: c_in * x. label_B: int32; `Network.null_label` is the null label. Without classes it is not read.
        taps: numbers of the blocks, from 1, whose outputs `Encoded.tapped` gets.
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
    """LayerNorm, modulation and a linear map that starts at zero: tokens [B, N, D] -> [B, N, width]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BND: jax.Array, condition_BC: jax.Array) -> jax.Array:
        """[B, N, D] under the condition [B, C] -> [B, N, width]."""
        shift, scale = Modulation(2, tokens_BND.shape[-1], self.dtype, name="modulation")(condition_BC)
        modulated = modulate(layer_norm(tokens_BND), shift, scale)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=ZEROS, name="linear")(modulated)


class Decoder(nn.Module):
    """From encoded tokens to the network's output F, with the layers of MaskDiT's decoder.

    A bridge, which is a `FinalLayer`, projects tokens from the encoder's width to the decoder's. fill: what stands at
    the invisible positions, "noisy" for the embedded noisy tokens, which are projected too, "mask_token" for a learnt
    vector, or "zeros". With decoder_depth 0 there is only the final layer, as in DiT.
    """

    model: ModelConfig
    fill: str = "noisy"
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(self, encoded: Encoded, mask: Mask | None = None) -> jax.Array:
        """F as an image [B, H, W, C]; with `learn_sigma` [B, H, W, 2C], with the learnt variance behind F."""
        m = self.model
        dtype = jnp.dtype(m.dtype)
        tokens, condition = encoded.tokens_BVD, encoded.condition_BD
        if m.decoder_depth:
            bridge = FinalLayer(m.decoder_width, dtype, name="bridge")
            fill_D = jnp.zeros(m.decoder_width, dtype)
            if self.fill == "mask_token":
                fill_D = self.param("mask_token", NORMAL, (m.decoder_width,)).astype(dtype)
            if mask is None:
                tokens = bridge(tokens, condition)
            elif self.fill == "noisy":
                tokens = bridge(put_back(tokens, take(encoded.embedded_BND, mask.hidden_BM), mask), condition)
            else:
                hidden_BMD = jnp.broadcast_to(fill_D, (*mask.hidden_BM.shape, m.decoder_width))
                tokens = put_back(bridge(tokens, condition), hidden_BMD, mask)
            tokens += positions_2d(m.decoder_width, m.image_size // m.patch).astype(dtype)[None]
            tokens, _ = Stack(
                m.decoder_depth, m.decoder_heads, m.mlp_ratio, dtype, m.scan, m.remat, self.hooks, name="stack"
            )(self.hooks.constrain(tokens, "tokens"), condition)  # fmt: skip
        channels = m.channels * (1 + m.learn_sigma)
        patches_BNP = FinalLayer(m.patch**2 * channels, dtype, name="final")(tokens, condition)
        return unpatchify(patches_BNP, m.patch, channels)


class Network:
    """The encoder and the decoder as pure functions of {"encoder": params, "decoder": params}. Holds no arrays.

    fill: what the decoder gets in place of invisible tokens; see `Decoder`.

        network = Network(config.model)
        params = network.init(jax.random.key(0))
        f_BHWC = network(params, *diffusion.network_input(x_BHWC, sigma_B), label_B)
    """

    def __init__(self, model: ModelConfig, fill: str = "noisy", hooks: Hooks = Hooks()) -> None:
        self.model, self.hooks = model, hooks
        self.encoder = Encoder(model, hooks)
        self.decoder = Decoder(model, fill, hooks)

    @property
    def null_label(self) -> int:
        """The label that means "no label": the number of classes."""
        return self.model.num_classes

    @functools.cached_property
    def abstract(self) -> dict[str, Any]:
        """The parameters as shapes and dtypes."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters."""
        m = self.model
        # The third key is for the parameters of objectives; see `Parts.init_params`.
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
        """The encoder on the visible tokens of `mask`, or on all tokens if it is None; see `Encoder`."""
        visible_BV = None if mask is None else mask.visible_BV
        variables = {"params": self.hooks.constrain(params["encoder"], "weights")}
        return self.encoder.apply(variables, x_BHWC, c_noise_B, label_B, visible_BV, taps)

    def predict(self, params: Any, encoded: Encoded, mask: Mask | None = None) -> jax.Array:
        """The decoder: F, [B, H, W, C], or with `learn_sigma` [B, H, W, 2C]; see `Decoder`."""
        return self.decoder.apply({"params": self.hooks.constrain(params["decoder"], "weights")}, encoded, mask)

    def __call__(self, params: Any, x_BHWC: jax.Array, c_noise_B: jax.Array, label_B: jax.Array) -> jax.Array:
        """F as sampling computes it: encoder and decoder on all tokens."""
        return self.predict(params, self.encode(params, x_BHWC, c_noise_B, label_B))

"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, appendix G; Stable Diffusion's f8).

Images and latents are [B, H, W, C]. `stage_i` of encoder and decoder has 1/2^i of the image's resolution and the width
`widths[i]`. A 1x1 convolution is a linear map of the channels, and is written as `nn.Dense`.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """What the architecture of every autoencoder states. Raises ConfigError for a value that is out of range.

    scaling_factor, shift_factor: diffusion sees (latent - shift_factor) * scaling_factor. The autoencoders themselves
    do not scale.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} {getattr(self, field.name)} must be at least 1")
        if not 0 < self.scaling_factor < math.inf:
            raise ConfigError(f"scaling_factor {self.scaling_factor} must be a finite number greater than 0")
        if not math.isfinite(self.shift_factor):
            raise ConfigError(f"shift_factor {self.shift_factor} must be a finite number")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(LatentConfig):
    """The architecture of an `Autoencoder`. The defaults are Stable Diffusion's.

    widths: channels at each resolution, from the image's down; each resolution is half of the one before.
    blocks: residual blocks in a stage of the encoder; a stage of the decoder has one more.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        if not self.widths:
            raise ConfigError("widths is empty; it needs a value for each resolution")
        for width in self.widths:
            if width < 1 or width % self.norm_groups:
                raise ConfigError(f"width {width} must be a multiple of norm_groups, {self.norm_groups}")


def conv(width: int, dtype: Any, name: str, **options: Any) -> nn.Conv:
    """A 3x3 convolution that keeps the resolution. `options` of nn.Conv change that."""
    return nn.Conv(width, (3, 3), dtype=dtype, name=name, **({"padding": 1} | options))


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]: each pixel becomes 2x2 equal ones."""
    return x_BHWC.repeat(2, axis=1).repeat(2, axis=2)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm with float32 statistics; the variance is computed from centered values."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); where the width changes, a linear map is applied to the first x."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, width]."""
        hidden = nn.silu(group_norm(self.groups, self.dtype, "norm1")(x_BHWC))
        hidden = conv(self.width, self.dtype, "conv1")(hidden)
        hidden = nn.silu(group_norm(self.groups, self.dtype, "norm2")(hidden))
        hidden = conv(self.width, self.dtype, "conv2")(hidden)
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = nn.Dense(self.width, dtype=self.dtype, name="shortcut")(x_BHWC)
        return x_BHWC + hidden


class SpatialAttention(nn.Module):
    """x + attention(norm(x)) with one head over all pixels."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; the softmax is float32."""
        batch, height, width, channels = x_BHWC.shape
        x_BNC = group_norm(self.groups, self.dtype, "norm")(x_BHWC).reshape(batch, height * width, channels)
        q_BNC, k_BNC, v_BNC = (nn.Dense(channels, dtype=self.dtype, name=name)(x_BNC) for name in "qkv")
        logits_BNM = jnp.einsum("bnc,bmc->bnm", q_BNC, k_BNC, preferred_element_type=jnp.float32)
        weights_BNM = jax.nn.softmax(logits_BNM * channels**-0.5).astype(self.dtype)
        out_BNC = nn.Dense(channels, dtype=self.dtype, name="out")(weights_BNM @ v_BNC)
        return x_BHWC + out_BNC.reshape(x_BHWC.shape)


class Middle(nn.Module):
    """A residual block, attention if the config has it, and a residual block, at the latent's resolution."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        c = self.config
        x_BHWC = ResidualBlock(c.widths[-1], c.norm_groups, self.dtype, name="before")(x_BHWC)
        if c.mid_attention:
            x_BHWC = SpatialAttention(c.norm_groups, self.dtype, name="attention")(x_BHWC)
        return ResidualBlock(c.widths[-1], c.norm_groups, self.dtype, name="after")(x_BHWC)


class Stage(nn.Module):
    """Residual blocks at one resolution."""

    width: int
    blocks: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, width]."""
        for i in range(self.blocks):
            x_BHWC = ResidualBlock(self.width, self.groups, self.dtype, name=f"block_{i}")(x_BHWC)
        return x_BHWC


class ImageEncoder(nn.Module):
    """From an image to the mean and the logarithm of the variance of a latent."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, in_channels] -> [B, H/f, W/f, 2 * latent_channels]."""
        c, dtype = self.config, self.dtype
        x_BHWC = conv(c.widths[0], dtype, "conv_in")(image_BHWC)
        for i, width in enumerate(c.widths):
            x_BHWC = Stage(width, c.blocks, c.norm_groups, dtype, name=f"stage_{i}")(x_BHWC)
            if i < len(c.widths) - 1:
                x_BHWC = conv(width, dtype, f"down_{i}", strides=2, padding=((0, 1), (0, 1)))(x_BHWC)
        x_BHWC = Middle(c, dtype, name="mid")(x_BHWC)
        x_BHWC = nn.silu(group_norm(c.norm_groups, dtype, "norm_out")(x_BHWC))
        moments_BHWC = conv(2 * c.latent_channels, dtype, "conv_out")(x_BHWC)
        if c.quant_conv:
            moments_BHWC = nn.Dense(2 * c.latent_channels, dtype=dtype, name="quant_conv")(moments_BHWC)
        return moments_BHWC


class ImageDecoder(nn.Module):
    """From a latent to an image."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        """[B, h, w, latent_channels] -> [B, f * h, f * w, out_channels]."""
        c, dtype = self.config, self.dtype
        if c.post_quant_conv:
            z_BHWC = nn.Dense(c.latent_channels, dtype=dtype, name="post_quant_conv")(z_BHWC)
        x_BHWC = Middle(c, dtype, name="mid")(conv(c.widths[-1], dtype, "conv_in")(z_BHWC))
        for i, width in reversed(tuple(enumerate(c.widths))):
            x_BHWC = Stage(width, c.blocks + 1, c.norm_groups, dtype, name=f"stage_{i}")(x_BHWC)
            if i:
                x_BHWC = conv(width, dtype, f"up_{i}")(upsample(x_BHWC))
        x_BHWC = nn.silu(group_norm(c.norm_groups, dtype, "norm_out")(x_BHWC))
        return conv(c.out_channels, dtype, "conv_out")(x_BHWC)


class Autoencoder:
    """Encoder and decoder of one architecture. Holds no arrays.

    Parameters are {"encoder": ..., "decoder": ...}, float32; `encode` and `decode` each need one half. dtype: of
    products and activations, float32 or bfloat16; on a TPU a product in float32 costs several in bfloat16.
    Normalisation statistics and the softmax are always float32.
    """

    networks = ImageEncoder, ImageDecoder

    def __init__(self, config: LatentConfig, dtype: Any = jnp.float32) -> None:
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.encoder, self.decoder = (network(config, self.dtype) for network in self.networks)

    @property
    def factor(self) -> int:
        """The image's side over the latent's side: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.widths) - 1)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters."""
        encoder_key, decoder_key = jax.random.split(key)
        image_BHWC = jnp.zeros((1, self.factor, self.factor, self.config.in_channels))
        z_BHWC = jnp.zeros((1, 1, 1, self.config.latent_channels))
        return {
            "encoder": self.encoder.init(encoder_key, image_BHWC)["params"],
            "decoder": self.decoder.init(decoder_key, z_BHWC)["params"],
        }

    def encode(self, params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, in_channels] in [-1, 1] -> mean and standard deviation of the latent's Gaussian.

        Both are float32 [B, H/f, W/f, latent_channels], where f is `factor`. The logarithm of the variance is clipped
        to [-30, 20]. Raises ConfigError for images whose sides are not multiples of f.
        """
        mean_BHWC, logvar_BHWC = jnp.split(self._encoded(params, image_BHWC), 2, axis=-1)
        return mean_BHWC, jnp.exp(0.5 * jnp.clip(logvar_BHWC, -30.0, 20.0))

    def decode(self, params: Any, z_BHWC: jax.Array) -> jax.Array:
        """Latents [B, h, w, latent_channels] -> images of about [-1, 1], not clipped: float32 [B, f h, f w, C]."""
        return self._run("decoder", params, z_BHWC)

    def _encoded(self, params: Any, image_BHWC: jax.Array) -> jax.Array:
        height, width = image_BHWC.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"an image of {height} x {width} pixels; this autoencoder needs multiples of {self.factor}"
            )
        return self._run("encoder", params, image_BHWC)

    def _run(self, half: str, params: Any, x_BHWC: jax.Array) -> jax.Array:
        # By default TPUs and GPUs would round the inputs of float32 products.
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            out_BHWC = getattr(self, half).apply({"params": params[half]}, x_BHWC.astype(self.dtype))
        return out_BHWC.astype(jnp.float32)

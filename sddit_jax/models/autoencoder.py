"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, appendix G; Stable Diffusion's f8).

Images and latents are NHWC. `stage_i` of encoder and decoder works at 1/2^i of the image's resolution with width
`widths[i]`. A 1x1 convolution is a linear map of the channels, and is written as one.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """An architecture, and how its latents are scaled for diffusion; the defaults are Stable Diffusion's.

    widths: channels from the image's resolution down; each further one halves the resolution.
    blocks: residual blocks of an encoder's stage; a decoder's stage has one more.
    scaling_factor, shift_factor: diffusion sees (latent - shift_factor) * scaling_factor. Carried only: what
    `Autoencoder` gives and takes is not scaled.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError for an impossible combination."""
        if not self.widths:
            raise ConfigError("widths is empty; it needs a value for each resolution")
        for key in ("in_channels", "out_channels", "latent_channels", "blocks", "norm_groups"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} must be at least 1")
        for width in self.widths:
            if width < 1 or width % self.norm_groups:
                raise ConfigError(f"width {width} must be a multiple of norm_groups, {self.norm_groups}")
        check_scaling(self.scaling_factor, self.shift_factor)


def check_scaling(scaling_factor: float, shift_factor: float) -> None:
    """Raises ConfigError unless (latent - shift_factor) * scaling_factor can be undone."""
    if not 0 < scaling_factor < math.inf:
        raise ConfigError(f"scaling_factor {scaling_factor} must be a finite number greater than 0")
    if not math.isfinite(shift_factor):
        raise ConfigError(f"shift_factor {shift_factor} must be a finite number")


def check_sides(image_BHWC: jax.Array, factor: int) -> None:
    """Raises ConfigError unless the image's sides are multiples of `factor`."""
    height, width = image_BHWC.shape[1:3]
    if height % factor or width % factor:
        raise ConfigError(f"an image of {height} x {width} pixels; this autoencoder needs multiples of {factor}")


def exact(dtype: Any) -> Any:
    """A context in which products of float32 are float32 on every device; TPUs and GPUs would round their inputs."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def conv(width: int, dtype: Any, name: str, **options: Any) -> nn.Conv:
    """A 3x3 convolution that keeps the resolution, unless options say otherwise."""
    return nn.Conv(width, (3, 3), dtype=dtype, name=name, **({"padding": 1} | options))


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """Each pixel becomes 2x2."""
    return x_BHWC.repeat(2, axis=1).repeat(2, axis=2)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm with statistics in float32, the variance from centred values."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a linear map where the width changes."""

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
    """A block, attention if wanted, and a block at the latent's resolution."""

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
    """Image -> mean and logarithm of the variance."""

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
    """Latent -> image."""

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
    """The encoder and the decoder of one configuration and what is computed with them. Holds no arrays.

    A tree of parameters is {"encoder": ..., "decoder": ...}, all float32; each half can be used without the other.
    `dtype` is that of the products and activations: float32, which costs several bfloat16 passes on a TPU, or bfloat16.
    Normalisation statistics and the softmax are float32 in both.
    """

    def __init__(self, config: AutoencoderConfig, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.encoder = ImageEncoder(config, self.dtype)
        self.decoder = ImageDecoder(config, self.dtype)

    @property
    def factor(self) -> int:
        """Pixels of the image's side for each of the latent's: 8 for Stable Diffusion."""
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
        """Images in [-1, 1] -> mean and standard deviation of the latent's Gaussian, not scaled.

        Both are float32 [B, H/f, W/f, latent_channels]; the logarithm of the variance is clipped to [-30, 20].

        Raises:
          ConfigError: the image's sides are not multiples of `factor`.
        """
        check_sides(image_BHWC, self.factor)
        with exact(self.dtype):
            moments_BHWC = self.encoder.apply({"params": params["encoder"]}, image_BHWC.astype(self.dtype))
        mean_BHWC, logvar_BHWC = jnp.split(moments_BHWC.astype(jnp.float32), 2, axis=-1)
        return mean_BHWC, jnp.exp(0.5 * jnp.clip(logvar_BHWC, -30.0, 20.0))

    def decode(self, params: Any, z_BHWC: jax.Array) -> jax.Array:
        """Latents as `encode` gives them, not scaled -> images, float32 [B, f * h, f * w, out_channels].

        Their values are about [-1, 1], and not clipped.
        """
        with exact(self.dtype):
            image_BHWC = self.decoder.apply({"params": params["decoder"]}, z_BHWC.astype(self.dtype))
        return image_BHWC.astype(jnp.float32)

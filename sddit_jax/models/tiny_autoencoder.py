"""TAESD, a tiny autoencoder distilled from a large one (Bohan 2023, github.com/madebyollin/taesd): cheap previews.

Its latents approximate the large one's after scaling, so what a diffusion model gives is decoded as it is.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError
from sddit_jax.models.autoencoder import Autoencoder, check_scaling, check_sides, conv, exact, upsample


@dataclasses.dataclass(frozen=True)
class TinyAutoencoderConfig:
    """An architecture, and how its latents are scaled for diffusion; the defaults are TAESD's.

    encoder_blocks, decoder_blocks: residual blocks at each resolution, in the order of computation.
    scaling_factor, shift_factor: diffusion sees (latent - shift_factor) * scaling_factor. Carried only.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError for an impossible combination."""
        for key in ("in_channels", "out_channels", "latent_channels", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} must be at least 1")
        if not self.encoder_blocks or len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ConfigError(
                f"encoder_blocks {self.encoder_blocks} and decoder_blocks {self.decoder_blocks} must have a value "
                "for each resolution, as many in one as in the other"
            )
        check_scaling(self.scaling_factor, self.shift_factor)


class TinyBlock(nn.Module):
    """ReLU(x + three convolutions with ReLU between them)."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        hidden = x_BHWC
        for i in (0, 2, 4):
            hidden = conv(x_BHWC.shape[-1], self.dtype, f"conv_{i}")(hidden if i == 0 else nn.relu(hidden))
        return nn.relu(x_BHWC + hidden)


class TinyEncoder(nn.Module):
    """Image in [0, 1] -> latent. Here and in the decoder a layer's number is its place in the published sequence."""

    config: TinyAutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, in_channels] -> [B, H/f, W/f, latent_channels]."""
        c, place = self.config, 0
        for stage, blocks in enumerate(c.encoder_blocks):
            options = {"strides": 2, "use_bias": False} if stage else {}
            x_BHWC = conv(c.width, self.dtype, f"layer_{place}", **options)(x_BHWC)
            for i in range(blocks):
                x_BHWC = TinyBlock(self.dtype, name=f"layer_{place + 1 + i}")(x_BHWC)
            place += 1 + blocks
        return conv(c.latent_channels, self.dtype, f"layer_{place}")(x_BHWC)


class TinyDecoder(nn.Module):
    """Latent -> image in [0, 1]."""

    config: TinyAutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        """[B, h, w, latent_channels] -> [B, f * h, f * w, out_channels]."""
        c = self.config
        x_BHWC = nn.relu(conv(c.width, self.dtype, "layer_0")(nn.tanh(z_BHWC / 3) * 3))
        # Place 1 is the ReLU; each upsampling has a place too.
        place = 2
        for stage, blocks in enumerate(c.decoder_blocks):
            for i in range(blocks):
                x_BHWC = TinyBlock(self.dtype, name=f"layer_{place + i}")(x_BHWC)
            place += blocks
            if stage < len(c.decoder_blocks) - 1:
                x_BHWC = conv(c.width, self.dtype, f"layer_{place + 1}", use_bias=False)(upsample(x_BHWC))
                place += 2
        return conv(c.out_channels, self.dtype, f"layer_{place}")(x_BHWC)


class TinyAutoencoder(Autoencoder):
    """An `Autoencoder` with the networks of diffusers' AutoencoderTiny, which has no distribution."""

    def __init__(self, config: TinyAutoencoderConfig, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.encoder = TinyEncoder(config, self.dtype)
        self.decoder = TinyDecoder(config, self.dtype)

    @property
    def factor(self) -> int:
        """Pixels of the image's side for each of the latent's: 8 for TAESD."""
        return 2 ** (len(self.config.encoder_blocks) - 1)

    def encode(self, params: Any, image_BHWC: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> latents, float32 [B, H/f, W/f, latent_channels]; there is no distribution.

        Raises:
          ConfigError: the image's sides are not multiples of `factor`.
        """
        check_sides(image_BHWC, self.factor)
        with exact(self.dtype):
            x_BHWC = ((image_BHWC + 1) / 2).astype(self.dtype)
            return self.encoder.apply({"params": params["encoder"]}, x_BHWC).astype(jnp.float32)

    def decode(self, params: Any, z_BHWC: jax.Array) -> jax.Array:
        """Latents -> images of about [-1, 1], not clipped: float32 [B, f * h, f * w, out_channels]."""
        with exact(self.dtype):
            image_BHWC = self.decoder.apply({"params": params["decoder"]}, z_BHWC.astype(self.dtype))
        return 2 * image_BHWC.astype(jnp.float32) - 1

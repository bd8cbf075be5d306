"""TAESD, a tiny autoencoder distilled from a large one, for cheap previews (Bohan 2023, github.com/madebyollin/taesd).

Its latents approximate the scaled latents of the large one: it decodes what a diffusion model samples, unscaled.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from sddit_jax.errors import ConfigError
from sddit_jax.models.autoencoder import Autoencoder, LatentConfig, conv, upsample


@dataclasses.dataclass(frozen=True)
class TinyAutoencoderConfig(LatentConfig):
    """The architecture of a `TinyAutoencoder`. The defaults are TAESD's.

    encoder_blocks, decoder_blocks: residual blocks at each resolution, in the order of computation.
    """

    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Checks the values."""
        super().__post_init__()
        if not self.encoder_blocks or len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ConfigError(
                f"encoder_blocks {self.encoder_blocks} and decoder_blocks {self.decoder_blocks} must each have a value "
                "for each resolution"
            )


class TinyBlock(nn.Module):
    """ReLU(x + conv(ReLU(conv(ReLU(conv(x))))))."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        width = x_BHWC.shape[-1]
        hidden = conv(width, self.dtype, "conv_0")(x_BHWC)
        for name in ("conv_2", "conv_4"):
            hidden = conv(width, self.dtype, name)(nn.relu(hidden))
        return nn.relu(x_BHWC + hidden)


class TinyEncoder(nn.Module):
    """From an image in [0, 1] to a latent.

    In encoder and decoder, the number in a layer's name is its place in the published sequence of layers.
    """

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
    """From a latent to an image in [0, 1]."""

    config: TinyAutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        """[B, h, w, latent_channels] -> [B, f * h, f * w, out_channels]."""
        c = self.config
        x_BHWC = nn.relu(conv(c.width, self.dtype, "layer_0")(nn.tanh(z_BHWC / 3) * 3))
        # The ReLU has place 1, and each upsampling has a place.
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
    """An `Autoencoder` with the networks of diffusers' AutoencoderTiny."""

    networks = TinyEncoder, TinyDecoder

    @property
    def factor(self) -> int:
        """The image's side over the latent's side: 8 for TAESD."""
        return 2 ** (len(self.config.encoder_blocks) - 1)

    def encode(self, params: Any, image_BHWC: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> latents, float32 [B, H/f, W/f, latent_channels], not a distribution of them.

        Raises ConfigError for images whose sides are not multiples of `factor`.
        """
        return self._encoded(params, (image_BHWC + 1) / 2)

    def decode(self, params: Any, z_BHWC: jax.Array) -> jax.Array:
        """Latents -> images; see `Autoencoder.decode`."""
        return 2 * super().decode(params, z_BHWC) - 1

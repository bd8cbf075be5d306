"""Codecs: from stored images to the network's input, and back."""

import abc
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError, DataError
from sddit_jax.settings import setting

# The scale of the latents of Stable Diffusion's autoencoder, on which DiT, MaskDiT and SD-DiT train.
STABLE_DIFFUSION_SCALE = 0.18215


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """How stored images become what the network sees: z = (x - mean) * scale, per channel."""

    name: str = setting(
        "pixels", "C", "what x is: 'pixels' in [-1, 1], or 'latents' of an autoencoder", choices=("pixels", "latents")
    )
    autoencoder: str = setting(
        "",
        "C",
        "for latents, the autoencoder that decodes samples to pixels: a folder of diffusers, a file of CompVis, or "
        "an id of the Hugging Face hub; empty: samples stay latents",
    )
    mean: tuple[float, ...] = setting((0.0,), "C", "mean of x, one number for all channels or one for each")
    scale: tuple[float, ...] = setting(
        (0.5,),
        "C",
        "scale, one number for all channels or one for each, not 0; it brings the standard deviation of z to that "
        "which the diffusion assumes",
    )

    def check(self, prefix: str) -> None:
        """Raises ConfigError for a scale of 0, which cannot be undone."""
        if 0.0 in self.scale:
            raise ConfigError(f"{prefix}scale is {self.scale}, but must not have a 0")


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """Makes z = (x - mean) * scale of a stored image x, and x of z. The network sees z, float32 [B, H, W, C].

    mean, scale: one value, or a value per channel. The scale brings z to the standard deviation that the diffusion
    assumes (`sigma_data`).
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    name = ""

    @abc.abstractmethod
    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The mean of `clean` over its random numbers."""

    def clean(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """The clean images x0 of a batch from the loader; `key` decides what is random in them."""
        return self.expected(batch)

    def normalise(self, x_BHWC: jax.Array) -> jax.Array:
        """x -> z."""
        return (x_BHWC - _row(self.mean)) * _row(self.scale)

    def as_stored(self, z_BHWC: jax.Array) -> jax.Array:
        """z -> x: latents for an autoencoder, float32, or pixels, uint8."""
        return z_BHWC / _row(self.scale) + _row(self.mean)

    def record(self) -> dict[str, object]:
        """The JSON object that describes the codec in datasets, checkpoints and files of samples."""
        return {"name": self.name, "mean": list(self.mean), "scale": list(self.scale)}


class PixelCodec(Codec):
    """x = pixel / 127.5 - 1, in [-1, 1]. A batch has `image`: uint8 [B, H, W, C]."""

    name = "pixels"

    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The images; nothing is random."""
        return self.encode(batch["image"])

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """uint8 pixels -> z."""
        return self.normalise(image_BHWC.astype(jnp.float32) / 127.5 - 1)

    def as_stored(self, z_BHWC: jax.Array) -> jax.Array:
        """z -> uint8 pixels: the exact inverse of `encode`."""
        return to_pixels(super().as_stored(z_BHWC))


class LatentCodec(Codec):
    """x is a latent of an autoencoder, drawn from the Gaussian that the autoencoder gives for an image.

    A batch has `moments`: means and standard deviations, float16 [B, 2, H, W, C].
    """

    name = "latents"

    def clean(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """A sample of each image's Gaussian."""
        moments_B2HWC = batch["moments"]
        eps_BHWC = jax.random.normal(key, (len(moments_B2HWC), *moments_B2HWC.shape[2:]))
        return self.encode_moments(moments_B2HWC, eps_BHWC)

    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The mean of each image's Gaussian."""
        return self.encode_moments(batch["moments"], 0.0)

    def encode_moments(self, moments_B2HWC: jax.Array, eps_BHWC: jax.Array | float) -> jax.Array:
        """The z of x = mean + std * eps."""
        mean_BHWC, std_BHWC = jnp.moveaxis(moments_B2HWC.astype(jnp.float32), 1, 0)
        return self.normalise(mean_BHWC + std_BHWC * eps_BHWC)


def to_pixels(x_BHWC: jax.Array) -> jax.Array:
    """Images in [-1, 1] as uint8, by clip(127.5 x + 128, 0, 255): the rounding of DiT and EDM."""
    return jnp.clip(127.5 * x_BHWC + 128, 0, 255).astype(jnp.uint8)


def make_codec(config: CodecConfig) -> Codec:
    """The codec that a configuration names."""
    return {kind.name: kind for kind in (PixelCodec, LatentCodec)}[config.name](config.mean, config.scale)


def check_codec(network: str, learnt: Mapping[str, object], data: str, found: Mapping[str, object]) -> None:
    """Raises DataError if a network was trained on another codec, or another autoencoder's latents, than data has.

    network, data: their names in the message. learnt, found: the records of their codecs. A key that one record lacks
    is not compared: weights from other codes lack some.
    """
    for key in ("name", "weights", "factor", "channels", "pixel_range"):
        if learnt.get(key) is not None and found.get(key) is not None and learnt[key] != found[key]:
            raise DataError(f"{network} was trained with codec {key} {learnt[key]}, but {data} has {found[key]}")


def _row(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)

"""How stored images become what the network sees, and back."""

import abc
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sddit_jax.errors import ConfigError, DataError
from sddit_jax.settings import setting

# Of the latents of Stable Diffusion's autoencoder, on which DiT, MaskDiT and SD-DiT train.
STABLE_DIFFUSION_SCALE = 0.18215


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """How stored images become what the network sees: z = (x - mean) * scale, per channel."""

    name: str = setting(
        "pixels", "C", "x is 'pixels' in [-1, 1], or 'latents' of an autoencoder", choices=("pixels", "latents")
    )
    autoencoder: str = setting(
        "",
        "C",
        "of latents, what decodes samples: a folder of diffusers, a file of CompVis, or a hub id; empty: nothing",
    )
    mean: tuple[float, ...] = setting((0.0,), "C", "mean per channel; one value serves all")
    scale: tuple[float, ...] = setting((0.5,), "C", "scale per channel; one value serves all")

    def check(self) -> None:
        """Raises ConfigError for a scale that cannot be undone."""
        if 0.0 in self.scale:
            raise ConfigError(f"codec.scale is {self.scale}, but must not have a 0")


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """z = (x - mean) * scale; mean and scale have a value per channel or one.

    The scale brings the data to the standard deviation that the diffusion assumes (sigma_data).
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    name = ""

    @abc.abstractmethod
    def clean(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """The clean images x0 of a batch as the loader gives it, float32 [B, H, W, C]."""

    @abc.abstractmethod
    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The mean of what `clean` draws: the same at every visit."""

    @abc.abstractmethod
    def as_stored(self, z_BHWC: jax.Array) -> jax.Array:
        """What the network sees, as a person or an autoencoder takes it."""

    def record(self) -> dict[str, object]:
        """What a dataset, a checkpoint and a file of samples say about it."""
        return {"name": self.name, "mean": list(self.mean), "scale": list(self.scale)}

    def normalise(self, x_BHWC: jax.Array) -> jax.Array:
        """x as the network sees it."""
        return (x_BHWC - _row(self.mean)) * _row(self.scale)

    def _restore(self, z_BHWC: jax.Array) -> jax.Array:
        return z_BHWC / _row(self.scale) + _row(self.mean)


class PixelCodec(Codec):
    """x = pixel / 127.5 - 1 in [-1, 1]; a batch has `image`, uint8 pixels."""

    name = "pixels"

    def clean(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """The images; nothing is random."""
        del key
        return self.encode(batch["image"])

    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The images."""
        return self.encode(batch["image"])

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """uint8 [B, H, W, C] -> float32."""
        return self.normalise(image_BHWC.astype(jnp.float32) / 127.5 - 1)

    def as_stored(self, z_BHWC: jax.Array) -> jax.Array:
        """float32 -> uint8 by clip(127.5 x + 128), the rounding of DiT and EDM; the exact inverse of `encode`."""
        return to_pixels(self._restore(z_BHWC))


class LatentCodec(Codec):
    """x are latents of an autoencoder; a batch has `moments`, their means and standard deviations, float16."""

    name = "latents"

    def clean(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
        """A sample of each image's Gaussian, a new one at every visit."""
        moments_B2HWC = batch["moments"]
        eps_BHWC = jax.random.normal(key, (len(moments_B2HWC), *moments_B2HWC.shape[2:]))
        return self.encode_moments(moments_B2HWC, eps_BHWC)

    def expected(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The mean of each image's Gaussian."""
        moments_B2HWC = batch["moments"]
        return self.encode_moments(moments_B2HWC, jnp.zeros((len(moments_B2HWC), *moments_B2HWC.shape[2:])))

    def encode_moments(self, moments_B2HWC: jax.Array, eps_BHWC: jax.Array) -> jax.Array:
        """Mean and standard deviation of the autoencoder's Gaussian, and standard normal noise -> a sample as z."""
        mean_BHWC, std_BHWC = jnp.moveaxis(moments_B2HWC.astype(jnp.float32), 1, 0)
        return self.normalise(mean_BHWC + std_BHWC * eps_BHWC)

    def as_stored(self, z_BHWC: jax.Array) -> jax.Array:
        """z -> latents for the autoencoder's decoder, float32."""
        return self._restore(z_BHWC)


def to_pixels(x_BHWC: jax.Array) -> jax.Array:
    """Images in [-1, 1] as uint8, by clip(127.5 x + 128)."""
    return jnp.clip(127.5 * x_BHWC + 128, 0, 255).astype(jnp.uint8)


def make_codec(config: CodecConfig) -> Codec:
    """The codec that a configuration names."""
    return {kind.name: kind for kind in (PixelCodec, LatentCodec)}[config.name](config.mean, config.scale)


def check_codec(network: str, learnt: Mapping[str, object], data: str, found: Mapping[str, object]) -> None:
    """Raises DataError if `network` learnt what another codec, or another autoencoder, makes of images than `data` has.

    learnt, found: the records of both; what one of them lacks, as weights that come from another code do, is not
    compared.
    """
    for key in ("name", "weights", "factor", "channels", "pixel_range"):
        if learnt.get(key) is not None and found.get(key) is not None and learnt[key] != found[key]:
            raise DataError(f"{network} learnt data of codec {key} {learnt[key]}, but {data} has {found[key]}")


def _row(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)

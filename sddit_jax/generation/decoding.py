"""Turns samples into images: decodes latents with an autoencoder, and leaves pixels as they are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sddit_jax.errors import WeightsError
from sddit_jax.files import weights_hash
from sddit_jax.method.codec import LatentCodec, to_pixels
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.models.tiny_autoencoder import TinyAutoencoder
from sddit_jax.parallel.rows import split_rows
from sddit_jax.parallel.sharding import replicated
from sddit_jax.weights.autoencoder import is_tiny, load_autoencoder, load_tiny_autoencoder


@dataclasses.dataclass(frozen=True)
class Decode:
    """decode(x [B, h, w, c]) -> images, or by default x itself. weights: hash of the decoder's weights, or empty."""

    function: Callable[[jax.Array], jax.Array] = lambda x: x
    weights: str = ""

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """x: its rows are split over all devices, so that B is a multiple of their number."""
        return self.function(x_BHWC)


AS_IT_IS = Decode()


def make_decode(
    decoder: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh, weights: str, rows_per_device: int = 4
) -> Decode:
    """A `Decode` from latents float32 [B, h, w, c] to uint8 images [B, H, W, 3].

    decoder(params, latents [B, h, w, c]) -> images in [-1, 1]. weights: the hash of `Decode`. rows_per_device: rows
    that a device decodes at a time; an image of 512 pixels takes a gigabyte of memory while it is decoded.
    """
    params = jax.device_put({"decoder": params["decoder"]}, replicated(mesh))

    def own_rows(params: Any, x_BHWC: jax.Array) -> jax.Array:
        batch = len(x_BHWC)
        padding = -batch % rows_per_device
        x_BHWC = jnp.pad(x_BHWC, ((0, padding), (0, 0), (0, 0), (0, 0)))
        parts = x_BHWC.reshape(-1, rows_per_device, *x_BHWC.shape[1:])
        images = jax.lax.map(lambda part: to_pixels(decoder(params, part)), parts)
        return images.reshape(-1, *images.shape[2:])[:batch]

    rows = split_rows(mesh).spec
    jitted = jax.jit(jax.shard_map(own_rows, mesh=mesh, in_specs=(P(), rows), out_specs=rows))
    return Decode(lambda x_BHWC: jitted(params, x_BHWC), weights)


def load_decode(autoencoder: str, codec: Mapping[str, Any], mesh: Mesh) -> Decode:
    """The `Decode` of a network's samples.

    autoencoder: as `load_autoencoder` or `load_tiny_autoencoder` takes it; empty: samples stay as they are. A tiny
    autoencoder decodes approximately, at a fraction of the cost. codec: the record of the network's data.

    Raises WeightsError if the autoencoder cannot be loaded, or did not make the network's data.
    """
    if not autoencoder:
        return AS_IT_IS
    if codec["name"] != "latents":
        raise WeightsError(f"autoencoder {autoencoder}: the network learnt {codec['name']}, which need no decoding")
    tiny = is_tiny(autoencoder)
    config, params = load_tiny_autoencoder(autoencoder) if tiny else load_autoencoder(autoencoder)
    if codec.get("channels", config.latent_channels) != config.latent_channels:
        raise WeightsError(
            f"{autoencoder} has {config.latent_channels} latent channels, but the network learnt {codec['channels']}"
        )
    if tiny:
        # A tiny autoencoder decodes normalised latents, as diffusion sees them.
        model, own = TinyAutoencoder(config), LatentCodec(tuple(codec["mean"]), tuple(codec["scale"]))
        return make_decode(
            lambda params, x_BHWC: model.decode(params, own.normalise(x_BHWC)), params, mesh, weights_hash(params)
        )
    found = weights_hash(params["encoder"])
    if codec.get("weights", found) != found:
        raise WeightsError(
            f"{autoencoder} has an encoder of the weights {found}, but the latents were made with {codec['weights']}"
        )
    return make_decode(Autoencoder(config).decode, params, mesh, weights_hash(params["decoder"]))

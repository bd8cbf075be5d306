"""The decoder of samples that a configuration names."""

from collections.abc import Mapping
from typing import Any

import jax

from sddit_jax.errors import WeightsError
from sddit_jax.generation.decoding import AS_IT_IS, Decode, make_decode
from sddit_jax.method.codec import LatentCodec
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.models.tiny_autoencoder import TinyAutoencoder
from sddit_jax.weights.autoencoder import is_tiny, load_autoencoder, load_tiny_autoencoder
from sddit_jax.weights.files import weights_hash


def load_decode(autoencoder: str, codec: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Decode:
    """How samples become what is shown and saved: pixels, and latents without an autoencoder, as they are.

    autoencoder: of latents, a folder, a file or a hub id, or empty. A tiny one decodes approximately, and cheaply.
    codec: the record of the data that the network learnt. Raises WeightsError if the autoencoder cannot be loaded or is
    not the one of the data.
    """
    if not autoencoder:
        return AS_IT_IS
    if codec["name"] != "latents":
        raise WeightsError(f"autoencoder {autoencoder}: the network learnt {codec['name']}, which need none")
    tiny = is_tiny(autoencoder)
    config, params = load_tiny_autoencoder(autoencoder) if tiny else load_autoencoder(autoencoder)
    if codec.get("channels", config.latent_channels) != config.latent_channels:
        raise WeightsError(
            f"{autoencoder} has {config.latent_channels} latent channels, but the network learnt {codec['channels']}"
        )
    if tiny:
        # It was distilled to decode what diffusion sees, not what the encoder gives.
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

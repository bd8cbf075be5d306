"""Samples as a person sees them: latents through an autoencoder's decoder, pixels as they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sddit_jax.method.codec import to_pixels


@dataclasses.dataclass(frozen=True)
class Decode:
    """decode(x [B, h, w, c]) -> what is shown and saved, both on the devices; `weights`: a hash, or empty."""

    function: Callable[[jax.Array], jax.Array] = lambda x: x
    weights: str = ""

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """B is divisible by the number of devices, over all of which the rows lie."""
        return self.function(x_BHWC)


AS_IT_IS = Decode()


def make_decode(
    decoder: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh, weights: str, rows_per_device: int = 4
) -> Decode:
    """latents float32 [B, h, w, c] -> uint8 images [B, H, W, 3].

    decoder(params, latents [B, h, w, c]) -> images in [-1, 1]. Each device decodes its rows `rows_per_device` at a
    time: at 512 pixels an image takes a gigabyte on its way.
    """
    params = jax.device_put({"decoder": params["decoder"]}, jax.sharding.NamedSharding(mesh, P()))

    def own_rows(params: Any, x_BHWC: jax.Array) -> jax.Array:
        batch = len(x_BHWC)
        padding = -batch % rows_per_device
        x_BHWC = jnp.pad(x_BHWC, ((0, padding), (0, 0), (0, 0), (0, 0)))
        parts = x_BHWC.reshape(-1, rows_per_device, *x_BHWC.shape[1:])
        images = jax.lax.map(lambda part: to_pixels(decoder(params, part)), parts)
        return images.reshape(-1, *images.shape[2:])[:batch]

    rows = P(mesh.axis_names)
    jitted = jax.jit(jax.shard_map(own_rows, mesh=mesh, in_specs=(P(), rows), out_specs=rows))
    return Decode(lambda x_BHWC: jitted(params, x_BHWC), weights)


def decode_on(mesh: Mesh, decode: Decode, x_BHWC: jax.Array) -> np.ndarray:
    """What `decode` makes of any number of rows, on every host."""
    x_BHWC = np.asarray(x_BHWC)
    count = len(x_BHWC)
    padded = np.resize(x_BHWC, (count + -count % mesh.size, *x_BHWC.shape[1:]))
    rows = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
    images = decode(jax.make_array_from_callback(padded.shape, rows, padded.__getitem__))
    return multihost_utils.process_allgather(images, tiled=True)[:count]

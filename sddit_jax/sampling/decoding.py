"""Samples as a person sees them: latents through an autoencoder's decoder, pixels as they are."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sddit_jax.codec import to_pixels

Decode = Callable[[np.ndarray], np.ndarray]


def make_decode(
    decoder: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh, rows_per_device: int = 4
) -> Decode:
    """decode(latents float32 [N, h, w, c]) -> uint8 images [N, H, W, 3] on every host, compiled once.

    decoder(params, latents [B, h, w, c]) -> images in [-1, 1]. In batches of `rows_per_device` for each device: at 512
    pixels an image takes a gigabyte on its way.
    """
    rows, everywhere = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    params = jax.device_put({"decoder": params["decoder"]}, everywhere)
    jitted = jax.jit(lambda params, x_BHWC: to_pixels(decoder(params, x_BHWC)), out_shardings=rows)
    batch_size = rows_per_device * mesh.size

    def decode(latents_NHWC: np.ndarray) -> np.ndarray:
        images = []
        for start in range(0, len(latents_NHWC), batch_size):
            part = latents_NHWC[start : start + batch_size]
            batch = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
            batch = jax.make_array_from_callback(batch.shape, rows, batch.__getitem__)
            images.append(multihost_utils.process_allgather(jitted(params, batch), tiled=True)[: len(part)])
        return np.concatenate(images)

    return decode

"""Images from weights: image i is a function of (seed, i, label) and the weights alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sddit_jax.codec import PixelCodec
from sddit_jax.diffusion import EDM
from sddit_jax.models.transformer import Network
from sddit_jax.sampling.guidance import make_denoise
from sddit_jax.sampling.solvers import heun, noise_levels

Sample = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def make_sample(
    network: Network, diffusion: EDM, codec: PixelCodec, *, steps: int, rho: float, guidance: float
) -> Sample:
    """A pure sample(params, seed, index_B, label_B) -> uint8 [B, H, W, C]; seed, indices and labels are integers."""
    m = network.model
    sigmas = noise_levels(steps, diffusion.sigma_min, diffusion.sigma_max, rho)

    def sample(params: Any, seed: jax.Array, index_B: jax.Array, label_B: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        shape = (m.image_size, m.image_size, m.channels)
        noise_BHWC = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)
        denoise = make_denoise(network, diffusion, params, label_B, guidance)
        return codec.decode(heun(denoise, noise_BHWC, sigmas))

    return sample


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: int32 [count]; all 0 when there are no classes."""
    return (np.arange(count) % max(num_classes, 1)).astype(np.int32)


def make_generate(sample: Sample, mesh: Mesh, batch_size: int) -> Callable[[Any, int, np.ndarray], np.ndarray]:
    """generate(params, seed, labels) -> uint8 images [len(labels), H, W, C] on the host, compiled once.

    Works through the labels in batches of `batch_size` rounded up to the devices, so that neither changes an image
    beyond rounding.
    """
    rows = NamedSharding(mesh, P(mesh.axis_names))
    batch_size += -batch_size % mesh.size
    jitted = jax.jit(sample, out_shardings=rows)

    def generate(params: Any, seed: int, label_N: np.ndarray) -> np.ndarray:
        images = []
        for start in range(0, len(label_N), batch_size):
            index_B = np.arange(start, start + batch_size, dtype=np.int32)
            label_B = np.resize(label_N[start : start + batch_size], batch_size)
            batch = jitted(params, seed, *jax.device_put((index_B, label_B), rows))
            images.append(np.asarray(batch))
        return np.concatenate(images)[: len(label_N)]

    return generate

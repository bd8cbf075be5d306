"""The Inception-v3 that FID is defined by: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2016; Heusel et al. 2017).

It is not the Inception-v3 that is trained today: average pools leave the padding out of the mean, the last block pools
by the maximum, and there are 1008 classes. Layers are called as in the PyTorch files of its weights; their batch
normalisation is part of the convolutions here. All is float32, and products have precision HIGHEST: by default TPUs and
GPUs round the factors, which moves a Frechet distance.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.errors import DataError

SIDE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008
HIGHEST = jax.lax.Precision.HIGHEST


def features(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    """What the metrics of generated images are computed from: float32, a row for each image.

    params: of `Inception`. image_BHWC: uint8 with 3 channels, of any size; it is resized to 299 x 299.

    pool_BD [B, 2048]: averages over the last feature map: FID, KID, precision and recall.
    spatial_BD [B, 2023]: the first 7 channels of the graph's mixed_6/conv, flattened as [17, 17, 7]: sFID (Nash et al.
      2021).
    logits_BK [B, 1008]: of the classes. unbiased_logits_BK: without the bias, as the Inception Score takes them.

    Raises:
      DataError: images of another type or shape.
    """
    if image_BHWC.dtype != np.uint8 or image_BHWC.ndim != 4 or image_BHWC.shape[3] != 3 or 0 in image_BHWC.shape:
        raise DataError(
            f"images of {image_BHWC.dtype} and shape {list(image_BHWC.shape)}; Inception takes uint8 [B, H, W, 3]"
        )
    x_BHWC = (resize(jnp.asarray(image_BHWC, jnp.float32)) - 128) / 128
    return Inception().apply({"params": params}, x_BHWC)


def resize(x_BHWC: jax.Array) -> jax.Array:
    """Bilinear interpolation to 299 x 299 as in TensorFlow 1: pixel i is read at i * size / 299, without antialiasing.

    Later versions and other libraries read at (i + 1/2) * size / 299 - 1/2.
    """
    for axis in (2, 1):
        size = x_BHWC.shape[axis]
        position = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
        low = position.astype(np.int32)
        fraction = np.expand_dims(position - low.astype(np.float32), [i for i in range(4) if i != axis])
        before = x_BHWC.take(low, axis)
        x_BHWC = before + (x_BHWC.take(np.minimum(low + 1, size - 1), axis) - before) * fraction
    return x_BHWC


def conv_relu(
    x_BHWC: jax.Array, name: str, width: int, window: tuple[int, int] = (1, 1), stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    """A convolution, its batch normalisation folded in, and a ReLU."""
    return nn.relu(nn.Conv(width, window, stride, padding, precision=HIGHEST, name=name)(x_BHWC))


def chain(x_BHWC: jax.Array, name: str, *layers: tuple[int, int, int]) -> jax.Array:
    """Convolutions name_1, name_2, ... of (width, rows, columns) that keep the resolution."""
    for i, (width, *window) in enumerate(layers):
        x_BHWC = conv_relu(x_BHWC, f"{name}_{i + 1}", width, tuple(window))
    return x_BHWC


def average(x_BHWC: jax.Array) -> jax.Array:
    """Mean over 3 x 3 pixels, of those that there are."""
    return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)


def halve(x_BHWC: jax.Array) -> jax.Array:
    """Maximum over 3 x 3 pixels, at every other one."""
    return nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID")


class Mixed35(nn.Module):
    """A block at 35 x 35."""

    pool_width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 35, 35, C] -> [B, 35, 35, 224 + pool_width]."""
        branches = [
            conv_relu(x_BHWC, "branch1x1", 64),
            chain(x_BHWC, "branch5x5", (48, 1, 1), (64, 5, 5)),
            chain(x_BHWC, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            conv_relu(average(x_BHWC), "branch_pool", self.pool_width),
        ]
        return jnp.concatenate(branches, axis=3)


class Reduction17(nn.Module):
    """From 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 35, 35, C] -> [B, 17, 17, 480 + C]."""
        double_BHWC = chain(x_BHWC, "branch3x3dbl", (64, 1, 1), (96, 3, 3))
        branches = [
            conv_relu(x_BHWC, "branch3x3", 384, (3, 3), 2, "VALID"),
            conv_relu(double_BHWC, "branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
            halve(x_BHWC),
        ]
        return jnp.concatenate(branches, axis=3)


class Mixed17(nn.Module):
    """A block at 17 x 17."""

    inner: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 17, 17, 768] -> [B, 17, 17, 768]."""
        point, row, column = (self.inner, 1, 1), (self.inner, 1, 7), (self.inner, 7, 1)
        branches = [
            conv_relu(x_BHWC, "branch1x1", 192),
            chain(x_BHWC, "branch7x7", point, row, (192, 7, 1)),
            chain(x_BHWC, "branch7x7dbl", point, column, row, column, (192, 1, 7)),
            conv_relu(average(x_BHWC), "branch_pool", 192),
        ]
        return jnp.concatenate(branches, axis=3)


class Reduction8(nn.Module):
    """From 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 17, 17, C] -> [B, 8, 8, 512 + C]."""
        single_BHWC = chain(x_BHWC, "branch3x3", (192, 1, 1))
        double_BHWC = chain(x_BHWC, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
        branches = [
            conv_relu(single_BHWC, "branch3x3_2", 320, (3, 3), 2, "VALID"),
            conv_relu(double_BHWC, "branch7x7x3_4", 192, (3, 3), 2, "VALID"),
            halve(x_BHWC),
        ]
        return jnp.concatenate(branches, axis=3)


class Mixed8(nn.Module):
    """A block at 8 x 8. max_pool: its pool takes the maximum, not the mean."""

    max_pool: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 8, 8, C] -> [B, 8, 8, 2048]."""
        single_BHWC = chain(x_BHWC, "branch3x3", (384, 1, 1))
        double_BHWC = chain(x_BHWC, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
        pooled_BHWC = nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME") if self.max_pool else average(x_BHWC)
        branches = [
            conv_relu(x_BHWC, "branch1x1", 320),
            conv_relu(single_BHWC, "branch3x3_2a", 384, (1, 3)),
            conv_relu(single_BHWC, "branch3x3_2b", 384, (3, 1)),
            conv_relu(double_BHWC, "branch3x3dbl_3a", 384, (1, 3)),
            conv_relu(double_BHWC, "branch3x3dbl_3b", 384, (3, 1)),
            conv_relu(pooled_BHWC, "branch_pool", 192),
        ]
        return jnp.concatenate(branches, axis=3)


class Classifier(nn.Module):
    """A linear map with the bias apart."""

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, D] -> logits [B, 1008], and the same without the bias."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x_BD.shape[1], CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        unbiased_BK = jnp.dot(x_BD, kernel, precision=HIGHEST)
        return unbiased_BK + bias[None], unbiased_BK


class Inception(nn.Module):
    """The whole network, of images in [-1, 1] that have its size."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Images [B, 299, 299, 3] -> what `features` lists."""
        x_BHWC = conv_relu(x_BHWC, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
        x_BHWC = conv_relu(x_BHWC, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x_BHWC = halve(conv_relu(x_BHWC, "Conv2d_2b_3x3", 64, (3, 3)))
        x_BHWC = conv_relu(x_BHWC, "Conv2d_3b_1x1", 80)
        x_BHWC = halve(conv_relu(x_BHWC, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        for letter, pool_width in zip("bcd", (32, 64, 64), strict=True):
            x_BHWC = Mixed35(pool_width, name=f"Mixed_5{letter}")(x_BHWC)
        x_BHWC = Reduction17(name="Mixed_6a")(x_BHWC)
        for letter, inner in zip("bcd", (128, 160, 160), strict=True):
            x_BHWC = Mixed17(inner, name=f"Mixed_6{letter}")(x_BHWC)
        # A block's first channels are those of its first branch, which the graph calls mixed_6/conv here.
        spatial_BHWC = x_BHWC[..., :SPATIAL_CHANNELS]
        x_BHWC = Mixed17(192, name="Mixed_6e")(x_BHWC)
        x_BHWC = Reduction8(name="Mixed_7a")(x_BHWC)
        x_BHWC = Mixed8(max_pool=False, name="Mixed_7b")(x_BHWC)
        x_BHWC = Mixed8(max_pool=True, name="Mixed_7c")(x_BHWC)
        pool_BD = x_BHWC.mean(axis=(1, 2))
        logits_BK, unbiased_BK = Classifier(name="fc")(pool_BD)
        return {
            "pool_BD": pool_BD,
            "spatial_BD": spatial_BHWC.reshape(len(x_BHWC), -1),
            "logits_BK": logits_BK,
            "unbiased_logits_BK": unbiased_BK,
        }

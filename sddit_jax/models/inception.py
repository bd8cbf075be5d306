"""The Inception-v3 that defines FID: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2016; Heusel et al. 2017).

It differs from the Inception-v3 of today's libraries: average pools leave the padding out of the mean, the last block
pools by the maximum, and there are 1008 classes. Layers have the names of the PyTorch files of its weights; batch
normalisation is folded into the convolutions. Everything is float32 with products of precision HIGHEST: by default TPUs
and GPUs round the factors, which moves a Frechet distance.
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
    """The features that metrics of images are computed from, float32.

    params: of `Inception`. image_BHWC: uint8 [B, H, W, 3]; every size is resized to 299 x 299. Raises DataError for
    images of another dtype or shape. Returns

      pool_BD [B, 2048], means over the last feature map, for FID, KID, precision and recall;
      spatial_BD [B, 2023], the first 7 channels of the graph's mixed_6/conv, [17, 17, 7], for sFID (Nash et al. 2021);
      logits_BK [B, 1008], of the classes, and unbiased_logits_BK, without the bias, for the Inception Score.
    """
    if image_BHWC.dtype != np.uint8 or image_BHWC.ndim != 4 or image_BHWC.shape[3] != 3 or 0 in image_BHWC.shape:
        raise DataError(
            f"images are {image_BHWC.dtype} {list(image_BHWC.shape)}, but Inception takes uint8 [B, H, W, 3]"
        )
    x_BHWC = (resize(jnp.asarray(image_BHWC, jnp.float32)) - 128) / 128
    return Inception().apply({"params": params}, x_BHWC)


def resize(x_BHWC: jax.Array) -> jax.Array:
    """Bilinear interpolation to 299 x 299 as in TensorFlow 1, without antialiasing.

    Pixel i is read at i * size / 299; later versions and other libraries read at (i + 1/2) * size / 299 - 1/2.
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
    """A convolution, into which its batch normalisation is folded, and a ReLU."""
    return nn.relu(nn.Conv(width, window, stride, padding, precision=HIGHEST, name=name)(x_BHWC))


def chain(x_BHWC: jax.Array, name: str, *layers: tuple[int, int, int], halving: bool = False) -> jax.Array:
    """Convolutions name_1, name_2, ... of (width, rows, columns). halving: the last one halves the resolution."""
    for i, (width, *window) in enumerate(layers, 1):
        steps = (2, "VALID") if halving and i == len(layers) else (1, "SAME")
        x_BHWC = conv_relu(x_BHWC, f"{name}_{i}", width, tuple(window), *steps)
    return x_BHWC


def average(x_BHWC: jax.Array) -> jax.Array:
    """The mean over 3 x 3 pixels, without the padding."""
    return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)


def halve(x_BHWC: jax.Array) -> jax.Array:
    """The maximum over 3 x 3 pixels, with stride 2."""
    return nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID")


def concatenate(*branches: jax.Array) -> jax.Array:
    """The channels of all branches."""
    return jnp.concatenate(branches, axis=3)


class Mixed35(nn.Module):
    """A block at 35 x 35."""

    pool_width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 35, 35, C] -> [B, 35, 35, 224 + pool_width]."""
        return concatenate(
            conv_relu(x_BHWC, "branch1x1", 64),
            chain(x_BHWC, "branch5x5", (48, 1, 1), (64, 5, 5)),
            chain(x_BHWC, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            conv_relu(average(x_BHWC), "branch_pool", self.pool_width),
        )


class Reduction17(nn.Module):
    """From 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 35, 35, C] -> [B, 17, 17, 480 + C]."""
        return concatenate(
            conv_relu(x_BHWC, "branch3x3", 384, (3, 3), 2, "VALID"),
            chain(x_BHWC, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), halving=True),
            halve(x_BHWC),
        )


class Mixed17(nn.Module):
    """A block at 17 x 17."""

    inner: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 17, 17, 768] -> [B, 17, 17, 768]."""
        point, row, column = (self.inner, 1, 1), (self.inner, 1, 7), (self.inner, 7, 1)
        return concatenate(
            conv_relu(x_BHWC, "branch1x1", 192),
            chain(x_BHWC, "branch7x7", point, row, (192, 7, 1)),
            chain(x_BHWC, "branch7x7dbl", point, column, row, column, (192, 1, 7)),
            conv_relu(average(x_BHWC), "branch_pool", 192),
        )


class Reduction8(nn.Module):
    """From 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 17, 17, C] -> [B, 8, 8, 512 + C]."""
        return concatenate(
            chain(x_BHWC, "branch3x3", (192, 1, 1), (320, 3, 3), halving=True),
            chain(x_BHWC, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), halving=True),
            halve(x_BHWC),
        )


class Mixed8(nn.Module):
    """A block at 8 x 8. max_pool: its pool takes the maximum, not the mean."""

    max_pool: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, 8, 8, C] -> [B, 8, 8, 2048]."""
        single_BHWC = chain(x_BHWC, "branch3x3", (384, 1, 1))
        double_BHWC = chain(x_BHWC, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
        pooled_BHWC = nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME") if self.max_pool else average(x_BHWC)
        return concatenate(
            conv_relu(x_BHWC, "branch1x1", 320),
            conv_relu(single_BHWC, "branch3x3_2a", 384, (1, 3)),
            conv_relu(single_BHWC, "branch3x3_2b", 384, (3, 1)),
            conv_relu(double_BHWC, "branch3x3dbl_3a", 384, (1, 3)),
            conv_relu(double_BHWC, "branch3x3dbl_3b", 384, (3, 1)),
            conv_relu(pooled_BHWC, "branch_pool", 192),
        )


class Classifier(nn.Module):
    """A linear map that gives its result with and without the bias."""

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, D] -> logits [B, 1008], and logits without the bias."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x_BD.shape[1], CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
        unbiased_BK = jnp.dot(x_BD, kernel, precision=HIGHEST)
        return unbiased_BK + bias[None], unbiased_BK


class Inception(nn.Module):
    """The network, for images in [-1, 1] of 299 x 299 pixels."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Images [B, 299, 299, 3] -> the dict that `features` returns."""
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
        # The first channels of the block are those of its first branch, mixed_6/conv in the graph.
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

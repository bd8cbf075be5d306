"""Features in which sets of images are compared: computed batch by batch on all devices, with moments in float64."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sddit_jax.ahead import begun_ahead
from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation.metrics import RunningMoments
from sddit_jax.models import inception
from sddit_jax.parallel.rows import OverDevices, gather_rows
from sddit_jax.parallel.sharding import replicated
from sddit_jax.weights.inception import WHERE, load_inception

# The covariance of 4,096 features takes a minute to decompose.
MOST_PIXELS = 4096
# Moments are merged in parts of at least so many images.
_PART = 1024


class Features(NamedTuple):
    """Features of a batch, each [B, D]. Only Inception has spatial_BD, for sFID, and logits_BK, for its score."""

    pool_BD: Any
    spatial_BD: Any = None
    logits_BK: Any = None


class FeatureSpace(NamedTuple):
    """A named kind of features.

    function(uint8 images [B, H, W, C]) -> Features: arrays of NumPy, or arrays of JAX that are still being computed.
    Rows beyond the first B are ignored. record: what else a result depends on, for JSON.
    """

    name: str
    function: Callable[[np.ndarray], Features]
    record: dict[str, Any]


class Measured(NamedTuple):
    """The features of a set of images.

    count: number of images. shape: [H, W, C] of an image. pixels_sha256: of all pixels, in the order of the images.
    moments, spatial: of pool_BD and spatial_BD over all images. pool_ND, logits_NK: of the images that `keep` chose.
    """

    count: int
    shape: tuple[int, int, int]
    pixels_sha256: str
    moments: RunningMoments
    spatial: RunningMoments | None
    pool_ND: np.ndarray | None
    logits_NK: np.ndarray | None


def pixels_space() -> FeatureSpace:
    """The pixels in [-0.5, 0.5], for images of at most `MOST_PIXELS` values."""

    def function(image_BHWC: np.ndarray) -> Features:
        if (dimension := image_BHWC[0].size) > MOST_PIXELS:
            raise DataError(
                f"images of {list(image_BHWC.shape[1:])} have {dimension:,} values; --features=pixels is for images of "
                f"at most {MOST_PIXELS:,}"
            )
        return Features(image_BHWC.reshape(len(image_BHWC), -1) / 255 - 0.5)

    return FeatureSpace("pixels", function, {"name": "pixels"})


def inception_space(path: str, mesh: Mesh, batch_size: int) -> FeatureSpace:
    """The features of FID from a file of weights. Grey images become RGB. Raises UserError, also WeightsError."""
    if not path:
        raise UserError(f"features of Inception need the file of its weights: {WHERE}")
    weights = load_inception(Path(path).expanduser())

    def function(params: Any, image_BHWC: jax.Array) -> Features:
        if image_BHWC.shape[3] == 1:
            image_BHWC = jnp.repeat(image_BHWC, 3, axis=3)
        found = inception.features(params, image_BHWC)
        return Features(found["pool_BD"], found["spatial_BD"], found["unbiased_logits_BK"])

    record = {
        "name": "inception",
        "weights": path,
        "weights_sha256": weights.sha256,
        "published_weights": weights.published,
        "resize": "bilinear to 299 x 299, as TensorFlow 1, without antialiasing",
    }
    return device_space("inception", function, weights.params, mesh, batch_size, record)


def device_space(
    name: str,
    function: Callable[[Any, jax.Array], Features],
    params: Any,
    mesh: Mesh,
    batch_size: int,
    record: dict[str, Any],
) -> FeatureSpace:
    """A space whose features are function(params, images), computed on all devices of all processes.

    All processes pass the same images, at most `batch_size` at a time; see `OverDevices`.
    """
    compute, params = OverDevices(function, mesh, batch_size), jax.device_put(params, replicated(mesh))
    return FeatureSpace(name, lambda image_BHWC: compute.begin((params,), (image_BHWC,)), record)


def measure(
    space: FeatureSpace,
    batches: Iterator[np.ndarray],
    *,
    keep: bool | np.ndarray,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Computes the features of images in one pass over the batches [B, H, W, C].

    keep: the images whose features are kept, beside the moments of all images: bool [N], or one bool for all.
    on_batch(count) is called after each batch with the number of images so far.

    Raises DataError for fewer than 2 images, or images of different shapes; also whatever `batches` and `space` raise.
    """
    hashed, count, shape = hashlib.sha256(), 0, None
    pool, spatial, kept, logits = _Moments(), _Moments(), [], []

    def begun() -> Iterator[tuple[Features, int]]:
        nonlocal shape
        for image_BHWC in batches:
            if shape not in (None, image_BHWC.shape[1:]):
                raise DataError(f"an image of {list(image_BHWC.shape[1:])} comes after images of {list(shape)}")
            shape = image_BHWC.shape[1:]
            hashed.update(np.ascontiguousarray(image_BHWC))
            yield space.function(image_BHWC), len(image_BHWC)

    # The devices compute a batch while the host uses the batch before and reads the next.
    for features, size in begun_ahead(begun()):
        found = gather_rows(features, size)
        pool.add(found.pool_BD)
        if found.spatial_BD is not None:
            spatial.add(found.spatial_BD)
        chosen_B = keep[count : count + size] if isinstance(keep, np.ndarray) else np.full(size, keep)
        count += size
        if chosen_B.any():
            kept.append(found.pool_BD[chosen_B])
            logits += [] if found.logits_BK is None else [found.logits_BK[chosen_B]]
        on_batch(count)
    if count < 2:
        raise DataError(f"{count} images have no covariance; at least 2 are needed")
    return Measured(
        count,
        shape,
        hashed.hexdigest(),
        pool.finish(),
        spatial.finish(),
        np.concatenate(kept) if kept else None,
        np.concatenate(logits) if logits else None,
    )


class _Moments:
    """Running moments. Batches are joined to parts of `_PART` images, since merging costs the same for any part."""

    def __init__(self) -> None:
        self.moments: RunningMoments | None = None
        self.waiting: list[np.ndarray] = []

    def add(self, features_BD: np.ndarray) -> None:
        self.waiting.append(features_BD)
        if sum(map(len, self.waiting)) >= _PART:
            self.finish()

    def finish(self) -> RunningMoments | None:
        """The moments of all that was added; None if nothing was."""
        if self.waiting:
            part = RunningMoments.of(np.concatenate(self.waiting))
            self.moments = part if self.moments is None else self.moments.merge(part)
            self.waiting = []
        return self.moments

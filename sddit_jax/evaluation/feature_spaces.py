"""Features in which sets of images are compared, computed on all devices batch by batch, their moments in float64."""

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
from sddit_jax.weights.inception import load_inception

# The covariance of as many takes a minute to decompose.
MOST_PIXELS = 4096
# Moments are merged in parts of so many images.
_PART = 1024


class Features(NamedTuple):
    """Of a batch: `pool_BD` [B, D]; and, of Inception alone, those of sFID and the logits of the Inception Score."""

    pool_BD: Any
    spatial_BD: Any = None
    logits_BK: Any = None


class FeatureSpace(NamedTuple):
    """A name, and what makes the features.

    function(uint8 images [B, H, W, C]) -> Features. It may return arrays of JAX that are still being computed, and that
    have more rows than there are images, which are left out.
    record: what else a result depends on, for JSON.
    """

    name: str
    function: Callable[[np.ndarray], Features]
    record: dict[str, Any]


class Measured(NamedTuple):
    """What is known of a set of images.

    shape: [H, W, C] of an image. pixels_sha256: of all images, one after the other, whatever file they are from.
    moments, spatial: of the features. pool_ND, logits_NK: of the images whose features were to be kept.
    """

    count: int
    shape: tuple[int, int, int]
    pixels_sha256: str
    moments: RunningMoments
    spatial: RunningMoments | None
    pool_ND: np.ndarray | None
    logits_NK: np.ndarray | None


def pixels_space() -> FeatureSpace:
    """Pixels themselves, in [-0.5, 0.5]: for small images."""

    def function(image_BHWC: np.ndarray) -> Features:
        if (dimension := image_BHWC[0].size) > MOST_PIXELS:
            raise DataError(
                f"images of {list(image_BHWC.shape[1:])} have {dimension:,} values; as features, pixels are for images "
                f"of at most {MOST_PIXELS:,}"
            )
        return Features(image_BHWC.reshape(len(image_BHWC), -1) / 255 - 0.5)

    return FeatureSpace("pixels", function, {"name": "pixels"})


def inception_space(path: str, mesh: Mesh, batch_size: int) -> FeatureSpace:
    """Those of FID. Grey images become RGB. Raises UserError without a file of weights; WeightsError."""
    if not path:
        raise UserError(
            "features of Inception need its weights: the file pt_inception-2015-12-05-6726825d.pth of the releases of "
            "mseitzer/pytorch-fid on GitHub"
        )
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
    """A space of function(params, images), computed on all devices of all processes; see `OverDevices`.

    All processes pass the same images, at most `batch_size` at a time.
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
    """Goes through batches of images [B, H, W, C] once.

    keep: whether the features and logits are kept too, not their moments alone; for each image, bool [N], or for all.
    on_batch(count) is called as images are done.

    Raises:
      DataError: fewer than 2 images, images of different shapes, or what `batches` and the features raise.
    """
    hashed, count, shape = hashlib.sha256(), 0, None
    pool, spatial, logits = _Moments(), _Moments(), []
    kept = []

    def checked() -> Iterator[np.ndarray]:
        nonlocal shape
        for image_BHWC in batches:
            if shape not in (None, image_BHWC.shape[1:]):
                raise DataError(f"images of {list(image_BHWC.shape[1:])} behind images of {list(shape)}")
            shape = image_BHWC.shape[1:]
            hashed.update(np.ascontiguousarray(image_BHWC))
            yield image_BHWC

    for found in _computed(space, checked()):
        pool.add(found.pool_BD)
        if found.spatial_BD is not None:
            spatial.add(found.spatial_BD)
        batch = slice(count, count + len(found.pool_BD))
        count = batch.stop
        chosen_B = keep[batch] if isinstance(keep, np.ndarray) else np.full(len(found.pool_BD), keep)
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
    """Running moments of batches, which are put together to parts."""

    def __init__(self) -> None:
        self.moments: RunningMoments | None = None
        self.waiting: list[np.ndarray] = []

    def add(self, features_BD: np.ndarray) -> None:
        self.waiting.append(features_BD)
        if sum(map(len, self.waiting)) >= _PART:
            self.finish()

    def finish(self) -> RunningMoments | None:
        """Of all that was added; None if nothing was."""
        if self.waiting:
            part = RunningMoments.of(np.concatenate(self.waiting))
            self.moments = part if self.moments is None else self.moments.merge(part)
            self.waiting = []
        return self.moments


def _computed(space: FeatureSpace, batches: Iterator[np.ndarray]) -> Iterator[Features]:
    """The features on the host. The devices compute a batch while the one before is used, and the next is read."""
    begun = ((space.function(image_BHWC), len(image_BHWC)) for image_BHWC in batches)
    for features, count in begun_ahead(begun):
        yield gather_rows(features, count)

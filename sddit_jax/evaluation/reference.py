"""What samples are compared with: statistics and features, read from a file or computed from images."""

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured, measure
from sddit_jax.evaluation.image_sets import ImageSet
from sddit_jax.evaluation.metric_table import METRICS, Reference, distance_name
from sddit_jax.evaluation.reference_files import EvaluationFile, Statistics, open_evaluation_file, write_statistics
from sddit_jax.files import check_output, sha256_of
from sddit_jax.models.inception import POOL_FEATURES
from sddit_jax.runs.reporting import Progress
from sddit_jax.runs.versions import versions

log = logging.getLogger("sddit_jax")


def open_reference(
    path: str | os.PathLike[str],
    space: FeatureSpace,
    samples_shape: tuple[int, int, int, int],
    batch_size: int,
    wanted: Collection[str] | None = None,
) -> Reference:
    """Statistics and features of a file as they are, and otherwise of its images, if a metric needs them.

    samples_shape: [N, H, W, C] of what is to be compared: all that cannot be compared is found before any features of
    `space` are computed. wanted: metrics; None: all for which there is what they need.

    Raises:
      DataError: the file cannot be read, or is of other features than `space`'s, or of images of another size; or there
        are not 2 samples.
      UserError: a wanted metric lacks something.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(
            f"{path} is a folder; a reference is an npz file, which is made of it by --source=folder:{path} "
            "--resolution=SIDE --write_reference=REF.npz"
        )
    file = open_evaluation_file(path, POOL_FEATURES if space.name == "inception" else None)
    if file.pool is None or not _made_with(path, file, space):
        # As in ADM's evaluator: statistics of the file, where it has any, else of its images.
        file = file._replace(pool=None, spatial=None, features_KD=None, count=None)
    _check_shape(path, file, space, samples_shape)
    skipped = {name: why for name in METRICS if (why := _lacking(name, path, file, space, samples_shape[0]))}
    if lacking := [name for name in wanted or () if name in skipped]:
        raise UserError(f"{lacking[0]} cannot be computed: {skipped[lacking[0]]}")
    chosen = [name for name in wanted or METRICS if name not in skipped]
    pool, spatial, count, pool_ND = file.pool, file.spatial, file.count, file.features_KD
    needs = {METRICS[name].needs for name in chosen}
    keep = "features" in needs
    if (pool is None and needs & {"pool", "spatial"}) or (pool_ND is None and keep):
        images = measure_set(space, file.images, batch_size, f"reference {path}", keep=keep)
        pool_ND = images.pool_ND
        if pool is None:
            pool, spatial, count = _statistics(images.moments), _statistics(images.spatial), images.count
    record = {
        "path": str(path),
        "sha256": sha256_of(path),
        "statistics_of": "its images" if file.pool is None else "the file",
        "count": count,
        "features_count": None if pool_ND is None else len(pool_ND),
        "images": None if file.images is None else list(file.images.shape),
        "record": file.record,
    }
    return Reference(pool, spatial, count, pool_ND, chosen, skipped, record)


def write_reference(
    path: str | os.PathLike[str],
    space: FeatureSpace,
    images: ImageSet,
    record: dict[str, Any],
    batch_size: int,
    keep: int,
) -> int:
    """Writes statistics of images, features of some, and a record; returns how many images the statistics are of.

    keep: of how many images, evenly over all, the features are kept. Raises UserError.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise DataError(f"{path}: a file of statistics is called NAME.npz")
    check_output(path)
    count = images.shape[0]
    keep = min(keep, count)
    kept_N = np.zeros(count, bool)
    kept_N[np.arange(keep) * count // max(keep, 1)] = True
    measured = measure_set(space, images, batch_size, "features", keep=kept_N)
    pool, spatial = _statistics(measured.moments), _statistics(measured.spatial)
    for name, statistics in ((distance_name(space), pool), ("sfid", spatial)):
        if statistics and (words := metrics.few_images(statistics.covariance_DD, measured.count)):
            log.warning("%s: %s", METRICS[name].title if name in METRICS else name, words)
    record = {
        **record,
        "image_shape": list(measured.shape),
        "left_out": count - measured.count,
        "pixels_sha256": measured.pixels_sha256,
        "features": space.record,
        "versions": versions(),
    }
    if jax.process_index() == 0:
        write_statistics(path, pool, spatial, measured.pool_ND, measured.count, record)
    return measured.count


def measure_set(
    space: FeatureSpace, images: ImageSet, batch_size: int, words: str, *, keep: bool | np.ndarray
) -> Measured:
    """`measure` with progress in the log."""
    progress = Progress(images.shape[0], primary=jax.process_index() == 0, unit="image")
    try:
        return measure(space, images.batches(batch_size), keep=keep, on_batch=lambda n: progress.show(n, words))
    finally:
        progress.close()


def _statistics(moments: metrics.RunningMoments | None) -> Statistics | None:
    return None if moments is None else Statistics(*moments.finalise())


def _made_with(path: Path, file: EvaluationFile, space: FeatureSpace) -> bool:
    """Whether a file's statistics are of the features of `space`; those that do not say are Inception's, as ADM's.

    Raises DataError if they are of others, and there are no images to take instead.
    """
    features = file.record.get("features", {"name": "inception"})
    for key in ("name", "weights_sha256"):
        if key in features and features[key] != space.record.get(key):
            if file.images is not None:
                log.warning("%s: its statistics have features of %s %s; its images are taken", path, key, features[key])
                return False
            raise DataError(
                f"{path} has statistics of features of {key} {features[key]}, but the samples' features have "
                f"{space.record.get(key)}; write it again with these"
            )
    return True


def _check_shape(
    path: Path, file: EvaluationFile, space: FeatureSpace, samples_shape: tuple[int, int, int, int]
) -> None:
    """Raises DataError if samples are too few, or a file is of images of another size or of as many other features."""
    count, height, width, _ = samples_shape
    if count < 2:
        raise DataError(f"{count} sample has no covariance; at least 2 are needed")
    known = file.record.get("image_shape") if file.images is None else file.images.shape[1:]
    if known is not None and tuple(known[:2]) != (height, width):
        raise DataError(
            f"the samples are {height}x{width}, but the images of {path} are {known[0]}x{known[1]}; both should have "
            "one resolution"
        )
    if file.pool is None and file.images.shape[1:] == samples_shape[1:]:
        return

    def dimension(shape: tuple[int, ...]) -> int:
        return space.function(np.zeros((1, *shape[1:]), np.uint8)).pool_BD.shape[1]

    expected = dimension(file.images.shape) if file.pool is None else len(file.pool.mean_D)
    if expected != (found := dimension(samples_shape)):
        raise DataError(f"{path} has {expected} features, but the samples have {found}")


def _lacking(name: str, path: Path, file: EvaluationFile, space: FeatureSpace, samples: int) -> str:
    """What a metric would need besides what there is; empty if nothing."""
    metric = METRICS[name]
    if metric.of_inception and space.name != "inception":
        return f"it is of features of Inception, not of {space.name}"
    if metric.needs == "spatial" and file.pool is not None and file.spatial is None:
        return f"{path} has no mu_s and sigma_s"
    if metric.needs == "features":
        if file.images is None and file.features_KD is None:
            return f"{path} has neither images nor features"
        reference = len(file.features_KD) if file.features_KD is not None else file.images.shape[0]
        if min(samples, reference) < metric.least:
            return f"each side needs at least {metric.least} images"
    return ""

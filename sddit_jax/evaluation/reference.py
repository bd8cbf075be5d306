"""References, with which samples are compared: statistics and features, from a file or computed from its images."""

import logging
import os
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured, measure
from sddit_jax.evaluation.image_sets import ImageSet
from sddit_jax.evaluation.metric_table import METRICS, Reference, distance_name
from sddit_jax.evaluation.reference_files import EvaluationFile, open_evaluation_file, write_statistics
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
    """The statistics and features in a file. Those that it lacks are computed from its images, if a metric needs them.

    samples_shape: [N, H, W, C]. batch_size: images whose features are computed at a time. wanted: metrics; None: all
    metrics for which the file and the samples have what they need.

    Raises, before any features are computed:
      DataError: the file cannot be read, or has other features than `space`, or images of another size than the
        samples; or there are fewer than 2 samples.
      UserError: a wanted metric lacks something.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(
            f"{path} is a folder; a reference is an npz file. Write one with `python -m sddit_jax.evaluate "
            f"--source=folder:{path} --resolution=SIDE --write_reference=REF.npz`"
        )
    file = open_evaluation_file(path, POOL_FEATURES if space.name == "inception" else None)
    if file.pool is None or not _made_with(path, file, space):
        # ADM's evaluator too takes the file's statistics if it has any, and otherwise its images.
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
            (pool, spatial), count = _statistics(images), images.count
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
    """Writes statistics of images, features of `keep` of them, and a record, to a file that `open_reference` reads.

    keep: number of images, spread evenly over all, whose features are kept. Returns the number of images that the
    statistics are of: all that could be read. Raises UserError.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise DataError(f"{path}: the name of a file of statistics should be NAME.npz")
    check_output(path)
    count = images.shape[0]
    keep = min(keep, count)
    kept_N = np.zeros(count, bool)
    kept_N[np.arange(keep) * count // max(keep, 1)] = True
    measured = measure_set(space, images, batch_size, "features", keep=kept_N)
    pool, spatial = _statistics(measured)
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
    """`measure` with its progress in the log, beside `words`."""
    with closing(Progress(images.shape[0], primary=jax.process_index() == 0, unit="image")) as progress:
        return measure(space, images.batches(batch_size), keep=keep, on_batch=lambda n: progress.show(n, words))


def _statistics(measured: Measured) -> tuple[metrics.Statistics, metrics.Statistics | None]:
    """Of pooled and of spatial features."""
    return measured.moments.finalise(), None if measured.spatial is None else measured.spatial.finalise()


def _made_with(path: Path, file: EvaluationFile, space: FeatureSpace) -> bool:
    """Whether a file's statistics are of the features of `space`. Without a record, as in ADM's files, it is Inception.

    Raises DataError if they are of other features and the file has no images.
    """
    features = file.record.get("features", {"name": "inception"})
    for key in ("name", "weights_sha256"):
        if key in features and features[key] != space.record.get(key):
            if file.images is not None:
                log.warning("%s has statistics of features of %s %s: its images are used", path, key, features[key])
                return False
            raise DataError(
                f"{path} has statistics of features of {key} {features[key]}, but the samples' features have "
                f"{space.record.get(key)}; write the file again with the samples' features"
            )
    return True


def _check_shape(
    path: Path, file: EvaluationFile, space: FeatureSpace, samples_shape: tuple[int, int, int, int]
) -> None:
    """Raises DataError for fewer than 2 samples, or a file with another size of images or number of features."""
    count, height, width, _ = samples_shape
    if count < 2:
        raise DataError(f"{count} sample has no covariance; at least 2 are needed")
    known = file.record.get("image_shape") if file.images is None else file.images.shape[1:]
    if known is not None and tuple(known[:2]) != (height, width):
        raise DataError(
            f"the samples are {height}x{width}, but the images of {path} are {known[0]}x{known[1]}; both should have "
            "one size"
        )
    if file.pool is None and file.images.shape[1:] == samples_shape[1:]:
        return

    def dimension(shape: tuple[int, ...]) -> int:
        return space.function(np.zeros((1, *shape[1:]), np.uint8)).pool_BD.shape[1]

    expected = dimension(file.images.shape) if file.pool is None else len(file.pool.mean_D)
    if expected != (found := dimension(samples_shape)):
        raise DataError(f"{path} has {expected} features, but the samples have {found}")


def _lacking(name: str, path: Path, file: EvaluationFile, space: FeatureSpace, samples: int) -> str:
    """What a metric needs that the file or the samples lack; empty if nothing. samples: their number."""
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

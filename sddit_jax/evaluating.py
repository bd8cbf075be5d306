"""Sets of images against a reference: Frechet distances, Inception Score, precision, recall and kernel distances."""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sddit_jax import metrics
from sddit_jax.data.evaluation_files import EvaluationFile, Statistics, open_evaluation_file, write_statistics
from sddit_jax.data.image_sets import ImageSet
from sddit_jax.errors import DataError, UserError
from sddit_jax.feature_spaces import FeatureSpace, Measured, measure
from sddit_jax.models.inception import POOL_FEATURES
from sddit_jax.reporting import Progress

log = logging.getLogger("sddit_jax")

METRICS = ("fid", "sfid", "is", "pr", "kid")
_OF_INCEPTION = ("sfid", "is")
# Of the Inception Score, of precision and recall, and of KID, as most report them.
SPLIT_SIZE, NEIGHBOURS, SUBSETS, SUBSET_SIZE = 5000, 3, 100, 1000
_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "pr": "precision, recall",
    "is": "Inception Score",
}


class Reference(NamedTuple):
    """What samples are compared with. A part is None where the file does not have it.

    pool, spatial: statistics of features of `count` images (None: the file does not say). images: what was measured of
    the file's images. record: for JSON.
    """

    pool: Statistics | None
    spatial: Statistics | None
    count: int | None
    images: Measured | None
    record: dict[str, Any]


class Evaluation(NamedTuple):
    """results: name -> value. settings: of the metrics. warnings: what to know of them. skipped: metric -> why."""

    results: dict[str, float]
    settings: dict[str, Any]
    warnings: list[str]
    skipped: dict[str, str]


def distance_name(space: FeatureSpace) -> str:
    """What the Frechet distance is called: fid, or fd_NAME in another space than Inception's."""
    return "fid" if space.name == "inception" else f"fd_{space.name}"


def open_reference(
    path: str | os.PathLike[str], space: FeatureSpace, wanted: Collection[str], batch_size: int
) -> Reference:
    """Statistics of a file as they are, and otherwise of its images; its images also where a wanted metric needs them.

    Raises:
      DataError: the file cannot be read, or is of other features than `space`'s.
    """
    path = Path(path).expanduser()
    file = open_evaluation_file(path, POOL_FEATURES if space.name == "inception" else None)
    has_statistics = file.pool is not None and _made_with(path, file, space)
    images = None
    if file.images is not None and (not has_statistics or {"pr", "kid"} & set(wanted)):
        images = measure_set(space, file.images, batch_size, f"reference {path}", keep=True)
    # As in ADM's evaluator: statistics of the file, where it has any, else of its images.
    pool, spatial, count = file.pool, file.spatial, file.count
    if not has_statistics:
        pool, spatial, count = _statistics(images.moments), _statistics(images.spatial), images.count
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    record = {
        "path": str(path),
        "sha256": sha256,
        "statistics_of": "the file" if has_statistics else "its images",
        "count": count,
        "images": None if file.images is None else list(file.images.shape),
        "record": file.record,
    }
    return Reference(pool, spatial, count, images, record)


def _statistics(moments: metrics.RunningMoments | None) -> Statistics | None:
    return None if moments is None else Statistics(*moments.finalise())


def _made_with(path: Path, file: EvaluationFile, space: FeatureSpace) -> bool:
    """Whether a file's statistics are of the features of `space`; those that do not say are Inception's, as ADM's.

    Raises DataError if they are of others, and there are no images to take instead.
    """
    features = file.record.get("features", {"name": "inception"})
    for key in ("name", "weights_sha256"):
        found = features.get(key) if isinstance(features, dict) else features
        if key in features and found != space.record.get(key):
            if file.images is not None:
                log.warning("%s: its statistics have features of %s %s; its images are taken", path, key, found)
                return False
            raise DataError(
                f"{path} has statistics of features of {key} {found}, but the samples' features have "
                f"{space.record.get(key)}; write it again with these"
            )
    return True


def check_resolution(reference: Reference, height: int, width: int) -> None:
    """Raises DataError if a reference is known to be of images of another size."""
    known = reference.record["images"] or reference.record["record"].get("image_shape")
    if not isinstance(known, list) or len(known) < 3:
        return
    if tuple(known[-3:-1]) != (height, width):
        raise DataError(
            f"the samples are {height}x{width}, but the images of {reference.record['path']} are "
            f"{known[-3]}x{known[-2]}; both should have one resolution"
        )


def check_dimension(reference: Reference, dimension: int) -> None:
    """Raises DataError if a reference is of another number of features."""
    if len(reference.pool.mean_D) != dimension:
        raise DataError(
            f"{reference.record['path']} has statistics of {len(reference.pool.mean_D)} features, but the samples have "
            f"{dimension}"
        )


def measure_set(space: FeatureSpace, images: ImageSet, batch_size: int, words: str, *, keep: bool) -> Measured:
    """`measure` with progress in the log."""
    progress = Progress(images.shape[0], primary=jax.process_index() == 0, unit="image")
    try:
        return measure(space, images.batches(batch_size), keep=keep, on_batch=lambda n: progress.show(n, words))
    finally:
        progress.close()


def evaluate(
    samples: Measured, reference: Reference, space: FeatureSpace, wanted: Collection[str] | None = None
) -> Evaluation:
    """All metrics that are wanted; None: all for which there is what they need.

    results: fid, sfid, inception_score(_std), precision, recall, kid(_std); in another space than Inception's, fd_NAME
    and kd_NAME(_std) stand for fid and kid.

    Raises:
      UserError: a wanted metric lacks something.
    """
    check_resolution(reference, *samples.shape[:2])
    check_dimension(reference, len(samples.moments.mean_D))
    lacking = {name: why for name in METRICS if (why := _lacking(name, samples, reference, space))}
    for name in wanted or ():
        if name in lacking:
            raise UserError(f"{name} cannot be computed: {lacking[name]}")
    chosen = [name for name in METRICS if name in (wanted or METRICS) and name not in lacking]
    results, settings, warnings = {}, {}, []
    if not space.record.get("published_weights", True):
        warnings.append("the weights of Inception are not the published ones: these are no FID, sFID and so on")
    if "fid" in chosen:
        mean_D, covariance_DD = samples.moments.finalise()
        results[distance_name(space)] = metrics.frechet_distance(mean_D, covariance_DD, *reference.pool)
        warnings += few_images_warnings(samples.moments, reference)
    if "sfid" in chosen:
        results["sfid"] = metrics.frechet_distance(*samples.spatial.finalise(), *reference.spatial)
    if "is" in chosen:
        score = metrics.inception_score(samples.logits_NK, SPLIT_SIZE)
        results |= dict(zip(("inception_score", "inception_score_std"), score, strict=True))
        settings["inception_score_split"] = SPLIT_SIZE
    if "pr" in chosen:
        found = metrics.precision_recall(reference.images.pool_ND, samples.pool_ND, NEIGHBOURS)
        results |= dict(zip(("precision", "recall"), found, strict=True))
        settings["neighbours"] = NEIGHBOURS
    if "kid" in chosen:
        name = "kid" if space.name == "inception" else f"kd_{space.name}"
        size = min(SUBSET_SIZE, samples.count, reference.images.count)
        found = metrics.kernel_distance_of_subsets(samples.pool_ND, reference.images.pool_ND, SUBSETS, size)
        results |= dict(zip((name, f"{name}_std"), found, strict=True))
        settings |= {"kid_subsets": SUBSETS, "kid_subset_size": size, "kid_seed": 0}
    if samples.spatial is None:
        lacking = {name: why for name, why in lacking.items() if name not in _OF_INCEPTION}
    return Evaluation(results, settings, warnings, lacking)


def few_images_warnings(moments: metrics.RunningMoments, reference: Reference) -> list[str]:
    """What to say of a side that has no more images than features."""
    sides = [("samples", moments.finalise()[1], moments.count)]
    if reference.count is not None:
        sides.append(("reference", reference.pool.covariance_DD, reference.count))
    return [f"{side}: {words}" for side, *of in sides if (words := metrics.few_images(*of))]


def _lacking(name: str, samples: Measured, reference: Reference, space: FeatureSpace) -> str:
    """What a metric would need besides what there is; empty if nothing."""
    path = reference.record["path"]
    if name in _OF_INCEPTION and samples.spatial is None:
        return f"it is of features of Inception, not of {space.name}"
    if name == "sfid" and reference.spatial is None:
        return f"{path} has no mu_s and sigma_s"
    if name in ("pr", "kid") and reference.images is None:
        return f"{path} has no images"
    if name == "pr" and min(samples.count, reference.images.count) <= NEIGHBOURS:
        return f"each side needs at least {NEIGHBOURS + 1} images"
    return ""


def write_reference(
    path: str | os.PathLike[str], space: FeatureSpace, images: ImageSet, record: dict[str, Any], batch_size: int
) -> int:
    """Writes the statistics of images, with a record of how they were made; returns how many images those are.

    Raises DataError.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise DataError(f"{path}: a file of statistics is called NAME.npz")
    measured = measure_set(space, images, batch_size, "features", keep=False)
    pool, spatial = _statistics(measured.moments), _statistics(measured.spatial)
    if words := metrics.few_images(pool.covariance_DD, measured.count):
        log.warning("%s", words)
    record = {
        **record,
        "image_shape": list(measured.shape),
        "left_out": images.shape[0] - measured.count,
        "pixels_sha256": measured.pixels_sha256,
        "features": space.record,
        "versions": versions(),
    }
    if jax.process_index() == 0:
        write_statistics(path, pool, spatial, measured.count, record)
    return measured.count


def read_sidecar(path: Path) -> dict[str, Any]:
    """The record of how samples were made: beside NAME.npz NAME.json, of a folder samples.json in it or beside it.

    Empty if there is none. Raises DataError if it is no JSON object.
    """
    places = [path / "samples.json", path.parent / "samples.json"] if path.is_dir() else [path.with_suffix(".json")]
    for place in places:
        if place.is_file():
            try:
                record = json.loads(place.read_text())
            except (OSError, ValueError) as error:
                raise DataError(f"{place} cannot be read as JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{place} holds a {type(record).__name__}; it should hold an object")
            return record
    return {}


def full_record(
    path: Path, samples: Measured, reference: Reference, space: FeatureSpace, evaluation: Evaluation
) -> dict[str, Any]:
    """The results with every condition, for JSON."""
    made = read_sidecar(path)
    warnings = list(evaluation.warnings)
    if made.get("count") not in (None, samples.count):
        warnings.append(f"the record of the samples is of {made['count']} images, but there are {samples.count}")
    return {
        "results": evaluation.results,
        "warnings": warnings,
        "skipped": evaluation.skipped,
        "checkpoint_step": made.get("checkpoint_step"),
        "sampler": made.get("sampler"),
        "guidance": made.get("guidance"),
        "samples": {
            "path": str(path),
            "count": samples.count,
            "image_shape": list(samples.shape),
            "pixels_sha256": samples.pixels_sha256,
            "record": made or None,
        },
        "reference": reference.record,
        "features": space.record | {"dimension": len(samples.moments.mean_D)},
        "settings": evaluation.settings,
        "versions": versions(),
    }


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines for a person: what was compared, a line for each result, and what to know of them."""
    made, samples, reference = record, record["samples"], record["reference"]
    height, width, _ = samples["image_shape"]
    yield f"samples    {samples['count']:,} of {height}x{width}: {samples['path']}"
    if made["checkpoint_step"] is not None:
        sampler = made["sampler"] or {}
        yield (
            f"           step {made['checkpoint_step']}, {sampler.get('name')} with {sampler.get('steps')} steps, "
            f"guidance {made['guidance']}"
        )
    count = "an unknown number of" if reference["count"] is None else f"{reference['count']:,}"
    yield f"reference  {count} images: {reference['path']}"
    weights = record["features"].get("weights_sha256")
    yield f"features   {record['features']['name']}" + (f" {weights[:8]}" if weights else "")
    results = record["results"]
    for name, value in results.items():
        if not name.endswith("_std"):
            spread = f" +- {results[f'{name}_std']:.3g}" if f"{name}_std" in results else ""
            yield f"  {_TITLES.get(name, name):<18} {value:.6g}{spread}"
    for name, why in record["skipped"].items():
        yield f"  {_TITLES.get(name, name):<18} not computed: {why}"
    for words in record["warnings"]:
        yield f"warning: {words}"


def versions() -> dict[str, str]:
    """Of the packages that results come from."""
    return {name: importlib.metadata.version(name) for name in ("jax", "numpy", "scipy", "sddit-jax")}

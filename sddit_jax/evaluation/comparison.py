"""Sets of images against a reference: Frechet distances, Inception Score, precision, recall and kernel distances."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured, measure
from sddit_jax.evaluation.image_sets import ImageSet
from sddit_jax.evaluation.reference_files import EvaluationFile, Statistics, open_evaluation_file, write_statistics
from sddit_jax.models.inception import POOL_FEATURES
from sddit_jax.runs.reporting import Progress
from sddit_jax.runs.versions import versions

log = logging.getLogger("sddit_jax")

METRICS = ("fid", "sfid", "is", "pr", "kid")
_OF_INCEPTION = ("sfid", "is")
# Of the Inception Score, of precision and recall, and of KID, as most report them.
SPLIT_SIZE, NEIGHBOURS, SUBSETS, SUBSET_SIZE = 5000, 3, 100, 1000
# Of images on each side.
_LEAST = {"pr": NEIGHBOURS + 1, "kid": 2}
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
    """What samples are compared with, and in what. A part is None where the file does not have it, or none needs it.

    pool, spatial: statistics of features of `count` images (None: the file does not say). pool_ND: pooled features of
    images. metrics: those to compute. skipped: metric -> what it lacks. record: for JSON.
    """

    pool: Statistics | None
    spatial: Statistics | None
    count: int | None
    pool_ND: np.ndarray | None
    metrics: list[str]
    skipped: dict[str, str]
    record: dict[str, Any]


class Evaluation(NamedTuple):
    """results: name -> value. settings: of the metrics. warnings: what to know of them."""

    results: dict[str, float]
    settings: dict[str, Any]
    warnings: list[str]


def distance_name(space: FeatureSpace) -> str:
    """What the Frechet distance is called: fid, or fd_NAME in another space than Inception's."""
    return "fid" if space.name == "inception" else f"fd_{space.name}"


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
    needed = ({"fid", "sfid"} if pool is None else set()) | ({"pr", "kid"} if pool_ND is None else set())
    if needed & set(chosen):
        keep = not {"pr", "kid"}.isdisjoint(chosen)
        images = measure_set(space, file.images, batch_size, f"reference {path}", keep=keep)
        pool_ND = images.pool_ND
        if pool is None:
            pool, spatial, count = _statistics(images.moments), _statistics(images.spatial), images.count
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    record = {
        "path": str(path),
        "sha256": sha256,
        "statistics_of": "its images" if file.pool is None else "the file",
        "count": count,
        "features_count": None if pool_ND is None else len(pool_ND),
        "images": None if file.images is None else list(file.images.shape),
        "record": file.record,
    }
    return Reference(pool, spatial, count, pool_ND, chosen, skipped, record)


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
    if name in _OF_INCEPTION and space.name != "inception":
        return f"it is of features of Inception, not of {space.name}"
    if name == "sfid" and file.pool is not None and file.spatial is None:
        return f"{path} has no mu_s and sigma_s"
    if name in _LEAST:
        if file.images is None and file.features_KD is None:
            return f"{path} has neither images nor features"
        reference = len(file.features_KD) if file.features_KD is not None else file.images.shape[0]
        if min(samples, reference) < _LEAST[name]:
            return f"each side needs at least {_LEAST[name]} images"
    return ""


def measure_set(
    space: FeatureSpace, images: ImageSet, batch_size: int, words: str, *, keep: bool | np.ndarray
) -> Measured:
    """`measure` with progress in the log."""
    progress = Progress(images.shape[0], primary=jax.process_index() == 0, unit="image")
    try:
        return measure(space, images.batches(batch_size), keep=keep, on_batch=lambda n: progress.show(n, words))
    finally:
        progress.close()


def evaluate(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    """The metrics of `reference.metrics`, of samples whose features were kept.

    results: fid, sfid, inception_score(_std), precision, recall, kid(_std); in another space than Inception's, fd_NAME
    and kd_NAME(_std) stand for fid and kid.
    """
    results, settings, warnings = {}, {}, []
    if not space.record.get("published_weights", True):
        warnings.append("the weights of Inception are not the published ones: these are no FID, sFID and so on")

    def add_distance(name: str, moments: metrics.RunningMoments, statistics: Statistics) -> None:
        results[name] = metrics.frechet_distance(*moments.finalise(), *statistics)
        warnings.extend(few_images_warnings(_TITLES.get(name, name), moments, statistics, reference.count))

    if "fid" in reference.metrics:
        add_distance(distance_name(space), samples.moments, reference.pool)
    if "sfid" in reference.metrics:
        add_distance("sfid", samples.spatial, reference.spatial)
    if "is" in reference.metrics:
        score = metrics.inception_score(samples.logits_NK, SPLIT_SIZE)
        results |= dict(zip(("inception_score", "inception_score_std"), score, strict=True))
        settings["inception_score_split"] = SPLIT_SIZE
    if "pr" in reference.metrics:
        found = metrics.precision_recall(reference.pool_ND, samples.pool_ND, NEIGHBOURS)
        results |= dict(zip(("precision", "recall"), found, strict=True))
        settings["neighbours"] = NEIGHBOURS
    if "kid" in reference.metrics:
        name = "kid" if space.name == "inception" else f"kd_{space.name}"
        size = min(SUBSET_SIZE, samples.count, len(reference.pool_ND))
        found = metrics.kernel_distance_of_subsets(samples.pool_ND, reference.pool_ND, SUBSETS, size)
        results |= dict(zip((name, f"{name}_std"), found, strict=True))
        settings |= {"kid_subsets": SUBSETS, "kid_subset_size": size, "kid_seed": 0}
    return Evaluation(results, settings, warnings)


def few_images_warnings(
    name: str, moments: metrics.RunningMoments, statistics: Statistics, count: int | None
) -> list[str]:
    """What to say of a Frechet distance, called `name`, a side of which has no more images than features.

    moments: of the samples. statistics: of the reference, of `count` images, if that is known.
    """
    sides = [("samples", moments.finalise()[1], moments.count)]
    if count is not None:
        sides.append(("reference", statistics.covariance_DD, count))
    return [f"{name}, {side}: {words}" for side, *of in sides if (words := metrics.few_images(*of))]


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
            log.warning("%s: %s", _TITLES.get(name, name), words)
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


def check_output(path: Path) -> None:
    """Raises UserError if a file cannot be written; it is asked before hours of work."""
    why = ""
    if path.is_dir():
        why = "it is a folder"
    elif not path.parent.is_dir():
        why = f"{path.parent} is not a folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "there is no permission"
    if why:
        raise UserError(f"{path} could not be written: {why}")


def find_samples(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Where images are, absolute, and the record of how they were made; empty if there is none.

    path: NAME.npz, whose record is NAME.json; a folder of images; or a folder that `sample` wrote to, or its images/.
    Raises DataError for a record that is not as it should be.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    if not path.is_dir():
        return path, _read_sidecar(path.with_suffix(".json"))
    made = _read_sidecar(path / "samples.json")
    if made.get("format") in ("npz", "png"):
        return path / ("images" if made["format"] == "png" else "samples.npz"), made
    if path.name == "images":
        made = _read_sidecar(path.parent / "samples.json")
        if made.get("format") == "png":
            return path, made
    return path, {}


def _read_sidecar(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} holds a {type(record).__name__}; it should hold an object")
    if not isinstance(sampler := record.get("sampler"), dict | None):
        raise DataError(f"{path}: sampler is {sampler!r}; it should be an object")
    return record


def full_record(
    path: Path,
    made: dict[str, Any],
    samples: Measured,
    reference: Reference,
    space: FeatureSpace,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """The results with every condition, for JSON. path, made: as of `find_samples`."""
    # What is of Inception alone is not missed elsewhere.
    foreign = () if space.name == "inception" else _OF_INCEPTION
    warnings = list(evaluation.warnings)
    if made.get("count") not in (None, samples.count):
        warnings.append(f"the record of the samples is of {made['count']} images, but there are {samples.count}")
    return {
        "results": evaluation.results,
        "warnings": warnings,
        "skipped": {name: why for name, why in reference.skipped.items() if name not in foreign},
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

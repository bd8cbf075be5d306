"""Compares samples with a reference: Frechet distances, Inception Score, precision, recall and kernel distances."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sddit_jax.errors import DataError
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured
from sddit_jax.evaluation.metric_table import METRICS, Evaluation, Reference
from sddit_jax.files import read_json
from sddit_jax.runs.versions import versions


def evaluate(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    """Computes the metrics that `reference.metrics` names, for samples that were measured with keep=True.

    The results are fid, sfid, inception_score(_std), precision, recall, kid(_std). In another space than Inception's,
    fd_NAME stands for fid, and kd_NAME(_std) for kid.
    """
    whole = Evaluation({}, {}, [])
    if not space.record.get("published_weights", True):
        whole.warnings.append("the weights of Inception are not the published ones: the results are no FID, sFID etc.")
    for name, metric in METRICS.items():
        if name in reference.metrics:
            found = metric.compute(samples, reference, space)
            whole.results.update(found.results)
            whole.settings.update(found.settings)
            whole.warnings.extend(found.warnings)
    return whole


def find_samples(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The absolute path of images, and the record of how `sample` made them; {} without a record.

    path: NAME.npz, whose record is NAME.json; a folder of images; or a folder that `sample` wrote to, or its images/.
    Raises DataError for a record that is damaged.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    if not path.is_dir():
        return path, _read_record(path.with_suffix(".json"))
    made = _read_record(path / "samples.json")
    if made.get("format") in ("npz", "png"):
        return path / ("images" if made["format"] == "png" else "samples.npz"), made
    if path.name == "images":
        made = _read_record(path.parent / "samples.json")
        if made.get("format") == "png":
            return path, made
    return path, {}


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    record = read_json(path, DataError)
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
    """The results with every condition, for JSON. path, made: as `find_samples` returns them."""
    warnings = list(evaluation.warnings)
    if made.get("count") not in (None, samples.count):
        warnings.append(f"the record of the samples is of {made['count']} images, but there are {samples.count}")
    # In another space nobody expects the metrics of Inception.
    expected = {name for name, metric in METRICS.items() if space.name == "inception" or not metric.of_inception}
    return {
        "results": evaluation.results,
        "warnings": warnings,
        "skipped": {name: why for name, why in reference.skipped.items() if name in expected},
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


def comparison_table(record: dict[str, Any]) -> Iterator[str]:
    """The lines that `evaluate` prints: what was compared, the results, skipped metrics, and warnings."""
    samples, reference, results = record["samples"], record["reference"], record["results"]
    titles = {name: metric.title for name, metric in METRICS.items()} | {"inception_score": METRICS["is"].title}
    height, width, _ = samples["image_shape"]
    yield f"samples    {samples['count']:,} of {height}x{width}: {samples['path']}"
    if record["checkpoint_step"] is not None:
        sampler = record["sampler"] or {}
        yield (
            f"           step {record['checkpoint_step']}, {sampler.get('name')} with {sampler.get('steps')} steps, "
            f"guidance {record['guidance']}"
        )
    count = "an unknown number of" if reference["count"] is None else f"{reference['count']:,}"
    yield f"reference  {count} images: {reference['path']}"
    weights = record["features"].get("weights_sha256")
    yield f"features   {record['features']['name']}" + (f" {weights[:8]}" if weights else "")
    for name, value in results.items():
        if not name.endswith("_std"):
            spread = f" +- {results[f'{name}_std']:.3g}" if f"{name}_std" in results else ""
            yield f"  {titles.get(name, name):<18} {value:.6g}{spread}"
    for name, why in record["skipped"].items():
        yield f"  {titles.get(name, name):<18} not computed: {why}"
    for words in record["warnings"]:
        yield f"warning: {words}"

"""Sets of images against a reference: Frechet distances, Inception Score, precision, recall and kernel distances."""

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
    """The metrics of `reference.metrics`, of samples whose features were kept.

    results: fid, sfid, inception_score(_std), precision, recall, kid(_std); in another space than Inception's, fd_NAME
    and kd_NAME(_std) stand for fid and kid.
    """
    whole = Evaluation({}, {}, [])
    if not space.record.get("published_weights", True):
        whole.warnings.append("the weights of Inception are not the published ones: these are no FID, sFID and so on")
    for name, metric in METRICS.items():
        if name in reference.metrics:
            found = metric.compute(samples, reference, space)
            whole.results.update(found.results)
            whole.settings.update(found.settings)
            whole.warnings.extend(found.warnings)
    return whole


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
    """The results with every condition, for JSON. path, made: as of `find_samples`."""
    # What is of Inception alone is not missed elsewhere.
    foreign = {name for name, metric in METRICS.items() if metric.of_inception and space.name != "inception"}
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


def comparison_table(record: dict[str, Any]) -> Iterator[str]:
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
            yield f"  {_title(name):<18} {value:.6g}{spread}"
    for name, why in record["skipped"].items():
        yield f"  {_title(name):<18} not computed: {why}"
    for words in record["warnings"]:
        yield f"warning: {words}"


def _title(name: str) -> str:
    """What a person calls a metric, or a result that has another name than its metric."""
    if name in METRICS:
        return METRICS[name].title
    return {"inception_score": "Inception Score"}.get(name, name)

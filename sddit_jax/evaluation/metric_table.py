"""The table of metrics that compare samples with a reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured
from sddit_jax.evaluation.reference_files import Statistics

# Of the Inception Score, of precision and recall, and of KID, as most report them.
SPLIT_SIZE, NEIGHBOURS, SUBSETS, SUBSET_SIZE = 5000, 3, 100, 1000


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


class Metric(NamedTuple):
    """A row of the table.

    compute(samples, reference, space): the results. title: what a person calls it. needs: of reference and samples,
    "pool" or "spatial" for moments of these features, "features" for pooled features of `least` images on each side, or
    nothing. of_inception: it is computed from Inception's features alone.
    """

    compute: Callable[[Measured, Reference, FeatureSpace], Evaluation]
    title: str
    needs: str = ""
    of_inception: bool = False
    least: int = 2


def distance_name(space: FeatureSpace) -> str:
    """What the Frechet distance is called: fid, or fd_NAME in another space than Inception's."""
    return "fid" if space.name == "inception" else f"fd_{space.name}"


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


def _frechet(
    name: str, moments: metrics.RunningMoments, statistics: Statistics, count: int | None, title: str
) -> Evaluation:
    distance = metrics.frechet_distance(*moments.finalise(), *statistics)
    return Evaluation({name: distance}, {}, few_images_warnings(title, moments, statistics, count))


def _fid(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    name = distance_name(space)
    title = METRICS["fid"].title if name == "fid" else name
    return _frechet(name, samples.moments, reference.pool, reference.count, title)


def _sfid(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    del space
    return _frechet("sfid", samples.spatial, reference.spatial, reference.count, METRICS["sfid"].title)


def _inception_score(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    del reference, space
    mean, std = metrics.inception_score(samples.logits_NK, SPLIT_SIZE)
    results = {"inception_score": mean, "inception_score_std": std}
    return Evaluation(results, {"inception_score_split": SPLIT_SIZE}, [])


def _precision_recall(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    del space
    precision, recall = metrics.precision_recall(reference.pool_ND, samples.pool_ND, NEIGHBOURS)
    return Evaluation({"precision": precision, "recall": recall}, {"neighbours": NEIGHBOURS}, [])


def _kernel_distance(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    name = "kid" if space.name == "inception" else f"kd_{space.name}"
    size = min(SUBSET_SIZE, samples.count, len(reference.pool_ND))
    mean, std = metrics.kernel_distance_of_subsets(samples.pool_ND, reference.pool_ND, SUBSETS, size)
    settings = {"kid_subsets": SUBSETS, "kid_subset_size": size, "kid_seed": 0}
    return Evaluation({name: mean, f"{name}_std": std}, settings, [])


# Adding a metric is one function and one row.
METRICS = {
    "fid": Metric(_fid, "FID", needs="pool"),
    "sfid": Metric(_sfid, "sFID", needs="spatial", of_inception=True),
    "is": Metric(_inception_score, "Inception Score", of_inception=True),
    "pr": Metric(_precision_recall, "precision, recall", needs="features", least=NEIGHBOURS + 1),
    "kid": Metric(_kernel_distance, "KID", needs="features"),
}

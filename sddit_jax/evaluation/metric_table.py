"""The table of metrics that compare samples with a reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import FeatureSpace, Measured

# The usual settings of the Inception Score, of precision and recall, and of KID.
SPLIT_SIZE, NEIGHBOURS, SUBSETS, SUBSET_SIZE = 5000, 3, 100, 1000


class Reference(NamedTuple):
    """What samples are compared with. A part is None if the file does not have it, or no metric needs it.

    pool, spatial: statistics of the features of `count` images (None: the file does not say). pool_ND: pooled features
    of images. metrics: to compute. skipped: metric -> what it lacks. record: for JSON.
    """

    pool: metrics.Statistics | None
    spatial: metrics.Statistics | None
    count: int | None
    pool_ND: np.ndarray | None
    metrics: list[str]
    skipped: dict[str, str]
    record: dict[str, Any]


class Evaluation(NamedTuple):
    """What metrics give. results: name -> value. settings: of the metrics, for JSON. warnings: about the results."""

    results: dict[str, float]
    settings: dict[str, Any]
    warnings: list[str]


class Metric(NamedTuple):
    """A row of the table.

    compute(samples, reference, space): the results. title: for people. needs: "pool" or "spatial" for the moments of
    these features, "features" for pooled features of at least `least` images on each side, "" for nothing of the
    reference. of_inception: the metric is defined for Inception's features only.
    """

    compute: Callable[[Measured, Reference, FeatureSpace], Evaluation]
    title: str
    needs: str = ""
    of_inception: bool = False
    least: int = 2


def distance_name(space: FeatureSpace) -> str:
    """The name of the Frechet distance: fid, or fd_NAME in another space than Inception's."""
    return "fid" if space.name == "inception" else f"fd_{space.name}"


def frechet(
    name: str, moments: metrics.RunningMoments, statistics: metrics.Statistics, count: int | None
) -> Evaluation:
    """The Frechet distance `name` of samples to a reference, with a warning for a side with too few images.

    moments: of the samples. statistics: of `count` images of the reference; None: unknown.
    """
    own = moments.finalise()
    title = METRICS[name].title if name in METRICS else name
    sides = [("samples", own, moments.count)]
    if count is not None:
        sides.append(("reference", statistics, count))
    warnings = [
        f"{title}, {side}: {words}" for side, of, size in sides if (words := metrics.few_images(of.covariance_DD, size))
    ]
    return Evaluation({name: metrics.frechet_distance(*own, *statistics)}, {}, warnings)


def _inception_score(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
    mean, std = metrics.inception_score(samples.logits_NK, SPLIT_SIZE)
    results = {"inception_score": mean, "inception_score_std": std}
    return Evaluation(results, {"inception_score_split": SPLIT_SIZE}, [])


def _precision_recall(samples: Measured, reference: Reference, space: FeatureSpace) -> Evaluation:
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
    "fid": Metric(lambda s, r, space: frechet(distance_name(space), s.moments, r.pool, r.count), "FID", needs="pool"),
    "sfid": Metric(
        lambda s, r, space: frechet("sfid", s.spatial, r.spatial, r.count), "sFID", needs="spatial", of_inception=True
    ),
    "is": Metric(_inception_score, "Inception Score", of_inception=True),
    "pr": Metric(_precision_recall, "precision, recall", needs="features", least=NEIGHBOURS + 1),
    "kid": Metric(_kernel_distance, "KID", needs="features"),
}

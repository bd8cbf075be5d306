"""Formulas of evaluation, in float64 on the host.

`features` are one vector for each image, such as those of models/inception.py.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from sddit_jax.errors import DataError


class Statistics(NamedTuple):
    """Mean [D] and unbiased covariance [D, D] of feature vectors, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray


class RunningMoments(NamedTuple):
    """Mean and scatter of feature vectors that come in parts, float64.

    count: number of vectors. mean_D: their mean. scatter_DD: the sum of (x - mean)(x - mean)' over the vectors.
    """

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "RunningMoments":
        """The moments of N >= 1 vectors. Raises DataError for other shapes and for values that are not finite."""
        features_ND = _checked(features_ND, 1)
        mean_D = features_ND.mean(axis=0)
        centred_ND = features_ND - mean_D
        return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """The moments of both parts together, exact for large means too (Chan, Golub & LeVeque 1983).

        It costs a few passes over D x D numbers, so parts of a thousand vectors are better than parts of ten.
        """
        count = self.count + other.count
        shift_D = other.mean_D - self.mean_D
        between_DD = np.outer(shift_D, shift_D * (self.count * other.count / count))
        mean_D = self.mean_D + shift_D * (other.count / count)
        return RunningMoments(count, mean_D, self.scatter_DD + other.scatter_DD + between_DD)

    def finalise(self) -> Statistics:
        """Mean and covariance. Raises DataError for a single vector, which has no covariance."""
        if self.count < 2:
            raise DataError(f"{self.count} image has no covariance; at least 2 are needed")
        return Statistics(self.mean_D, self.scatter_DD / (self.count - 1))


def moments(features_ND: np.ndarray) -> Statistics:
    """Mean and covariance of N feature vectors. Raises as `RunningMoments`."""
    return RunningMoments.of(features_ND).finalise()


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982), as FID uses it (Heusel et al. 2017).

    tr (A B)^(1/2) is the sum of the singular values of F' G for any F F' = A, G G' = B. Unlike the square root of the
    matrix A B, it is real and exact for singular covariances (fewer images than features), without an offset.
    """

    def factor(covariance_DD: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance_DD)
        # Rounding can make eigenvalues negative.
        return vectors * np.sqrt(np.maximum(values, 0))

    cross = np.linalg.svd(factor(covariance_a).T @ factor(covariance_b), compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def frechet_bias(covariance_DD: np.ndarray, count: int) -> float:
    """The expected error of a Frechet distance, which is too large, if one side's moments are of n = `count` images.

    It is the expected distance of a Gaussian from the moments of n of its samples, to the first order in 1 / n:
    tr C / n for the mean, and 1/(2(n-1)) (sum_ij l_i l_j / (l_i + l_j) + tr C / 2) for the covariance, whose
    eigenvalues are l: half the Bures metric of a Wishart matrix's deviation. It is not valid for n far below D.
    """
    values = np.maximum(np.linalg.eigvalsh(covariance_DD), 0)
    values = values[values > 0]
    pairs = (np.outer(values, values) / np.add.outer(values, values)).sum()
    return float(values.sum() / count + (pairs + values.sum() / 2) / (2 * (count - 1)))


def few_images(covariance_DD: np.ndarray, count: int) -> str:
    """A warning if the covariance is of no more images than features; empty otherwise."""
    dimension = len(covariance_DD)
    if count > dimension:
        return ""
    return (
        f"{count} images give a singular covariance of {dimension} features; this Frechet distance is too large by "
        f"about {frechet_bias(covariance_DD, count):.3g}, and comparable only with distances of {count} images"
    )


def inception_score(logits_NK: np.ndarray, split_size: int = 5000) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    logits_NK: without the bias, as in ADM's evaluator. split_size: consecutive images of a split; ADM's evaluator makes
    10 splits of 50,000 images. The images should be in random order: sorted by class they give another score.
    """
    logits_NK = _checked(logits_NK, 1)
    scores = []
    for start in range(0, len(logits_NK), split_size):
        log_p_NK = scipy.special.log_softmax(logits_NK[start : start + split_size], axis=1)
        log_mean_K = scipy.special.logsumexp(log_p_NK, axis=0) - np.log(len(log_p_NK))
        scores.append(np.exp((np.exp(log_p_NK) * (log_p_NK - log_mean_K)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(features_a_ND: np.ndarray, features_b_MD: np.ndarray, block: int = 1024) -> float:
    """KID: the unbiased squared maximum mean discrepancy of the kernel (x'y / D + 1)^3 (Binkowski et al. 2018).

    It may be below 0. block: rows of the kernel matrices in memory at a time.
    """
    a_ND, b_MD = _pair(features_a_ND, features_b_MD, 2)

    def total(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
        rows = range(0, len(x_ND), block)
        return sum(float(np.sum(_kernel(x_ND[i : i + block] @ y_MD.T, x_ND.shape[1]))) for i in rows)

    def within(x_ND: np.ndarray) -> float:
        diagonal = np.sum(_kernel(np.square(x_ND).sum(axis=1), x_ND.shape[1]))
        return float(total(x_ND, x_ND) - diagonal) / (len(x_ND) * (len(x_ND) - 1))

    return within(a_ND) + within(b_MD) - 2 * total(a_ND, b_MD) / (len(a_ND) * len(b_MD))


def _kernel(products: np.ndarray, dimension: int) -> np.ndarray:
    root = products / dimension + 1
    return root * root * root


def kernel_distance_of_subsets(
    features_a_ND: np.ndarray, features_b_MD: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets: KID as it is mostly reported.

    A subset has `subset_size` vectors of each side, drawn without replacement. Raises DataError if a side has fewer.
    """
    a_ND, b_MD = _pair(features_a_ND, features_b_MD, subset_size)
    rng = np.random.default_rng(seed)
    found = [
        kernel_distance(*(x_ND[rng.choice(len(x_ND), subset_size, replace=False)] for x_ND in (a_ND, b_MD)))
        for _ in range(subsets)
    ]
    return float(np.mean(found)), float(np.std(found))


def precision_recall(
    reference_ND: np.ndarray, samples_MD: np.ndarray, neighbours: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Each vector has a closed ball whose radius is the distance to its k-th nearest other vector of the same set.
    Precision is the fraction of samples inside some ball of the reference, recall the fraction of the reference inside
    some ball of the samples. ADM's evaluator computes the same with distances in float16.

    neighbours: k. block: rows of the distance matrices in memory at a time. Raises DataError for a set of k vectors or
    fewer.
    """
    reference_ND, samples_MD = _pair(reference_ND, samples_MD, neighbours + 1)

    def squared_radii(x_ND: np.ndarray) -> np.ndarray:
        radii = []
        for squared in _squared_distances(x_ND, x_ND, block):
            # Index 0 is the vector itself, or a copy of it.
            squared.partition(neighbours, axis=1)
            radii.append(squared[:, neighbours].copy())
        return np.concatenate(radii)

    reference_radius_N, sample_radius_M = squared_radii(reference_ND), squared_radii(samples_MD)
    precise, recalled_N, start = 0, np.zeros(len(reference_ND), bool), 0
    for squared in _squared_distances(samples_MD, reference_ND, block):
        precise += np.count_nonzero((squared <= reference_radius_N).any(axis=1))
        recalled_N |= (squared <= sample_radius_M[start : start + len(squared), None]).any(axis=0)
        start += len(squared)
    return float(precise / len(samples_MD)), float(recalled_N.mean())


def _squared_distances(queries_ND: np.ndarray, references_MD: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Squared Euclidean distances [rows, M], `block` queries at a time; float64."""
    query_N, reference_M = np.square(queries_ND).sum(axis=1), np.square(references_MD).sum(axis=1)
    # The distance of copies must be 0, and not the rounding error of the sum below, which depends on the block.
    rounding = 1e-13 * (query_N.max() + reference_M.max())
    for start in range(0, len(queries_ND), block):
        squared = queries_ND[start : start + block] @ references_MD.T
        squared *= -2
        squared += query_N[start : start + block, None]
        squared += reference_M
        squared[squared < rounding] = 0
        yield squared


def _checked(features_ND: np.ndarray, least: int) -> np.ndarray:
    """float64 [N, D]. Raises DataError for other shapes, N < least, and values that are not finite."""
    features_ND = np.asarray(features_ND, np.float64)
    if features_ND.ndim != 2 or len(features_ND) < least or not features_ND.shape[1]:
        raise DataError(f"features have the shape {list(features_ND.shape)}; at least {least} rows [N, D] are needed")
    if bad := int((~np.isfinite(features_ND).all(axis=1)).sum()):
        raise DataError(f"{bad} of {len(features_ND)} rows of features have values that are not finite")
    return features_ND


def _pair(a_ND: np.ndarray, b_MD: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as `_checked`. Raises DataError if they have different numbers of features."""
    a_ND, b_MD = _checked(a_ND, least), _checked(b_MD, least)
    if a_ND.shape[1] != b_MD.shape[1]:
        raise DataError(f"{a_ND.shape[1]} features on one side and {b_MD.shape[1]} on the other")
    return a_ND, b_MD


def nearest_distances(queries_ND: np.ndarray, references_MD: np.ndarray) -> np.ndarray:
    """Euclidean distance from each query to its nearest reference, [N]."""
    q = np.asarray(queries_ND, np.float64)
    r = np.asarray(references_MD, np.float64)
    squared = np.square(q).sum(1)[:, None] + np.square(r).sum(1)[None] - 2 * q @ r.T
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


def nearest_neighbour_accuracy(features_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Fraction of rows whose nearest other row, by cosine similarity, has the same label."""
    features = np.asarray(features_ND, np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = features @ features.T
    np.fill_diagonal(similarity, -np.inf)
    return float((label_N[similarity.argmax(axis=1)] == label_N).mean())


def neighbour_votes(
    train_ND: np.ndarray,
    train_label_N: np.ndarray,
    test_MD: np.ndarray,
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
    block: int = 256,
) -> np.ndarray:
    """Votes of the k nearest training vectors for the label of each test vector: float64 [M, num_classes].

    Nearness is the cosine similarity s; a training vector has exp(s / temperature) votes for its label (Wu et al. 2018;
    k = 20 and a temperature of 0.07 as in Caron et al. 2021). Of vectors with equal s any may be among the k.

    neighbours: k. block: rows of the similarities in memory at a time. Raises DataError for fewer than k training
    vectors.
    """
    train_ND, test_MD = _pair(train_ND, test_MD, 1)
    if len(train_ND) < neighbours:
        raise DataError(f"{len(train_ND)} training vectors; {neighbours} neighbours need at least {neighbours}")
    train_ND, test_MD = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train_ND, test_MD))
    votes_MC = np.zeros((len(test_MD), num_classes))
    for start in range(0, len(test_MD), block):
        similarity = test_MD[start : start + block] @ train_ND.T
        nearest = np.argpartition(similarity, -neighbours, axis=1)[:, -neighbours:]
        weight = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        rows = np.arange(start, start + len(similarity))[:, None]
        np.add.at(votes_MC, (rows, train_label_N[nearest]), weight)
    return votes_MC


# Penalties from which a linear probe chooses, the strongest first.
PROBE_L2 = (1e-2, 1e-3, 1e-4, 1e-5)


def linear_probe(
    train_ND: np.ndarray, train_label_N: np.ndarray, test_MD: np.ndarray, l2s: Sequence[float] = PROBE_L2
) -> tuple[np.ndarray, float]:
    """Multinomial logistic regression on standardised features: predicted labels [M], and the chosen penalty.

    It minimises the mean cross-entropy + l2 / 2 |W|^2, without a penalty on the bias, in float64 by L-BFGS from 0 until
    no gradient is above 1e-3. Features are standardised by the mean and standard deviation of the training vectors; a
    constant feature becomes 0.

    Each penalty of `l2s` is fitted on the first four fifths of the training vectors, which should be in random order.
    The most accurate one on the last fifth is chosen, the first of equals, and fitted on all training vectors.

    Raises DataError if the first four fifths have one class only.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and only needed here
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    train_ND, test_MD = _pair(train_ND, test_MD, 1)
    fitted = len(train_ND) - len(train_ND) // 5
    if len(np.unique(train_label_N[:fitted])) < 2:
        raise DataError(f"a linear probe needs 2 classes; the {fitted} training images to fit are all of one class")
    mean_D, std_D = train_ND.mean(axis=0), train_ND.std(axis=0)
    # Rounding gives a constant feature a small standard deviation.
    std_D[std_D <= 1e-6 * np.abs(mean_D)] = np.inf
    train_ND, test_MD = ((x - mean_D) / std_D for x in (train_ND, test_MD))

    def fit(x_ND: np.ndarray, label_N: np.ndarray, l2: float) -> LogisticRegression:
        # On small matrices the threads of a busy machine's BLAS cost ten times what they save.
        with threadpool_limits(1 if x_ND.size < 2**22 else None):
            return LogisticRegression(C=1 / (l2 * len(x_ND)), tol=1e-3, max_iter=2000).fit(x_ND, label_N)

    def held_out_accuracy(l2: float) -> float:
        model = fit(train_ND[:fitted], train_label_N[:fitted], l2)
        return float((model.predict(train_ND[fitted:]) == train_label_N[fitted:]).mean())

    l2 = max(l2s, key=held_out_accuracy) if fitted < len(train_ND) else l2s[0]
    return fit(train_ND, train_label_N, l2).predict(test_MD), l2

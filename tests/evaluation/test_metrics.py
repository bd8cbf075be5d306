import functools
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.errors import DataError
from sddit_jax.evaluation.metrics import (
    RunningMoments,
    few_images,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    linear_probe,
    moments,
    nearest_distances,
    nearest_neighbour_accuracy,
    neighbour_votes,
    precision_recall,
)

SEEDS = st.integers(0, 10**6)


def covariance(rng, d, rank):
    factor = rng.normal(size=(d, rank))
    return factor @ factor.T


def test_moments_are_unbiased_and_float64():
    features = np.array([[10_000.0, 1], [10_001, 3], [10_002, 8]], np.float32)
    mean, cov = moments(features)
    np.testing.assert_allclose(mean, [10_001, 4], rtol=1e-15)
    np.testing.assert_allclose(cov, [[1, 3.5], [3.5, 13]], rtol=1e-12)


@given(SEEDS)
def test_frechet_distance_of_diagonal_gaussians(seed):
    rng = np.random.default_rng(seed)
    mean_a, mean_b = rng.normal(size=(2, 5))
    std_a, std_b = rng.uniform(0, 2, (2, 5))
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    distance = frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
    np.testing.assert_allclose(distance, expected, rtol=1e-10, atol=1e-10)


@given(SEEDS)
def test_frechet_distance_is_that_of_sqrtm(seed):
    rng = np.random.default_rng(seed)
    a, b = covariance(rng, 6, 9), covariance(rng, 6, 9)
    mean = rng.normal(size=(2, 6))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(mean[0] - mean[1]).sum() + np.trace(a + b - 2 * root)
    np.testing.assert_allclose(frechet_distance(mean[0], a, mean[1], b), expected, rtol=1e-7)
    np.testing.assert_allclose(frechet_distance(mean[1], b, mean[0], a), expected, rtol=1e-7)


@given(SEEDS)
def test_frechet_distance_of_singular_covariances(seed):
    rng = np.random.default_rng(seed)
    a, b, zero = *rng.normal(size=(2, 6)), np.zeros(6)
    # tr (aa' bb')^(1/2) = |a'b|
    expected = a @ a + b @ b - 2 * abs(a @ b)
    distance = frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b))
    np.testing.assert_allclose(distance, expected, rtol=1e-6, atol=1e-6)
    low = covariance(rng, 6, 2)
    np.testing.assert_allclose(frechet_distance(a, low, a, low), 0, atol=1e-5)
    np.testing.assert_allclose(frechet_distance(a, 0 * low, b, low), np.square(a - b).sum() + np.trace(low))


def make_features(n, d, seed=0, shift=0.0):
    """Correlated and not negative, as pooled features are, some of them dead."""
    rng = np.random.default_rng(seed)
    mixed = np.maximum(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5 + shift, 0)
    mixed[:, ::17] = 0
    return mixed.astype(np.float32)


@given(SEEDS, st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_moments_of_parts_are_those_of_the_whole(seed, sizes):
    features = np.random.default_rng(seed).normal(1, 2, (sum(sizes), 4))
    parts = [RunningMoments.of(part) for part in np.split(features, np.cumsum(sizes)[:-1])]
    for order in (parts, parts[::-1]):
        merged = functools.reduce(RunningMoments.merge, order)
        assert merged.count == sum(sizes)
        mean, cov = merged.finalise()
        np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    # Parts may be merged by several hosts first.
    tree = RunningMoments.merge(parts[0], functools.reduce(RunningMoments.merge, parts[1:]))
    np.testing.assert_allclose(tree.scatter_DD, merged.scatter_DD, rtol=1e-9, atol=1e-12)


def test_moments_lose_no_digits_to_a_large_mean():
    small = np.random.default_rng(0).normal(0, 1, (1000, 3))
    merged = functools.reduce(RunningMoments.merge, (RunningMoments.of(part + 1e7) for part in np.split(small, 100)))
    np.testing.assert_allclose(merged.finalise()[1], np.cov(small, rowvar=False), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 3)), "1 image has no covariance"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        (np.zeros(3), r"shape \[3\]"),
        (np.array([[1, np.nan], [2, 3], [np.inf, 4]]), "2 of 3 rows .* not finite"),
    ],
)
def test_moments_of_what_has_none(features, message):
    with pytest.raises(DataError, match=message):
        moments(features)


@pytest.mark.parametrize("n", [200, 1000])
def test_frechet_distance_of_more_images_than_features(n):
    a, b = make_features(n, 96, 1), make_features(n + 50, 96, 2, 0.3)
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    # Dead features would make the product singular, of which scipy's root is not exact.
    alive = np.arange(96) % 17 != 0
    product = np.cov(a[:, alive].astype(np.float64), rowvar=False) @ np.cov(
        b[:, alive].astype(np.float64), rowvar=False
    )
    root = scipy.linalg.sqrtm(product)
    mean = a.astype(np.float64).mean(axis=0) - b.astype(np.float64).mean(axis=0)
    traces = a.astype(np.float64).var(axis=0, ddof=1).sum() + b.astype(np.float64).var(axis=0, ddof=1).sum()
    expected = mean @ mean + traces - 2 * np.trace(root.real)
    np.testing.assert_allclose(frechet_distance(mean_a, cov_a, mean_b, cov_b), expected, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(mean_a, cov_a, mean_a, cov_a), 0, atol=1e-10 * traces)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (10, 500), (500, 10), (2, 2)])
def test_frechet_distance_of_fewer_images_than_features(n, m):
    a, b = make_features(n, 128, 1).astype(np.float64), make_features(m, 128, 2, 0.3).astype(np.float64)
    centred_a, centred_b = a - a.mean(axis=0), b - b.mean(axis=0)
    # tr (X'X Y'Y)^(1/2) is the sum of the singular values of X Y', which needs no root of a singular matrix.
    cross = scipy.linalg.svdvals(centred_a @ centred_b.T).sum() / np.sqrt((n - 1) * (m - 1))
    traces = np.square(centred_a).sum() / (n - 1) + np.square(centred_b).sum() / (m - 1)
    expected = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + traces - 2 * cross
    np.testing.assert_allclose(frechet_distance(*moments(a), *moments(b)), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(*moments(a), *moments(a)), 0, atol=1e-10 * traces)


def test_frechet_bias_is_what_few_images_add():
    rng = np.random.default_rng(0)
    cov = np.diag([3.0, 1, 0.2, 0.05, 0])
    draws = rng.normal(size=(2000, 200, 5)) * np.sqrt(np.diag(cov))
    found = np.mean([frechet_distance(np.zeros(5), cov, *moments(draw)) for draw in draws])
    np.testing.assert_allclose(frechet_bias(cov, 200), found, rtol=0.04)


def test_few_images_are_told_with_their_bias():
    cov = np.eye(4)
    assert few_images(cov, 5) == ""
    assert "4 images" in few_images(cov, 4)
    assert f"{frechet_bias(cov, 4):.3g}" in few_images(cov, 4)


@pytest.mark.parametrize(("n", "split_size"), [(30, 10), (25, 10), (7, 5000)])
def test_inception_score_is_that_of_splits_in_order(n, split_size):
    logits = np.random.default_rng(n).normal(0, 4, (n, 12)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for part in (p[i : i + split_size] for i in range(0, n, split_size)):
        kl = [sum(x * np.log(x / m) for x, m in zip(row, part.mean(axis=0), strict=True)) for row in part]
        scores.append(np.exp(np.mean(kl)))
    np.testing.assert_allclose(inception_score(logits, split_size), [np.mean(scores), np.std(scores)], rtol=1e-8)


def test_inception_score_has_its_extremes():
    np.testing.assert_allclose(inception_score(np.ones((20, 8))), [1, 0], atol=1e-12)
    # Logits whose probabilities underflow.
    np.testing.assert_allclose(inception_score(np.tile(2000 * np.eye(8), (3, 1))), [8, 0], atol=1e-12)
    sorted_by_class = np.repeat(2000 * np.eye(8), 5, axis=0)
    np.testing.assert_allclose(inception_score(sorted_by_class, split_size=5), [1, 0], atol=1e-12)


def mmd(a, b):
    """The unbiased estimate, term by term."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 16), (20, 30, 64)])
def test_kernel_distance_is_that_of_all_pairs(n, m, d):
    a, b = make_features(n, d, 1), make_features(m, d, 2, 0.5)
    for block in (1, 7, 1024):
        np.testing.assert_allclose(kernel_distance(a, b, block), mmd(a, b), rtol=1e-8)


def test_kernel_distance_of_subsets():
    a, b = make_features(60, 16, 1), make_features(50, 16, 2, 0.5)
    mean, std = kernel_distance_of_subsets(a, b, subsets=400, subset_size=20, seed=3)
    np.testing.assert_allclose(mean, kernel_distance(a, b), atol=5 * std / 20)
    assert (mean, std) == kernel_distance_of_subsets(a, b, subsets=400, subset_size=20, seed=3)
    assert (mean, std) != kernel_distance_of_subsets(a, b, subsets=400, subset_size=20, seed=4)
    # Drawn without replacement: a subset of all is all.
    mean, std = kernel_distance_of_subsets(a[:50], b, subsets=5, subset_size=50)
    np.testing.assert_allclose([mean, std], [kernel_distance(a[:50], b), 0], rtol=1e-9, atol=1e-12)
    with pytest.raises(DataError, match="at least 51 rows"):
        kernel_distance_of_subsets(a, b, subset_size=51)


def brute_force(reference, samples, k=3):
    """Precision and recall by loops, from differences."""

    def squared(x, y):
        return np.square(x.astype(np.float64) - y.astype(np.float64)).sum()

    def radii(points):
        return [sorted(squared(x, y) for y in points)[k] for x in points]

    def share(queries, points):
        return np.mean([any(squared(q, p) <= r for p, r in zip(points, radii(points), strict=True)) for q in queries])

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 3), (30, 40, 64)])
def test_precision_and_recall_are_those_of_all_pairs(n, m, d, seed):
    rng = np.random.default_rng(seed)
    reference, samples = rng.normal(size=(n, d)), rng.normal(0.5, 0.8, (m, d))
    expected = brute_force(reference, samples)
    assert 0 < sum(expected) < 2
    for block in (1, 7, 1024):
        assert precision_recall(reference, samples, block=block) == expected
    assert precision_recall(samples, reference) == expected[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_count_the_edge_and_copies(seed):
    rng = np.random.default_rng(seed)
    # On a grid many distances are equal, and some vectors are.
    reference, samples = rng.integers(0, 5, (30, 2)), rng.integers(2, 9, (40, 2))
    for block in (1, 7, 1024):
        assert precision_recall(reference, samples, block=block) == brute_force(reference, samples)
    # Four copies reach one another within no distance at all.
    copied = np.repeat(rng.normal(9, 1, (5, 64)), 4, axis=0)
    for block in (1, 7, 1024):
        assert precision_recall(copied, np.concatenate([copied[::4], copied + 1]), block=block) == (0.2, 1)


def test_precision_and_recall_have_their_extremes():
    a = make_features(20, 8)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    with pytest.raises(DataError, match="at least 4 rows"):
        precision_recall(a, a[:3])
    with pytest.raises(DataError, match="8 features on one side and 7"):
        precision_recall(a, a[:, :7])


@pytest.mark.parametrize("metric", [precision_recall, kernel_distance])
def test_memory_follows_the_block(metric):
    a, b = make_features(2000, 4, 1), make_features(1500, 4, 2)
    tracemalloc.start()
    metric(a, b, block=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All distances of the larger set are 32 MB.
    assert peak < 4e6


def test_nearest_distances():
    queries = np.array([[0.0, 0], [3, 4], [10, 0]])
    references = np.array([[0.0, 1], [3, 4], [7, 4]])
    np.testing.assert_allclose(nearest_distances(queries, references), [1, 0, 5], atol=1e-7)


@given(SEEDS)
def test_nearest_distances_are_those_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    q, r = rng.normal(size=(4, 3)), rng.normal(size=(6, 3))
    pairs = np.linalg.norm(q[:, None] - r[None], axis=2)
    np.testing.assert_allclose(nearest_distances(q, r), pairs.min(axis=1), rtol=1e-6)


@pytest.mark.parametrize(("label", "accuracy"), [([0, 0, 1, 1], 1.0), ([0, 1, 0, 1], 0.0), ([0, 0, 1, 2], 0.5)])
def test_nearest_neighbour_accuracy_goes_by_direction(label, accuracy):
    features = np.array([[1.0, 0.1], [50, 1], [0.1, 1], [1, 50]])
    assert nearest_neighbour_accuracy(features, np.array(label)) == accuracy


def test_neighbours_vote_by_their_similarity():
    train, label = np.array([[1.0, 0], [3, 4], [0, 7], [-1, 0]]), np.array([0, 1, 1, 2])
    votes = neighbour_votes(train, label, np.array([[2.0, 0], [0, 0.5]]), 3, neighbours=3, temperature=0.5)
    # Cosines 1, 0.6, 0, -1 and 0, 0.8, 1, 0: of the second's equal ones either may count.
    np.testing.assert_allclose(votes[0], [np.exp(2), np.exp(1.2) + 1, 0], rtol=1e-12)
    np.testing.assert_allclose(votes[1, 1], np.exp(1.6) + np.exp(2), rtol=1e-12)
    np.testing.assert_allclose(votes[1].sum(), np.exp(1.6) + np.exp(2) + 1, rtol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_votes_are_those_of_all_pairs(block):
    rng = np.random.default_rng(0)
    train, label, test = rng.normal(size=(90, 5)), rng.integers(0, 4, 90), rng.normal(size=(40, 5))
    expected = np.zeros((40, 4))
    for i, x in enumerate(test):
        cosine = np.array([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in train])
        for j in np.argsort(-cosine)[:20]:
            expected[i, label[j]] += np.exp(cosine[j] / 0.07)
    np.testing.assert_allclose(neighbour_votes(train, label, test, 4, block=block), expected, rtol=1e-6)
    with pytest.raises(DataError, match="19 training vectors; 20 neighbours need at least 20"):
        neighbour_votes(train[:19], label, test, 4)


def test_a_linear_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 400)
    # Far apart on the scale of their spread, but not on that of the other features, and one is constant.
    features = np.concatenate([0.01 * (np.eye(3)[label] + rng.uniform(0, 0.4, (400, 3))), np.full((400, 1), 9.0)], 1)
    predicted, _ = linear_probe(features[:300], label[:300], features[300:])
    np.testing.assert_array_equal(predicted, label[300:])
    # Neither shift nor scale of a feature matters.
    again, _ = linear_probe(features[:300] * 1e3 + 5, label[:300], features[300:] * 1e3 + 5)
    np.testing.assert_array_equal(again, label[300:])


def test_a_linear_probe_of_noise_is_at_chance():
    rng = np.random.default_rng(1)
    label, features = rng.integers(0, 4, 1400), rng.normal(size=(1400, 10))
    predicted, _ = linear_probe(features[:400], label[:400], features[400:])
    # Four standard deviations of a binomial share of 1/4 in 1,000.
    assert abs((predicted == label[400:]).mean() - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5
    assert (linear_probe(features[:400], label[:400], features[400:])[0] == predicted).all()
    with pytest.raises(DataError, match="of one"):
        linear_probe(features[:10], np.zeros(10, int), features)


def test_the_linear_probe_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 2, 200)
    x = rng.normal(size=(200, 1)) + 0.8 * label[:, None]
    points = np.linspace(x.min(), x.max(), 2001)[:, None]
    predicted, l2 = linear_probe(x, label, points, l2s=(1e-2,))
    assert l2 == 1e-2
    z = (x[:, 0] - x.mean()) / x.std()

    def loss(wb):
        # Two classes with opposite weights w / 2: their penalty is l2 / 2 times twice (w / 2)^2.
        return np.logaddexp(0, (1 - 2 * label) * (wb[0] * z + wb[1])).mean() + 1e-2 / 4 * wb[0] ** 2

    w, b = scipy.optimize.minimize(loss, [0.0, 0.0]).x
    border = points[np.flatnonzero(np.diff(predicted))[0], 0]
    assert (border - x.mean()) / x.std() == pytest.approx(-b / w, abs=5e-3)

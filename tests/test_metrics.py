import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from sddit_jax.metrics import frechet_distance, moments, nearest_distances, nearest_neighbour_accuracy

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


def test_nearest_distances():
    queries = np.array([[0.0, 0], [3, 4], [10, 0]])
    references = np.array([[0.0, 1], [3, 4], [7, 4]])
    np.testing.assert_allclose(nearest_distances(queries, references), [1, 0, 5], atol=1e-7)
    np.testing.assert_allclose(nearest_distances(queries, queries, same_set=True), [5, 5, 65**0.5])


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

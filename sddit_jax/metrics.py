"""Formulas of evaluation, in float64 on the host."""

import numpy as np


def moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of N feature vectors."""
    features_ND = np.asarray(features_ND, np.float64)
    return features_ND.mean(axis=0), np.cov(features_ND, rowvar=False)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982), as FID uses it (Heusel et al. 2017).

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), a symmetric matrix, so that no
    complex root arises for singular covariances.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ covariance_b @ root_a), 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def nearest_distances(queries_ND: np.ndarray, references_MD: np.ndarray, *, same_set: bool = False) -> np.ndarray:
    """Euclidean distance from each query to its nearest reference, [N]; `same_set` passes over row i for query i."""
    q = np.asarray(queries_ND, np.float64)
    r = np.asarray(references_MD, np.float64)
    squared = np.square(q).sum(1)[:, None] + np.square(r).sum(1)[None] - 2 * q @ r.T
    if same_set:
        np.fill_diagonal(squared, np.inf)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


def nearest_neighbour_accuracy(features_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Share of rows whose nearest other row, by cosine similarity, has the same label."""
    features = np.asarray(features_ND, np.float64)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = features @ features.T
    np.fill_diagonal(similarity, -np.inf)
    return float((label_N[similarity.argmax(axis=1)] == label_N).mean())

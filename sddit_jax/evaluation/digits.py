"""Samples of digits judged against the 1,797 real ones of scikit-learn."""

import numpy as np
from sklearn.svm import SVC

from sddit_jax.evaluation.metrics import frechet_distance, moments, nearest_distances


def vectors(images_BHWC: np.ndarray) -> np.ndarray:
    """uint8 images as float64 rows in [-0.5, 0.5]."""
    return images_BHWC.reshape(len(images_BHWC), -1) / 255.0 - 0.5


def judge(
    images_BHWC: np.ndarray, label_B: np.ndarray, real_BHWC: np.ndarray, real_label_B: np.ndarray
) -> dict[str, float]:
    """How good samples are, that were asked for with the labels. All images are uint8.

    eval/class_consistency: share recognised as the asked digit by a support vector classifier that is fitted on the
    real ones (fitted on the first half of them it knows 97 % of the second). eval/frechet_pixels: Frechet distance to
    the real digits in pixel space. eval/nearest_real: median distance to the nearest real digit (real to real: 1.01),
    with eval/nearest_real_close the share under 0.5, which would be copies.
    """
    samples, real = vectors(images_BHWC), vectors(real_BHWC)
    # In units of the original 0..16, gamma is the 0.001 that scikit-learn's own example uses.
    classifier = SVC(gamma=0.001 * 16**2).fit(real, real_label_B)
    nearest = nearest_distances(samples, real)
    return {
        "eval/class_consistency": float((classifier.predict(samples) == label_B).mean()),
        "eval/frechet_pixels": frechet_distance(*moments(samples), *moments(real)),
        "eval/nearest_real": float(np.median(nearest)),
        "eval/nearest_real_close": float((nearest < 0.5).mean()),
    }

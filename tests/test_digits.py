"""What README says of the real digits, by which samples are judged."""

import numpy as np
import pytest

from sddit_jax.data.sources import open_source
from sddit_jax.digits import judge, vectors
from sddit_jax.metrics import nearest_distances


@pytest.fixture(scope="module")
def real():
    source = open_source("digits", split="train", image_size=8, channels=1)
    records = [source[i] for i in range(len(source))]
    return np.stack([record["image"] for record in records]), np.stack([record["label"] for record in records])


def test_one_half_of_the_real_digits_judged_by_the_other(real):
    images, labels = real
    found = judge(images[898:], labels[898:], images[:898], labels[:898])
    assert found["eval/class_consistency"] == pytest.approx(0.97, abs=0.005)
    order = np.random.default_rng(0).permutation(len(images))
    a, b = order[:898], order[898:]
    found = judge(images[a], labels[a], images[b], labels[b])
    assert found["eval/frechet_pixels"] == pytest.approx(0.07, abs=0.01)


def test_the_real_digits_are_a_distance_of_one_apart(real):
    rows = vectors(real[0])
    assert np.median(nearest_distances(rows, rows, same_set=True)) == pytest.approx(1.01, abs=0.005)


def test_copies_and_wrong_labels_are_seen(real):
    images, labels = real
    found = judge(images[:200], (labels[:200] + 1) % 10, images, labels)
    assert found["eval/class_consistency"] < 0.01
    assert found["eval/nearest_real"] < 1e-6
    assert found["eval/nearest_real_close"] == 1

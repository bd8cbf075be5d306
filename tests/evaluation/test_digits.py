"""What README says of the real digits, by which samples are judged, and of the run that learns them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from sddit_jax.data.sources import open_source
from sddit_jax.evaluation.digits import judge, vectors


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
    distances = cdist(vectors(real[0]), vectors(real[0]))
    np.fill_diagonal(distances, np.inf)
    assert np.median(distances.min(axis=1)) == pytest.approx(1.01, abs=0.005)


def test_copies_and_wrong_labels_are_seen(real):
    images, labels = real
    found = judge(images[:200], (labels[:200] + 1) % 10, images, labels)
    assert found["eval/class_consistency"] < 0.01
    assert found["eval/nearest_real"] < 1e-6
    assert found["eval/nearest_real_close"] == 1


SAMPLE_IN_PYTORCH = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "ml_collections"):
    sys.modules[name] = None
import numpy as np, torch
from sddit_jax.interop.pytorch import load, sample
inputs = np.load(sys.argv[2])
noise = torch.from_numpy(inputs["noise"]).permute(0, 3, 1, 2).contiguous()
images = sample(load(sys.argv[1]), inputs["label"], noise_BCHW=noise)
np.save(sys.argv[3], images.numpy())
"""


@pytest.mark.slow
def test_the_digits_run_is_recognised_as_well_in_pytorch(real, tmp_path):
    """README's run, exported and sampled without JAX, from the noise of its own evaluation's first draws."""
    root, environment = Path(__file__).parents[2], os.environ | {"XLA_FLAGS": ""}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    run("-m", "sddit_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path}/run")
    model = tmp_path / "model.safetensors"
    run("-m", "sddit_jax.convert", "to-torch", f"--workdir={tmp_path}/run", f"--output={model}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    in_jax = next(row["eval/class_consistency"] for row in reversed(rows) if "eval/class_consistency" in row)

    label_B = np.arange(1000, dtype=np.int32) % 10
    found = []
    for seed in range(1, 6):
        key = jax.random.key(seed)
        noise_BHWC = jax.vmap(lambda i, key=key: jax.random.normal(jax.random.fold_in(key, i), (8, 8, 1)))(
            np.arange(1000)
        )
        np.savez(tmp_path / "inputs.npz", noise=noise_BHWC, label=label_B)
        run("-c", SAMPLE_IN_PYTORCH, model, tmp_path / "inputs.npz", tmp_path / "images.npy")
        found.append(judge(np.load(tmp_path / "images.npy"), label_B, *real)["eval/class_consistency"])
    assert in_jax > 0.96
    assert np.mean(found) == pytest.approx(in_jax, abs=0.002)

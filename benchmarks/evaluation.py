"""Prints the time and the largest memory of each part of an evaluation, and the images per second.

    python benchmarks/evaluation.py --count=50000 --reference_count=10000 --features=random-2048
    python benchmarks/evaluation.py --count=64 --features=inception --features_only

Random images of --resolution pixels go through the code of `evaluate`: features batch by batch, then FID, sFID,
Inception Score, precision, recall and KID of --count images against --reference_count images. Inception has random
weights, which take as long as trained ones. On few cores Inception takes hours for 50,000 images, hence two commands:
the first measures everything after the features, with a projection that gives as many features as Inception; the second
measures Inception alone. With --count below 50,000 it also extrapolates the time of the features to 50,000.
"""

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from sddit_jax import cli
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.feature_spaces import Features, FeatureSpace, Measured, device_space, measure, pixels_space
from sddit_jax.evaluation.metric_table import NEIGHBOURS, SPLIT_SIZE, SUBSET_SIZE, SUBSETS
from sddit_jax.evaluation.reference_files import Statistics
from sddit_jax.models import inception
from sddit_jax.parallel import sharding

COUNT = flags.DEFINE_integer("count", 50_000, "Images to evaluate.", lower_bound=4)
REFERENCE_COUNT = flags.DEFINE_integer("reference_count", 10_000, "Images to compare with.", lower_bound=4)
RESOLUTION = flags.DEFINE_integer("resolution", 256, "Side of the images, in pixels.", lower_bound=8)
FEATURES = flags.DEFINE_enum("features", "random-2048", ["inception", "pixels", "random-2048"], "Features to compute.")
FEATURES_ONLY = flags.DEFINE_bool("features_only", False, "Stop after the features of the images to evaluate.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)


class RandomImages(NamedTuple):
    """Images of noise, each around a brightness of its own."""

    count: int
    seed: int

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [size, H, W, 3]."""
        rng = np.random.default_rng(self.seed)
        for start in range(0, self.count, size):
            shape = (min(size, self.count - start), RESOLUTION.value, RESOLUTION.value, 3)
            noise = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
            yield noise // 2 + rng.integers(0, 128, (shape[0], 1, 1, 1), np.uint8)


def make_space() -> FeatureSpace:
    """The feature space that --features names."""
    if FEATURES.value == "pixels":
        return pixels_space()
    mesh = sharding.make_mesh(ParallelConfig())
    if FEATURES.value == "inception":
        images = np.zeros((1, inception.SIDE, inception.SIDE, 3), np.float32)
        params = jax.jit(inception.Inception().init)(jax.random.key(0), images)["params"]

        def function(params: Any, images: jax.Array) -> Features:
            found = inception.features(params, images)
            return Features(found["pool_BD"], found["spatial_BD"], found["unbiased_logits_BK"])
    else:
        widths = np.cumsum([inception.POOL_FEATURES, inception.SPATIAL_FEATURES])
        total = widths[-1] + inception.CLASSES
        params = np.random.default_rng(0).standard_normal((16 * 16 * 3, total), np.float32) / 16

        def function(params: Any, images: jax.Array) -> Features:
            x = jax.image.resize(images.astype(jnp.float32) / 128, (len(images), 16, 16, 3), "linear", antialias=False)
            return Features(*jnp.split(jax.nn.relu(x.reshape(len(x), -1) @ params), widths, axis=1))

    return device_space(FEATURES.value, function, params, mesh, BATCH_SIZE.value, {})


def timed(what: str, compute: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds that it took. Prints the seconds and the largest memory so far."""
    began = time.monotonic()
    result = compute()
    seconds = time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<58} {seconds:8.1f} s   largest memory so far {memory:5.1f} GiB", flush=True)
    return result, seconds


def main() -> None:
    """Measures and prints."""
    space, count, others = make_space(), COUNT.value, REFERENCE_COUNT.value
    side = RESOLUTION.value
    print(f"{count:,} images of {side} x {side} pixels, features {space.name}, on {jax.devices()}", flush=True)

    def features(images: RandomImages) -> Measured:
        return measure(space, images.batches(BATCH_SIZE.value), keep=True)

    timed("features of one batch, with compilation", lambda: features(RandomImages(BATCH_SIZE.value, 2)))
    samples, seconds = timed(f"features of {count:,} images", lambda: features(RandomImages(count, 0)))
    print(f"  {count / seconds:.4g} images per second")
    if count < 50_000:
        print(f"  50,000 images would take {50_000 * seconds / count / 3600:.2f} hours (extrapolated)")
    if FEATURES_ONLY.value:
        return
    reference, _ = timed(f"features of {others:,} images", lambda: features(RandomImages(others, 1)))

    def frechet(a: metrics.RunningMoments, b: metrics.RunningMoments) -> float:
        return metrics.frechet_distance(*Statistics(*a.finalise()), *b.finalise())

    results = {"FID": timed("FID", lambda: frechet(samples.moments, reference.moments))[0]}
    if samples.spatial is not None:
        results["sFID"] = timed("sFID", lambda: frechet(samples.spatial, reference.spatial))[0]
        results["IS"] = timed("Inception Score", lambda: metrics.inception_score(samples.logits_NK, SPLIT_SIZE))[0]
    results["KID"] = timed(
        "KID",
        lambda: metrics.kernel_distance_of_subsets(
            samples.pool_ND, reference.pool_ND, SUBSETS, min(SUBSET_SIZE, count, others)
        ),
    )[0]
    results["precision, recall"] = timed(
        f"precision and recall, {count:,} x {others:,}",
        lambda: metrics.precision_recall(reference.pool_ND, samples.pool_ND, NEIGHBOURS),
    )[0]
    print(", ".join(f"{name} {value}" for name, value in results.items()))


if __name__ == "__main__":
    cli.run(main)

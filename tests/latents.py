"""Folders of latents with known values, and ImageNet as TensorFlow Datasets gives it."""

import contextlib
import io

import numpy as np
import tensorflow_datasets as tfds

from sddit_jax.data import shards

SHAPE = (4, 6, 3)


def make_plan(records=23, per_shard=5, class_names=("ant", "bee", "cow"), **changes) -> shards.Plan:
    """A plan of latents that no autoencoder has made."""
    fields = {
        "source": "folder:/images",
        "source_split": "train",
        "source_records": records,
        "source_files": "0123456789abcdef",
        "class_names": class_names,
        "codec": {"name": "latents", "weights": "fedcba9876543210", "scaling_factor": 0.5, "shift_factor": 0.25},
        "latent_shape": SHAPE,
        "batch_size": 4,
        "dtype": "float32",
        "records_per_shard": per_shard,
    }
    return shards.Plan(**fields | changes)


def values(plan: shards.Plan) -> np.ndarray:
    """Moments [N, 2, 2, h, w, c] of all images."""
    shape = (plan.source_records, 2, 2, *plan.latent_shape)
    return np.random.default_rng(0).normal(size=shape).astype(np.float16)


def batches(plan: shards.Plan, shard: int, bad=()):
    """What is written of a shard, without the bad ones; the label is the number modulo 3."""
    index = np.array([i for i in plan.images(shard) if i not in bad], np.int64)
    for first in range(0, len(index), plan.batch_size):
        some = index[first : first + plan.batch_size]
        yield values(plan)[some], some % max(len(plan.class_names), 1), some


def write_latents(folder, plan: shards.Plan, bad=()) -> None:
    """A finished folder, without the bad images."""
    shards.begin(folder, plan)
    for shard in shards.unfinished(folder, plan):
        left_out = {f"{i}.png": "not an image" for i in bad if i in plan.images(shard)}
        shards.write_shard(folder, plan, shard, batches(plan, shard, bad), left_out)
    shards.finish(folder, plan)


@contextlib.contextmanager
def imagenet_of_tfds(count: int, photo):
    """tfds:imagenet2012 has `count` validation images, photo(i) with the label 83 i, as encoded files."""

    def records(builder, split, decoders):
        assert (builder.name, split) == ("imagenet2012", f"validation[:{count}]")
        encoded = []
        for i in range(count):
            file = io.BytesIO()
            photo(i).save(file, "JPEG")
            encoded.append({"image": file.getvalue(), "label": 83 * i, "file_name": f"{i}.JPEG"})
        return encoded

    with tfds.testing.mock_data(as_data_source_fn=records):
        yield

"""Computes latents: python -m sddit_jax.prepare --source=folder:PATH --vae=SOURCE --resolution=256 --output=DIR.

Crops every image as ADM does, and writes the autoencoder's mean and standard deviation for the image and its mirror
image to DIR, for --config.data.source=latents:DIR and for TFDS's builder_from_directory. After an interruption the same
command continues; on the same devices the files are the same byte for byte (on GPUs with
XLA_FLAGS=--xla_gpu_deterministic_ops=true). Images that cannot be read are left out and listed in DIR/bad_files.json.
Several processes share the work with --process_index=0 --process_count=4 and so on. They all write to DIR, and need no
other connection.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax
from absl import flags

from sddit_jax import cli
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data.preparation import make_encode, make_plan, prepare
from sddit_jax.data.sources import open_source
from sddit_jax.errors import UserError
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.parallel import sharding
from sddit_jax.runs.reporting import Progress
from sddit_jax.weights.autoencoder import load_autoencoder

SOURCE = flags.DEFINE_string("source", None, "Images: folder:PATH or tfds:NAME, such as tfds:imagenet2012.")
SPLIT = flags.DEFINE_string("split", "train", "Split of --source; for tfds also a slice, such as train[:10%].")
VAE = flags.DEFINE_string("vae", None, "Autoencoder: a folder of diffusers, a file of CompVis, or a name on the hub.")
RESOLUTION = flags.DEFINE_integer("resolution", 256, "Side of the cropped images in pixels.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to; an unfinished one with the same flags is continued.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images in a batch, over all devices of a process.", lower_bound=1)
RECORDS = flags.DEFINE_integer("records_per_shard", 4096, "Images in a file; an interruption loses one file.", 1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the autoencoder's matmuls.")
SCALING = flags.DEFINE_float("scaling_factor", None, "Scaling factor. Left out: that of the autoencoder.")
SHIFT = flags.DEFINE_float("shift_factor", None, "Shift factor. Left out: that of the autoencoder.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TensorFlow Datasets download and prepare tfds:NAME.")
PROCESS = flags.DEFINE_integer("process_index", None, "Number of this process, from 0. Left out: JAX's.")
PROCESSES = flags.DEFINE_integer("process_count", None, "Number of processes that share the work. Left out: JAX's.")
NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "Threads that read images.", lower_bound=1)


def main() -> None:
    """Writes this process's part of the latents."""
    if not (SOURCE.value and VAE.value and OUTPUT.value):
        raise UserError("--source=folder:PATH, --vae=SOURCE and --output=DIR are needed")
    kind, _, path = SOURCE.value.partition(":")
    if kind not in ("folder", "tfds"):
        raise UserError(f"--source={SOURCE.value}: it should be folder:PATH or tfds:NAME")
    index = jax.process_index() if PROCESS.value is None else PROCESS.value
    count = jax.process_count() if PROCESSES.value is None else PROCESSES.value
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} --process_count={count}: processes are numbered 0 to {count - 1}")
    config, params = load_autoencoder(VAE.value, scaling_factor=SCALING.value, shift_factor=SHIFT.value)
    # An absolute path, so that the name of the source does not depend on where the command runs.
    name = f"folder:{Path(path).expanduser().absolute()}" if kind == "folder" else SOURCE.value
    source = open_source(
        name, split=SPLIT.value, image_size=RESOLUTION.value, channels=config.in_channels, download=DOWNLOAD.value
    )
    autoencoder = Autoencoder(config, DTYPE.value)
    plan = make_plan(
        source, SPLIT.value, autoencoder, params, batch_size=BATCH_SIZE.value, records_per_shard=RECORDS.value
    )
    mesh = sharding.make_mesh(ParallelConfig(), jax.local_devices())
    sharding.check_batch(mesh, BATCH_SIZE.value, 1)
    prepare(
        source,
        plan,
        make_encode(autoencoder, params, mesh, BATCH_SIZE.value),
        Path(OUTPUT.value).expanduser(),
        num_threads=NUM_THREADS.value,
        process_index=index,
        process_count=count,
        open_progress=lambda total, done: _shown(Progress(total, done, primary=index == 0, unit="image")),
    )


@contextmanager
def _shown(progress: Progress) -> Iterator[Callable[[int, str], None]]:
    with closing(progress):
        yield progress.show


if __name__ == "__main__":
    cli.run(main)

"""Computes latents once: python -m sddit_jax.prepare --source=folder:PATH --vae=SOURCE --resolution=256 --output=DIR.

Every image is cropped as ADM does, and the autoencoder's mean and standard deviation of it and of its mirror image are
written to DIR, which --config.data.source=latents:DIR and TFDS's builder_from_directory read. The same command goes on
after an interruption, and on the same devices the files end byte for byte as without one (on GPUs with
XLA_FLAGS=--xla_gpu_deterministic_ops=true). Images that cannot be read are left out and listed in DIR/bad_files.json.
Several processes share the work with --process_index=0 --process_count=4 and so on; they need to see the same DIR, and
do not need to see each other.
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

SOURCE = flags.DEFINE_string("source", None, "The images: folder:PATH or tfds:NAME, such as tfds:imagenet2012.")
SPLIT = flags.DEFINE_string("split", "train", "Which of them; for tfds also a slice, such as train[:10%].")
VAE = flags.DEFINE_string("vae", None, "The autoencoder: a folder of diffusers, a file of CompVis, or a hub id.")
RESOLUTION = flags.DEFINE_integer("resolution", 256, "Side of the square images in pixels.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to; continued if it has latents of the same.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images computed at a time, by one process.", lower_bound=1)
RECORDS = flags.DEFINE_integer("records_per_shard", 4096, "Images of a file; an interruption costs one.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the autoencoder's products.")
SCALING = flags.DEFINE_float("scaling_factor", None, "Instead of the autoencoder's own.")
SHIFT = flags.DEFINE_float("shift_factor", None, "Instead of the autoencoder's own.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TensorFlow Datasets prepare what is missing of tfds:NAME.")
PROCESS = flags.DEFINE_integer("process_index", None, "Which of several processes this is. Left out: as jax has it.")
PROCESSES = flags.DEFINE_integer("process_count", None, "How many processes share the work. Left out: as jax has it.")
NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "Threads that read images.", lower_bound=1)


def main() -> None:
    """Writes the latents that the flags ask for."""
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
    source = open_source(
        # The same folder has the same name from wherever the command is run.
        f"folder:{Path(path).expanduser().absolute()}" if kind == "folder" else SOURCE.value,
        split=SPLIT.value,
        image_size=RESOLUTION.value,
        channels=config.in_channels,
        download=DOWNLOAD.value,
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

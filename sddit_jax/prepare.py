"""Computes latents once: python -m sddit_jax.prepare --source=folder:PATH --vae=SOURCE --resolution=256 --output=DIR.

Every image is cropped as ADM does, and the autoencoder's mean and standard deviation of it and of its mirror image are
written to DIR, which --config.data.source=latents:DIR and TFDS's builder_from_directory read. The same command goes on
after an interruption, and on the same devices the files end byte for byte as without one (on GPUs with
XLA_FLAGS=--xla_gpu_deterministic_ops=true). Images that cannot be read are left out and listed in DIR/bad_files.json.
Of several processes each writes shards of its own; they need to see the same DIR.
"""

import collections
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from sddit_jax import cli, sharding
from sddit_jax.data import shards
from sddit_jax.data.images import BadImageError
from sddit_jax.data.sources import ImageSource, open_source
from sddit_jax.errors import Interrupted, UserError
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.reporting import Progress
from sddit_jax.schema import Parallel
from sddit_jax.signals import stop_signals
from sddit_jax.weights.autoencoder import load_autoencoder
from sddit_jax.weights.files import weights_hash

log = logging.getLogger("sddit_jax")

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
NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "Threads that decode images.", lower_bound=1)

Encode = Callable[[np.ndarray], jax.Array]


def make_encode(autoencoder: Autoencoder, params: Any, mesh: jax.sharding.Mesh) -> Encode:
    """uint8 images [B, H, W, C] -> moments float16 [B, 2, 2, h, w, c]; axis 1: image, mirror image; axis 2: mean, std.

    The rows are split over the mesh's devices.
    """
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params = jax.device_put(params, everywhere)

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        x_BHWC = image_BHWC.astype(jnp.float32) / 127.5 - 1
        both_BMHWC = jnp.stack([x_BHWC, x_BHWC[:, :, ::-1]], axis=1)
        mean_BHWC, std_BHWC = autoencoder.encode(params, both_BMHWC.reshape(-1, *image_BHWC.shape[1:]))
        moments = jnp.stack([mean_BHWC, std_BHWC], axis=1).astype(jnp.float16)
        return moments.reshape(-1, 2, *moments.shape[1:])

    compiled = jax.jit(encode, in_shardings=(everywhere, rows), out_shardings=rows)
    return lambda image_BHWC: compiled(params, jax.device_put(image_BHWC, rows))


def make_plan(
    source: ImageSource,
    split: str,
    autoencoder: Autoencoder,
    params: Any,
    *,
    batch_size: int,
    records_per_shard: int,
) -> shards.Plan:
    """What is to be written. Raises ConfigError for a resolution that the autoencoder does not take."""
    image_BHWC = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    latent = jax.eval_shape(autoencoder.encode, params, image_BHWC)[0]
    config = autoencoder.config
    codec = {
        "name": "latents",
        # Of the encoder alone: decoders that were tuned afterwards decode the same latents.
        "weights": weights_hash(params["encoder"]),
        "channels": config.latent_channels,
        "factor": autoencoder.factor,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "resolution": source.image_shape[0],
        "pixel_range": [-1, 1],
    }
    names = "\n".join(source.locate(i) for i in range(len(source)))
    return shards.Plan(
        source=source.name,
        source_split=split,
        source_records=len(source),
        source_files=hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16],
        class_names=source.class_names,
        codec=codec,
        latent_shape=latent.shape[1:],
        batch_size=batch_size,
        dtype=autoencoder.dtype.name,
        records_per_shard=records_per_shard,
    )


def prepare(
    source: ImageSource,
    plan: shards.Plan,
    encode: Encode,
    output: Path,
    *,
    num_threads: int = 16,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Writes this process's shards that are not there yet, waits for those of others, and completes the folder.

    Shard k is the work of process k % process_count.

    Raises:
      DataError: the folder is that of another plan, cannot be written, or not one image can be read.
      Interrupted: by a signal.
    """
    shards.begin(output, plan)
    own = range(process_index, plan.num_shards, process_count)
    missing = [shard for shard in shards.unfinished(output, plan) if shard in own]
    total, left = (sum(len(plan.images(shard)) for shard in group) for group in (own, missing))
    progress = Progress(total, total - left, primary=process_index == 0, unit="image")
    began = time.monotonic()

    with stop_signals() as signals, closing(progress), ThreadPoolExecutor(num_threads) as pool:

        def check_signals() -> None:
            if signals:
                raise Interrupted(f"{signals[0]}: finished shards are kept in {output}; the same command goes on")

        def watched(batches: Iterator[shards.Moments], done: int, first: int) -> Iterator[shards.Moments]:
            for moments, label, index in batches:
                check_signals()
                yield moments, label, index
                now = done + int(index[-1]) + 1 - first
                progress.show(total - left + now, f"{now / (time.monotonic() - began):.4g} images/s")

        done = 0
        for shard in missing:
            images, bad_files = plan.images(shard), {}
            read = _read_ahead(source, images, pool, ahead=2 * plan.batch_size)
            batches = _encoded(encode, _batches(source, read, plan.batch_size, bad_files))
            shards.write_shard(output, plan, shard, watched(batches, done, images.start), bad_files)
            done += len(images)
        if shards.unfinished(output, plan):
            log.info("process %d has written its shards, and waits for the others", process_index)
        while shards.unfinished(output, plan):
            check_signals()
            time.sleep(1)
    if process_index == 0:
        records = shards.finish(output, plan)
        log.info("latents of %d images in %s", records, output)
        if bad := plan.source_records - records:
            log.warning("%d images could not be read and are left out: %s", bad, output / shards.BAD_FILES)


def _read_ahead(source: ImageSource, numbers: range, pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[int, Any]]:
    """Each number with what `source.load` gives or the BadImageError that it raises, in order."""

    def read(number: int) -> tuple[int, Any]:
        try:
            return number, source.load(number)
        except BadImageError as error:
            return number, error

    pending: collections.deque[Future] = collections.deque()
    for number in numbers:
        pending.append(pool.submit(read, number))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(
    source: ImageSource, read: Iterator[tuple[int, Any]], batch_size: int, bad_files: dict[str, str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images uint8 [batch_size, H, W, C], the last ones padded with zeros; label and number [b] of the b real ones."""
    rows = []
    for number, result in read:
        if isinstance(result, BadImageError):
            bad_files[source.locate(number)] = str(result)
            continue
        rows.append((*result, number))
        if len(rows) == batch_size:
            yield _stacked(rows, batch_size)
            rows = []
    if rows:
        yield _stacked(rows, batch_size)


def _stacked(rows: list[tuple[np.ndarray, int, int]], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, label, number = zip(*rows, strict=True)
    image_BHWC = np.zeros((batch_size, *images[0].shape), np.uint8)
    image_BHWC[: len(images)] = images
    return image_BHWC, np.array(label, np.int32), np.array(number, np.int64)


def _encoded(encode: Encode, batches: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Iterator[shards.Moments]:
    """Moments, label and number of the real rows. The device computes a batch while the one before is written."""
    waiting: collections.deque[tuple[jax.Array, np.ndarray, np.ndarray]] = collections.deque()
    for image_BHWC, label, number in batches:
        waiting.append((encode(image_BHWC), label, number))
        if len(waiting) > 1:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _fetched(moments: jax.Array, label: np.ndarray, number: np.ndarray) -> shards.Moments:
    return jax.device_get(moments)[: len(label)], label, number


def main() -> None:
    """Writes the latents that the flags ask for."""
    if not (SOURCE.value and VAE.value and OUTPUT.value):
        raise UserError("--source=folder:PATH, --vae=SOURCE and --output=DIR are needed")
    kind, _, path = SOURCE.value.partition(":")
    if kind not in ("folder", "tfds"):
        raise UserError(f"--source={SOURCE.value}: it should be folder:PATH or tfds:NAME")
    config, params = load_autoencoder(VAE.value, scaling_factor=SCALING.value, shift_factor=SHIFT.value)
    source = open_source(
        # The same folder has the same name from wherever the command is run.
        f"folder:{Path(path).expanduser().absolute()}" if kind == "folder" else SOURCE.value,
        split=SPLIT.value,
        image_size=RESOLUTION.value,
        channels=config.in_channels,
    )
    autoencoder = Autoencoder(config, DTYPE.value)
    plan = make_plan(
        source, SPLIT.value, autoencoder, params, batch_size=BATCH_SIZE.value, records_per_shard=RECORDS.value
    )
    mesh = sharding.make_mesh(Parallel(), jax.local_devices())
    sharding.check_batch(mesh, BATCH_SIZE.value, 1)
    prepare(
        source,
        plan,
        make_encode(autoencoder, params, mesh),
        Path(OUTPUT.value).expanduser(),
        num_threads=NUM_THREADS.value,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


if __name__ == "__main__":
    cli.run(main)

"""Latents of images: read ahead by threads, encoded with their mirror images on all devices, written by shards."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.ahead import begun_ahead, read_ahead
from sddit_jax.data import shards
from sddit_jax.data.image_sources import ImageSource
from sddit_jax.data.images import BadImageError
from sddit_jax.errors import DataError, Interrupted
from sddit_jax.files import weights_hash
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.parallel.rows import OverDevices, gather_rows
from sddit_jax.parallel.sharding import replicated
from sddit_jax.parallel.signals import stop_signals

log = logging.getLogger("sddit_jax")

Encode = Callable[[np.ndarray], jax.Array]
OpenProgress = Callable[[int, int], AbstractContextManager[Callable[[int, str], None]]]


def make_encode(autoencoder: Autoencoder, params: Any, mesh: jax.sharding.Mesh, batch_size: int) -> Encode:
    """uint8 images [b, H, W, C] -> moments float16 [B, 2, 2, h, w, c]; axis 1: image, mirror image; axis 2: mean, std.

    B is `batch_size` rounded up to the devices, over which the rows are split; those behind the first b are of no use.
    """
    params = jax.device_put({"encoder": params["encoder"]}, replicated(mesh))

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        x_BHWC = image_BHWC.astype(jnp.float32) / 127.5 - 1
        both_BMHWC = jnp.stack([x_BHWC, x_BHWC[:, :, ::-1]], axis=1)
        mean_BHWC, std_BHWC = autoencoder.encode(params, both_BMHWC.reshape(-1, *image_BHWC.shape[1:]))
        moments = jnp.stack([mean_BHWC, std_BHWC], axis=1).astype(jnp.float16)
        return moments.reshape(-1, 2, *moments.shape[1:])

    compute = OverDevices(encode, mesh, batch_size)
    return lambda image_bHWC: compute.begin((params,), (image_bHWC,))


def make_plan(
    source: ImageSource,
    split: str,
    autoencoder: Autoencoder,
    params: Any,
    *,
    batch_size: int,
    records_per_shard: int,
) -> shards.Plan:
    """What is to be written.

    Raises ConfigError for a resolution that the autoencoder does not take, DataError for class names that TFDS would
    not give back.
    """
    for name in source.class_names:
        if name != name.strip() or "\n" in name or not name.isprintable():
            raise DataError(f"{source.name}: class {name!r} cannot be written to a text file and read again; rename it")
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
    open_progress: OpenProgress = lambda total, done: nullcontext(lambda done, words: None),
) -> None:
    """Writes this process's shards that are not there yet, waits for those of others, and completes the folder.

    Shard k is the work of process k % process_count. open_progress(total, done) gives a context with show(done, words),
    which is called as images of this process are encoded.

    Raises:
      DataError: the folder is that of another plan, cannot be written, or not one image can be read.
      Interrupted: by a signal.
    """
    shards.begin(output, plan)
    own = range(process_index, plan.num_shards, process_count)
    missing = [shard for shard in shards.unfinished(output, plan) if shard in own]
    total, left = (sum(len(plan.images(shard)) for shard in group) for group in (own, missing))
    began = time.monotonic()

    with stop_signals() as signals, open_progress(total, total - left) as show, ThreadPoolExecutor(num_threads) as pool:

        def check_signals() -> None:
            if signals:
                raise Interrupted(f"{signals[0]}: finished shards are kept in {output}; the same command goes on")

        def watched(batches: Iterator[shards.Moments], done: int, first: int) -> Iterator[shards.Moments]:
            for moments, label, index in batches:
                check_signals()
                yield moments, label, index
                now = done + int(index[-1]) + 1 - first
                show(total - left + now, f"{now / (time.monotonic() - began):.4g} images/s")

        done = 0
        for shard in missing:
            images, bad_files = plan.images(shard), {}
            read = read_ahead(pool, _reader(source), images, ahead=2 * plan.batch_size)
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


def _reader(source: ImageSource) -> Callable[[int], tuple[int, Any]]:
    """read(number) -> the number, and what `source.load` gives or the BadImageError that it raises."""

    def read(number: int) -> tuple[int, Any]:
        try:
            return number, source.load(number)
        except BadImageError as error:
            return number, error

    return read


def _batches(
    source: ImageSource, read: Iterator[tuple[int, Any]], batch_size: int, bad_files: dict[str, str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images uint8 [b, H, W, C], label and number [b]; b is `batch_size`, and less for the last ones."""
    rows = []
    for number, result in read:
        if isinstance(result, BadImageError):
            bad_files[source.locate(number)] = str(result)
            continue
        rows.append((*result, number))
        if len(rows) == batch_size:
            yield _stacked(rows)
            rows = []
    if rows:
        yield _stacked(rows)


def _stacked(rows: list[tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, label, number = zip(*rows, strict=True)
    return np.stack(images), np.array(label, np.int32), np.array(number, np.int64)


def _encoded(encode: Encode, batches: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Iterator[shards.Moments]:
    """Moments, label and number of the images. The device computes a batch while the one before is written."""
    begun = ((encode(image_bHWC), label, number) for image_bHWC, label, number in batches)
    for moments, label, number in begun_ahead(begun):
        yield gather_rows(moments, len(label)), label, number

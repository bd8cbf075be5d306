"""Prepares latents: threads read images ahead, all devices encode them and their mirror images, shard by shard."""

import hashlib
import itertools
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
    """A function from uint8 images [b, H, W, C] to moments float16 [B, 2 (image, mirror), 2 (mean, std), h, w, c].

    B is `batch_size` rounded up to a multiple of the devices, over which the rows are split. The first b rows count.
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
    source: ImageSource, split: str, autoencoder: Autoencoder, params: Any, *, batch_size: int, records_per_shard: int
) -> shards.Plan:
    """The plan of the latents of a source.

    Raises ConfigError for a resolution that the autoencoder does not take, and DataError for class names that TFDS
    cannot store.
    """
    for name in source.class_names:
        if name != name.strip() or "\n" in name or not name.isprintable():
            raise DataError(
                f"{source.name}: class {name!r} has spaces at its ends or characters that cannot be printed, which "
                "TFDS does not store; rename it"
            )
    image_BHWC = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    latent = jax.eval_shape(autoencoder.encode, params, image_BHWC)[0]
    config = autoencoder.config
    codec = {
        "name": "latents",
        # Without the decoder: other decoders, tuned for the same encoder, decode these latents too.
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
    """Writes the missing shards of this process, waits for those of the others, and completes the folder.

    Process i writes the shards k with k % process_count == i, and process 0 completes the folder. open_progress(total,
    done) returns a context manager whose value is called as show(done, words) while this process encodes its images.

    Raises:
      DataError: the folder has another plan or cannot be written, or not one image can be read.
      Interrupted: a signal came.
    """
    shards.begin(output, plan)
    own = range(process_index, plan.num_shards, process_count)
    missing = [shard for shard in shards.unfinished(output, plan) if shard in own]
    total, left = (sum(len(plan.images(shard)) for shard in group) for group in (own, missing))
    began = time.monotonic()

    with stop_signals() as signals, open_progress(total, total - left) as show, ThreadPoolExecutor(num_threads) as pool:

        def check_signals() -> None:
            if signals:
                raise Interrupted(f"{signals[0]}: finished shards are kept in {output}; the same command continues")

        def watched(batches: Iterator[shards.Moments], done: int, first: int) -> Iterator[shards.Moments]:
            for moments, label, index in batches:
                check_signals()
                yield moments, label, index
                now = done + int(index[-1]) + 1 - first
                show(total - left + now, f"{now / (time.monotonic() - began):.4g} images/s")

        done = 0
        for shard in missing:
            images, bad_files = plan.images(shard), {}
            read = _batches(source, pool, images, plan.batch_size, bad_files)
            begun = ((encode(image_bHWC), label, number) for image_bHWC, label, number in read)
            # The devices compute a batch while the batch before is written.
            batches = ((gather_rows(m, len(label)), label, number) for m, label, number in begun_ahead(begun))
            shards.write_shard(output, plan, shard, watched(batches, done, images.start), bad_files)
            done += len(images)
        if shards.unfinished(output, plan):
            log.info("process %d has written its shards, and waits for the other processes", process_index)
        while shards.unfinished(output, plan):
            check_signals()
            time.sleep(1)
    if process_index == 0:
        records = shards.finish(output, plan)
        log.info("latents of %d images are in %s", records, output)
        if bad := plan.source_records - records:
            log.warning("%d images could not be read and are left out: see %s", bad, output / shards.BAD_FILES)


def _batches(
    source: ImageSource, pool: ThreadPoolExecutor, numbers: range, batch_size: int, bad_files: dict[str, str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images uint8 [b, H, W, C], label and number [b] of the good images; b is `batch_size`, and less at the end."""

    def read(number: int) -> tuple[int, tuple[np.ndarray, int] | BadImageError]:
        try:
            return number, source.load(number)
        except BadImageError as error:
            return number, error

    def good() -> Iterator[tuple[np.ndarray, int, int]]:
        for number, result in read_ahead(pool, read, numbers, ahead=2 * batch_size):
            if isinstance(result, BadImageError):
                bad_files[source.locate(number)] = str(result)
            else:
                yield *result, number

    rows = good()
    while batch := list(itertools.islice(rows, batch_size)):
        images, label, number = zip(*batch, strict=True)
        yield np.stack(images), np.array(label, np.int32), np.array(number, np.int64)

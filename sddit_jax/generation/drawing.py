"""Draws samples: as arrays on every host, into a folder that can be continued, and as labelled pictures."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sddit_jax.ahead import begun_ahead
from sddit_jax.errors import Interrupted, UserError
from sddit_jax.files import explained
from sddit_jax.generation.decoding import AS_IT_IS, Decode
from sddit_jax.generation.sample_folder import SampleFolder
from sddit_jax.parallel.distributed import decided_by_primary, stop_requests
from sddit_jax.parallel.rows import OverDevices, gather_rows
from sddit_jax.runs.reporting import Progress, save_labelled_grid
from sddit_jax.sampling.sampler import Sample

log = logging.getLogger("sddit_jax")

Generate = Callable[..., np.ndarray]
STRIP_ROWS = 4
STRIP_COLUMNS = 10
CLASS_GRID_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Generator:
    """Everything that image i follows from, beside i.

    sample(levels=None): a pure function that draws a batch; see `sampler.make_sample` for it and for `levels`.
    noise_levels: of its steps, and 0. params: on all devices of the mesh. labels(indices) -> int32 [N].
    """

    sample: Callable[..., Sample]
    noise_levels: np.ndarray
    decode: Decode
    mesh: jax.sharding.Mesh
    params: Any
    seed: int
    labels: Callable[[range], np.ndarray]


def make_generate(sample: Sample, mesh: jax.sharding.Mesh, batch_size: int, decode: Decode = AS_IT_IS) -> Generate:
    """A function generate(params, seed, label_N, index_N=0, 1, ...) -> images [N, H, W, C] on every host.

        generate = make_generate(sample, mesh, 64)
        images_NHWC = generate(params, seed=0, label_N=np.arange(10))

    It computes batches of `batch_size`, rounded up to a multiple of the devices. Neither changes an image beyond
    rounding.
    """
    compute = OverDevices(sample, mesh, batch_size)

    def generate(params: Any, seed: int, label_N: np.ndarray, index_N: np.ndarray | None = None) -> np.ndarray:
        index_N = np.arange(len(label_N)) if index_N is None else index_N
        return compute.map((params, seed), (index_N.astype(np.int32), label_N.astype(np.int32)), decode)

    return generate


def draw_samples(generator: Generator, folder: SampleFolder) -> None:
    """Draws the batches that a folder lacks, and completes the folder. All processes call this; only process 0 writes.

    A batch is always computed whole, whatever part of it the folder needs, so that the bits of an image do not depend
    on how the indices are divided among jobs. The devices compute a batch while the one before is written.

    Raises:
      UserError: the folder holds other samples, or cannot be written.
      Interrupted: a signal came; the batches that had been begun are finished and kept.
    """
    label_N = generator.labels(folder.indices)
    compute = OverDevices(generator.sample(), generator.mesh, folder.batch_size)
    missing = decided_by_primary(folder.begin)
    if missing and compute.size > folder.batch_size:
        log.warning(
            "batches of %d take as long as batches of %d, the next multiple of %d devices",
            folder.batch_size, compute.size, generator.mesh.size,
        )  # fmt: skip
    total = len(folder.indices)
    done = already = total - sum(len(folder.own(start)) for start in missing)
    progress = Progress(total, done, primary=jax.process_index() == 0, unit="image")
    began = time.monotonic()
    stopped = ""

    with stop_requests() as stopped_by, closing(progress):

        def begun() -> Iterator[tuple[int, jax.Array]]:
            nonlocal stopped
            for start in missing:
                if stopped := stopped_by():
                    return
                indices = range(start, start + folder.batch_size)
                rows = np.array(indices, np.int32), generator.labels(indices)
                yield start, generator.decode(compute.begin((generator.params, generator.seed), rows))

        def interrupted(signal: str) -> Interrupted:
            return Interrupted(f"{signal}: {done} of {total} images are in {folder.path}; the same command continues")

        def check() -> None:
            # Several processes agree on a signal only if all of them ask, and only process 0 calls this.
            if jax.process_count() == 1 and (signal := stopped_by()):
                raise interrupted(signal)

        for start, images in begun_ahead(begun()):
            decided_by_primary(functools.partial(folder.write, start, gather_rows(images, folder.batch_size)))
            done += len(folder.own(start))
            progress.show(done, f"{(done - already) / (time.monotonic() - began):.4g} images/s")
        if stopped:
            raise interrupted(stopped)
        decided_by_primary(lambda: folder.finish(label_N, check))


def draw_strip(generator: Generator, first: int, path: Path, record: dict[str, Any]) -> None:
    """Writes a PNG with a row for each of four images: denoised at noise levels from the highest to the lowest.

    first: index of the first image. record: is written into the PNG. Raises UserError if it cannot be written.
    """
    steps = len(generator.noise_levels) - 1
    levels = np.unique(np.linspace(1, steps, min(steps, STRIP_COLUMNS)).round().astype(int))
    indices = range(first, first + STRIP_ROWS)
    label_R = generator.labels(indices)
    columns = [
        make_generate(generator.sample(levels=int(level)), generator.mesh, STRIP_ROWS, generator.decode)(
            generator.params, generator.seed, label_R, np.array(indices)
        )
        for level in levels
    ]
    names = [f"{sigma:.3g}" for sigma in generator.noise_levels[levels - 1]]
    _save(np.stack(columns, axis=1), [str(label) for label in label_R], names, "sigma", path, record)


def draw_class_grid(
    generator: Generator, classes: Sequence[int], first: int, path: Path, record: dict[str, Any]
) -> None:
    """Writes a PNG with a row for each class and a column for each noise, of the images first, first + 1, ...

    record: is written into the PNG. Raises UserError if it cannot be written.
    """
    columns = CLASS_GRID_COLUMNS
    index_N = np.tile(np.arange(first, first + columns), len(classes))
    generate = make_generate(generator.sample(), generator.mesh, columns, generator.decode)
    images = generate(generator.params, generator.seed, np.repeat(classes, columns), index_N)
    images_RCHWC = images.reshape(len(classes), columns, *images.shape[1:])
    _save(images_RCHWC, [str(label) for label in classes], [str(i) for i in index_N[:columns]], "", path, record)


def _save(
    images_RCHWC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    corner: str,
    path: Path,
    record: dict[str, Any],
) -> None:
    def save() -> None:
        with explained(path, UserError):
            save_labelled_grid(images_RCHWC, rows, columns, corner, path, json.dumps(record))

    decided_by_primary(save)

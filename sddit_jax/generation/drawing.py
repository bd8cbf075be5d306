"""Draws samples in batches, into a folder that goes on where a killed process ended; and pictures of how they arise."""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sddit_jax.errors import Interrupted, UserError
from sddit_jax.files import explained
from sddit_jax.generation.decoding import Decode
from sddit_jax.generation.sample_folder import SampleFolder
from sddit_jax.parallel.distributed import decided_by_primary, stop_requests
from sddit_jax.runs.reporting import Progress, save_labelled_grid
from sddit_jax.sampling.sampler import Sample, gather, make_draw, make_generate

log = logging.getLogger("sddit_jax")

STRIP_ROWS = 4
STRIP_COLUMNS = 10
CLASS_GRID_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """All that images follow from.

    sample(levels=None): the pure function that draws a batch; see `sampler.make_sample`, which has the argument too.
    noise_levels: those of its steps, and 0. params: on all devices of the mesh. labels(indices) -> int32 [N].
    """

    sample: Callable[..., Sample]
    noise_levels: np.ndarray
    decode: Decode
    mesh: jax.sharding.Mesh
    params: Any
    seed: int
    labels: Callable[[range], np.ndarray]


def draw_samples(model: Model, folder: SampleFolder) -> None:
    """Draws the batches that a folder lacks, and completes it. All processes call this; process 0 alone writes.

    A batch is always computed whole and with the same indices, whatever part of it is asked for: so the bits of an
    image do not depend on how the work was cut. It is filled up to a multiple of the devices with the images behind it,
    which are not kept. The devices compute a batch while the one before is written.

    Raises:
      UserError: the folder holds other samples, or cannot be written.
      Interrupted: by a signal; the batches that were being computed are kept.
    """
    label_N = model.labels(folder.indices)
    filled = folder.batch_size + -folder.batch_size % model.mesh.size
    draw = make_draw(model.sample(), model.mesh, model.decode)
    missing = decided_by_primary(folder.begin)
    if missing and filled > folder.batch_size:
        log.warning(
            "batches of %d take as long as batches of %d: %d devices compute equally many each",
            folder.batch_size, filled, model.mesh.size,
        )  # fmt: skip
    total = len(folder.indices)
    done = already = total - sum(len(folder.own(start)) for start in missing)
    progress = Progress(total, done, primary=jax.process_index() == 0, unit="image")
    began = time.monotonic()
    waiting: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def keep() -> None:
        nonlocal done
        start, images = waiting.popleft()
        images_BHWC = gather(images)
        decided_by_primary(lambda: folder.write(start, images_BHWC))
        done += len(folder.own(start))
        progress.show(done, f"{(done - already) / (time.monotonic() - began):.4g} images/s")

    with stop_requests() as stopped_by, closing(progress):

        def check() -> None:
            if stopped := stopped_by():
                while waiting:
                    keep()
                raise Interrupted(f"{stopped}: {done} of {total} images are in {folder.path}; the same command goes on")

        for start in missing:
            check()
            batch = range(start, start + filled)
            waiting.append((start, draw(model.params, model.seed, np.array(batch), model.labels(batch))))
            if len(waiting) > 1:
                keep()
        while waiting:
            keep()
        # Several processes agree on signals, for which all would have to ask.
        alone = jax.process_count() == 1
        decided_by_primary(lambda: folder.finish(label_N, lambda: check() if alone else None))


def draw_strip(model: Model, first: int, path: Path, record: dict[str, Any]) -> None:
    """A picture of how images arise, a row for each: the denoised image at noise levels from the highest to the lowest.

    `record` is written into the PNG. Raises UserError if it cannot be written.
    """
    steps = len(model.noise_levels) - 1
    levels = np.unique(np.linspace(1, steps, min(steps, STRIP_COLUMNS)).round().astype(int))
    indices = range(first, first + STRIP_ROWS)
    label_R = model.labels(indices)
    columns = [
        make_generate(model.sample(levels=int(level)), model.mesh, STRIP_ROWS, model.decode)(
            model.params, model.seed, label_R, np.array(indices)
        )
        for level in levels
    ]
    names = [f"{sigma:.3g}" for sigma in model.noise_levels[levels - 1]]
    _save(np.stack(columns, axis=1), [str(label) for label in label_R], names, "sigma", path, record)


def draw_class_grid(model: Model, classes: Sequence[int], first: int, path: Path, record: dict[str, Any]) -> None:
    """A picture with a row for each class and a column for each noise, that of the images `first` and on.

    `record` is written into the PNG. Raises UserError if it cannot be written.
    """
    columns = CLASS_GRID_COLUMNS
    index_N = np.tile(np.arange(first, first + columns), len(classes))
    generate = make_generate(model.sample(), model.mesh, columns, model.decode)
    images = generate(model.params, model.seed, np.repeat(classes, columns), index_N)
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

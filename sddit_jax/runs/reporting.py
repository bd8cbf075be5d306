"""The output of a run while it trains: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar, pictures."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sddit_jax.errors import UserError
from sddit_jax.files import whole, write_whole
from sddit_jax.runs import pictures


class MetricsLog:
    """Writes metrics to WORKDIR/metrics.jsonl, one JSON object a row, and to TensorBoard and Weights & Biases.

    Floats are read back exactly; NaN and infinity, which JSON lacks, are written as null. Only the `primary` process
    writes. tensorboard: also write its files, if tensorboardX or tensorboard with PyTorch is installed. wandb: the
    arguments of wandb.init; None: no Weights & Biases, and UserError if it is wanted but not installed.

    restored_step: the step from which the run continues, 0 at a start. Rows after it are deleted, and rows of that step
    with a key for which repeated(key) is true: the run will write them again. None keeps all rows.
    """

    def __init__(
        self,
        workdir: os.PathLike | str,
        *,
        restored_step: int | None = None,
        repeated: Callable[[str], bool] = lambda key: False,
        primary: bool = True,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = self._tensorboard = self._wandb = None
        if not primary:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut(path, restored_step, repeated)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = _tensorboard(path.parent, restored_step)
        if wandb is not None:
            try:
                module = importlib.import_module("wandb")
            except ImportError as error:
                raise UserError("wandb is asked for but not installed: pip install wandb") from error
            self._wandb = module.init(**{"dir": str(path.parent), **wandb})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row, and gives it to the operating system."""
        if self._file is None:
            return
        metrics = {key: float(value) for key, value in metrics.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        """Closes the file, and ends TensorBoard and Weights & Biases."""
        for place in (self._file, self._tensorboard):
            if place is not None:
                place.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None


def _cut(path: Path, restored_step: int | None, repeated: Callable[[str], bool]) -> None:
    """Deletes rows as `MetricsLog` says, and lines that a killed process left incomplete; all or none of them."""

    def is_kept(line: bytes) -> bool:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return False
        if not isinstance(row, dict) or "step" not in row:
            return False
        if restored_step is None or row["step"] < restored_step:
            return True
        return row["step"] == restored_step and not any(map(repeated, row))

    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if is_kept(line)]
    if kept != lines:
        write_whole(path, b"".join(kept))


def _tensorboard(folder: Path, restored_step: int | None) -> Any | None:
    # TensorFlow's writer is not used, since it claims the GPU's memory. PyTorch's writer needs the package tensorboard:
    # without that the slow import of torch would be in vain.
    for needed, module in (("tensorboardX", "tensorboardX"), ("tensorboard", "torch.utils.tensorboard")):
        if importlib.util.find_spec(needed) is None:
            continue
        with contextlib.suppress(ImportError):
            writer = importlib.import_module(module).SummaryWriter
            # TensorBoard then hides the points after the restored step.
            return writer(str(folder), purge_step=None if restored_step is None else restored_step + 1)
    return None


class Progress:
    """A progress bar on a terminal; elsewhere a line every `every_seconds` and at the end. Shows the time left.

    total: the number of steps, or of what `unit` names. start: how many are done already; they do not count for the
    speed. primary: whether this process shows anything.
    """

    def __init__(
        self, total: int, start: int = 0, *, primary: bool = True, every_seconds: float = 60.0, unit: str = "step"
    ) -> None:
        self._total, self._start, self._every, self._unit = total, start, every_seconds, unit
        self._began = time.monotonic()
        self._next = self._began
        self._plain = not sys.stderr.isatty()
        self._silent = not primary
        self._bar = tqdm.tqdm(
            total=total, initial=start, unit=unit, dynamic_ncols=True, disable=self._silent or self._plain
        )

    def show(self, done: int, words: str) -> None:
        """Shows how many are done, `words`, and the time left."""
        if not self._plain:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._silent or (now < self._next and done < self._total):
            return
        self._next = now + self._every
        seconds = (now - self._began) / max(done - self._start, 1) * (self._total - done)
        left = tqdm.tqdm.format_interval(seconds)
        print(f"{self._unit} {done}/{self._total}, {words}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, which stays visible."""
        self._bar.close()


def save_grid(images_BHWC: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Writes images as one PNG, with small ones enlarged: uint8, or float32 latents in false colours.

    columns: images in a row; None: about as many as there are rows.
    """
    images_BHWC = pictures.false_colours(images_BHWC)
    _save(pictures.grid(images_BHWC, columns, scale=_scale(images_BHWC)), path)


def save_labelled_grid(
    images_RCHWC: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: str, path: Path, record: str
) -> None:
    """As `save_grid`, with names of rows and columns. The PNG holds `record` as its text "record"."""
    images_RCHWC = pictures.false_colours(images_RCHWC)
    text = PngInfo()
    text.add_text("record", record)
    canvas_HWC = pictures.labelled_grid(images_RCHWC, rows, columns, corner, _scale(images_RCHWC))
    _save(canvas_HWC, path, pnginfo=text)


def _scale(images: np.ndarray) -> int:
    return max(1, 64 // images.shape[-3])


def _save(canvas_HWC: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(canvas_HWC.squeeze(-1) if canvas_HWC.shape[-1] == 1 else canvas_HWC)
    with whole(path) as file:
        image.save(file, "png", **options)

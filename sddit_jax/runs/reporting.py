"""What a run says while it runs: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar, pictures."""

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
    """One JSON object a row in WORKDIR/metrics.jsonl, and the same numbers in the other places.

    Floats are written so that they are read back exactly. JSON has no NaN and no infinity: both are
    written as null. With `tensorboard`, its
    files are written when one of its writers is installed; Weights &
    Biases is used when `wandb` has its arguments (`wandb.init(**wandb)`). Of several processes
    only the `primary` one writes.

    Opening with `restored_step` (0 for a start from nothing) cuts the rows after that step, and those of the step
    itself with a key that, as `repeated` says, will be written again; None only drops what a killed process has left
    half-written.
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
        """Appends one row; it is on its way to the disk when this returns."""
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
        """Closes the file and the other places."""
        for place in (self._file, self._tensorboard):
            if place is not None:
                place.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a whole line; a process killed while writing leaves a line that is none."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _comes_again(row: dict[str, Any], restored_step: int | None, repeated: Callable[[str], bool]) -> bool:
    """Whether a run that continues from `restored_step` will write the row itself."""
    if restored_step is None or row["step"] < restored_step:
        return False
    return row["step"] > restored_step or any(map(repeated, row))


def _cut(path: Path, restored_step: int | None, repeated: Callable[[str], bool]) -> None:
    """Drops lines that are no rows, and with a step the rows after it: all at once or none."""
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [(line, _row(line)) for line in lines]
    kept = [line for line, row in rows if row is not None and not _comes_again(row, restored_step, repeated)]
    if kept == lines:
        return
    write_whole(path, b"".join(kept))


def _tensorboard(folder: Path, restored_step: int | None) -> Any | None:
    # TensorFlow's own writer is left out: using it claims the memory of the GPU. Importing torch is
    # slow, and its writer is of no use without the package tensorboard.
    for needed, module in (
        ("tensorboardX", "tensorboardX"),
        ("tensorboard", "torch.utils.tensorboard"),
    ):
        if importlib.util.find_spec(needed) is None:
            continue
        with contextlib.suppress(ImportError):
            writer = importlib.import_module(module).SummaryWriter
            # Hides the points after the restored step, as the cut rows.
            return writer(str(folder), purge_step=None if restored_step is None else restored_step + 1)
    return None


class Progress:
    """A bar with loss, images per second and time left; where there is no terminal, plain lines.

    `total` and `start` are steps, or what `unit` says: a run that continues starts its bar, not its speed, at `start`.
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
            total=total,
            initial=start,
            unit=unit,
            dynamic_ncols=True,
            disable=self._silent or self._plain,
        )

    def update(self, step: int, *, loss: float, images_per_second: float) -> None:
        """Shows that `step` steps are done; may be called after every step, or less often."""
        self.show(step, f"loss {loss:.4f}, {images_per_second:.4g} images/s")

    def show(self, done: int, words: str) -> None:
        """Shows how many are done, and words about them; may be called at any time."""
        if not self._plain:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._silent or (now < self._next and done < self._total):
            return
        self._next = now + self._every
        left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
        left = tqdm.tqdm.format_interval(left)
        print(f"{self._unit} {done}/{self._total}, {words}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def save_grid(images_BHWC: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Writes images [B, H, W, C] as one PNG, small ones enlarged: uint8, or latents (float32) in false colours.

    columns: images in a row; None: about as many as rows.
    """
    images_BHWC = _in_colours(images_BHWC)
    _save(pictures.grid(images_BHWC, columns, scale=_scale(images_BHWC)), path)


def save_labelled_grid(
    images_RCHWC: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: str, path: Path, record: str
) -> None:
    """As `save_grid`, rows and columns with their names; `record` goes into the PNG, as its text "record"."""
    shape = images_RCHWC.shape[:2]
    images_BHWC = _in_colours(images_RCHWC.reshape(-1, *images_RCHWC.shape[2:]))
    images_RCHWC = images_BHWC.reshape(*shape, *images_BHWC.shape[1:])
    text = PngInfo()
    text.add_text("record", record)
    _save(pictures.labelled_grid(images_RCHWC, rows, columns, corner, _scale(images_BHWC)), path, pnginfo=text)


def _in_colours(images_BHWC: np.ndarray) -> np.ndarray:
    return images_BHWC if images_BHWC.dtype == np.uint8 else pictures.false_colours(images_BHWC)


def _scale(images_BHWC: np.ndarray) -> int:
    return max(1, 64 // images_BHWC.shape[1])


def _save(canvas_HWC: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(canvas_HWC.squeeze(-1) if canvas_HWC.shape[-1] == 1 else canvas_HWC)
    with whole(path) as file:
        image.save(file, "png", **options)

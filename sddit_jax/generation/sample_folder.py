"""Folders of samples, written so that a killed process loses only the batches that it was computing.

A folder of samples holds

    samples.npz     arr_0: images, uint8 [N, H, W, C]; arr_1: labels, int32 [N]; ADM's evaluator reads this file
    images/, labels.txt     with the format png instead: INDEX.png; a line of labels.txt is a file's name and its label
    samples.json    the record of how the images were made; written last
    grid.png        the first 100 images
    parts/          the finished batches, and their record; removed after samples.json was written

Latents without an autoencoder are latents.npz (float32) and latents.json. The bytes of all files follow from the record
and the devices alone.
"""

import fcntl
import io
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import flax.traverse_util
import numpy as np
from PIL import Image

from sddit_jax.errors import UserError
from sddit_jax.files import explained, read_json, whole, write_json, write_whole
from sddit_jax.runs.reporting import save_grid

log = logging.getLogger("sddit_jax")

PNG_THREADS = 8
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Keys of the record that may change between two commands for one folder: paths, and the devices.
_NOT_IDENTITY = ("workdir", "autoencoder", "environments")


class SampleFolder:
    """A folder for the samples `indices`, in batches [k * batch_size, (k + 1) * batch_size).

    record: everything that the images follow from, as JSON. environment: versions and devices, on which their bits
    depend. kind: "samples" (uint8) or "latents" (float32). png: writes images/ instead of an npz file. Every method
    raises UserError for a folder that cannot be written.
    """

    def __init__(
        self,
        path: Path,
        record: dict[str, Any],
        environment: str,
        indices: range,
        batch_size: int,
        *,
        kind: str = "samples",
        png: bool = False,
    ) -> None:
        self.path, self.indices, self.batch_size, self._png = path, indices, batch_size, png
        self._record = json.loads(json.dumps(record)) | {"environments": [environment]}
        self._parts, self._index = path / "parts", path / f"{kind}.json"
        self._product = path / ("images" if png else f"{kind}.npz")
        self._lock: IO[bytes] | None = None
        self._done = False

    @property
    def starts(self) -> range:
        """The first index of each batch."""
        return range(self.indices.start // self.batch_size * self.batch_size, self.indices.stop, self.batch_size)

    def own(self, start: int) -> range:
        """The part of a batch that belongs to `indices`."""
        return range(max(start, self.indices.start), min(start + self.batch_size, self.indices.stop))

    def begin(self) -> list[int]:
        """Makes the folder, or continues it. Returns the first indices of the batches that are missing.

        Raises UserError if the folder holds samples of another record, or another process is writing to it.
        """
        with self._writing():
            self._compare()
            self._done = self._index.exists() and self._product.exists()
            if self._done:
                shutil.rmtree(self._parts, ignore_errors=True)
                return []
            self._parts.mkdir(parents=True, exist_ok=True)
            self._lock = (self._parts / "lock").open("ab")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is drawing samples into {self.path}") from error
            write_json(self._parts / "plan.json", self._record)
            if self._png:
                self._product.mkdir(exist_ok=True)
            with ThreadPoolExecutor(PNG_THREADS) as pool:
                there = pool.map(self._is_there, self.starts)
                missing = [start for start, found in zip(self.starts, there, strict=True) if not found]
            before = self._record["environments"][:-1]
            if before and missing:
                log.warning(
                    "%s was begun on %s and is continued on %s: the rounding of images differs between the two",
                    self.path, " and ".join(before), self._record["environments"][-1],
                )  # fmt: skip
            return missing

    def write(self, start: int, images_BHWC: np.ndarray) -> None:
        """Writes the rows of a batch that belong to `indices`."""
        own = self.own(start)
        images = images_BHWC[own.start - start : own.stop - start]
        with self._writing():
            if not self._png:
                with whole(self._part(start)) as file:
                    np.save(file, images)
                return
            if images.shape[-1] not in (1, 3):
                raise UserError(f"--format=png is for images of 1 or 3 channels, not {images.shape[-1]}")
            with ThreadPoolExecutor(PNG_THREADS) as pool:
                list(pool.map(self._write_png, own, images))

    def finish(self, label_N: np.ndarray, check: Callable[[], None]) -> None:
        """Makes the files out of all batches, and removes parts/. Calls `check`, which may raise, between batches."""
        if self._done:
            return
        with self._writing():
            if self._png:
                lines = zip(self.indices, label_N, strict=True)
                text = "".join(f"{_png_name(index)} {label}\n" for index, label in lines)
                write_whole(self.path / "labels.txt", text.encode())
            else:
                self._write_npz(label_N, check)
            save_grid(self._first(100), self.path / "grid.png")
            write_json(self._index, self._record)
            self._lock.close()
            shutil.rmtree(self._parts)

    def _compare(self) -> None:
        """Raises UserError if the folder holds samples of another record. Adds the environments of its own record."""
        own = _identity(self._record)
        paths = [self._parts / "plan.json", *(self.path / f"{kind}.json" for kind in ("samples", "latents"))]
        records = [path for path in paths if path.exists()]
        for path in records:
            found = read_json(path, UserError, ending="; use another --output")
            flat = _identity(found)
            keys = [key for key in sorted(own.keys() | flat.keys()) if own.get(key) != flat.get(key)]
            if keys:
                words = ", ".join(f"{key} {flat.get(key)!r:.60} instead of {own.get(key)!r:.60}" for key in keys[:5])
                raise UserError(f"{self.path} holds other samples: {words}; use another --output")
            before = [each for each in found.get("environments", []) if each not in self._record["environments"]]
            self._record["environments"] = before + self._record["environments"]
        unknown = [name for name in ("samples.npz", "latents.npz", "images") if (self.path / name).exists()]
        if unknown and not records:
            raise UserError(f"{self.path} holds {unknown[0]} without a record of how it was made; use another --output")

    def _part(self, start: int) -> Path:
        return self._parts / f"{start:010d}.npy"

    def _is_there(self, start: int) -> bool:
        if self._png:
            return all(_is_whole_png(self._product / _png_name(index)) for index in self.own(start))
        try:
            return len(np.load(self._part(start), mmap_mode="r", allow_pickle=False)) == len(self.own(start))
        except (OSError, ValueError):
            # A damaged batch is computed again.
            return False

    def _first(self, count: int) -> np.ndarray:
        if self._png:
            images = [np.asarray(Image.open(self._product / _png_name(index))) for index in self.indices[:count]]
            return np.stack([image.reshape(*image.shape[:2], -1) for image in images])
        starts = [start for start in self.starts if start < self.indices.start + count]
        return np.concatenate([np.load(self._part(start), allow_pickle=False) for start in starts])[:count]

    def _write_png(self, index: int, image_HWC: np.ndarray) -> None:
        with whole(self._product / _png_name(index), self._parts) as file:
            Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC).save(file, "png")

    def _write_npz(self, label_N: np.ndarray, check: Callable[[], None]) -> None:
        """Writes what np.savez would, one batch at a time."""

        def batches() -> Iterator[np.ndarray]:
            for start in self.starts:
                check()
                yield np.load(self._part(start), allow_pickle=False)

        first = np.load(self._part(self.starts[0]), mmap_mode="r", allow_pickle=False)
        shape = (len(self.indices), *first.shape[1:])
        with whole(self._product, self._parts) as file, zipfile.ZipFile(file, "w") as archive:
            _write_array(archive, "arr_0", shape, first.dtype, batches())
            _write_array(archive, "arr_1", label_N.shape, label_N.dtype, [label_N])

    def _writing(self) -> AbstractContextManager[None]:
        return explained(f"--output={self.path}", UserError, ending="; finished batches are kept")


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """The keys of a record, flat, that must be equal for two commands to draw the same samples."""
    flat = flax.traverse_util.flatten_dict(record, sep="/")
    return {key: value for key, value in flat.items() if key.rpartition("/")[2] not in _NOT_IDENTITY}


def _png_name(index: int) -> str:
    """Ten digits hold every index, so that sorted names are in the order of the indices."""
    return f"{index:010d}.png"


def _is_whole_png(path: Path) -> bool:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            # It compares the checksums of all chunks but the last, whose bytes never vary.
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return content.endswith(_PNG_END)


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]
) -> None:
    """Writes an array to an npz file, from its parts along the first axis."""
    # A ZipInfo without a time is of 1980: the bytes do not depend on when they are written.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part).data.cast("B"))

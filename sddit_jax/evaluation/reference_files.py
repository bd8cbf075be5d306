"""npz files of images and of the statistics of their features, as ADM's evaluator reads them (Dhariwal & Nichol 2021).

    arr_0              images, uint8 [N, H, W, 3]; [N, H, W, 1] is read too
    mu, sigma          mean [2048] and covariance [2048, 2048] of the pooled features: FID
    mu_s, sigma_s      mean [2023] and covariance [2023, 2023] of the spatial features: sFID

ADM's reference files hold 10,000 images and the statistics of the whole training set: FID and sFID are computed from
the statistics, precision and recall from the images. Files of FID's first code have only mu and sigma.
`write_statistics` writes no images, but mu, sigma, mu_s, sigma_s and:

    count              number of images that the statistics are of
    features           pooled features of K of these images, float32 or float64 [K, 2048]: precision, recall, KID
    record             JSON: how the file was made; `features`, an object, and `image_shape`, [H, W, C], are read

Other feature spaces than Inception have another size than 2048, and no mu_s and sigma_s.
The files are not trusted: nothing is unpickled, and an array is read only after its type and shape were checked.
"""

import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sddit_jax.errors import DataError
from sddit_jax.evaluation.metrics import Statistics
from sddit_jax.files import explained, whole
from sddit_jax.models.inception import POOL_FEATURES, SPATIAL_FEATURES

_RECORD_BYTES = 1 << 20
# Words for a type -> whether a dtype is of it.
_TYPES = {
    "uint8": lambda dtype: dtype == np.uint8,
    "float32 or float64": lambda dtype: dtype.kind == "f" and dtype.itemsize in (4, 8),
    "an integer": lambda dtype: dtype.kind in "iu",
    "a short string": lambda dtype: dtype.kind == "U" and dtype.itemsize <= _RECORD_BYTES,
}
# zipfile and NumPy have no error of their own for a damaged file. They raise these.
_DAMAGED = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip


class NpzImages(NamedTuple):
    """The images of a file. `batches` reads them as they are needed: 50,000 of 256 x 256 pixels are 10 GB."""

    path: Path
    shape: tuple[int, int, int, int]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [size, H, W, 3] in the order of the file; the last batch may be smaller.

        Raises DataError if the file is damaged, which its checksum shows after the last batch.
        """
        count, *image = self.shape
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            for start in range(0, count, size):
                shape = (min(size, count - start), *image)
                content = member.read(math.prod(shape))
                yield np.frombuffer(content, np.uint8).reshape(shape)
            if member.read(1):
                raise DataError(f"{self.path}: arr_0 is longer than its header says")


class EvaluationFile(NamedTuple):
    """The contents of a file; see above. Parts that it lacks are None, and a record that it lacks is {}."""

    images: NpzImages | None
    pool: Statistics | None
    spatial: Statistics | None
    features_KD: np.ndarray | None
    count: int | None
    record: dict[str, Any]


def open_evaluation_file(path: str | os.PathLike[str], dimension: int | None = POOL_FEATURES) -> EvaluationFile:
    """Reads an npz file of ADM or of `write_statistics`, but for its images.

    dimension: number of features that mu should have; None: any.

    Raises DataError: the file is missing, damaged, or has neither images nor statistics; or an array has a wrong type
    or shape, is not finite, or is no covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        # Damage to the directory could hide an array: by its name, which opening compares with a second copy, or as
        # the comment of the entry before.
        for member in archive.infolist():
            archive.open(member).close()
            if member.comment:
                raise DataError(f"{path} is damaged, or not from NumPy: {member.filename} has a comment")
        file = _Npz(path, archive)
        if not file.names & {"arr_0", "mu"}:
            raise DataError(
                f"{path} has neither arr_0 (images) nor mu and sigma; it has {sorted(file.names) or 'nothing'}"
            )
        pool = _read_statistics(file, "mu", "sigma", dimension)
        return EvaluationFile(
            _open_images(file) if "arr_0" in file.names else None,
            pool,
            _read_statistics(file, "mu_s", "sigma_s", SPATIAL_FEATURES),
            _read_features(file, pool) if "features" in file.names else None,
            _read_count(file) if "count" in file.names else None,
            _read_record(file) if "record" in file.names else {},
        )


def write_statistics(
    path: str | os.PathLike[str],
    pool: Statistics,
    spatial: Statistics | None,
    features_KD: np.ndarray | None,
    count: int,
    record: dict[str, Any],
) -> None:
    """Writes the statistics of `count` images and the features of K of them. Raises DataError if it cannot."""
    arrays = {"mu": pool.mean_D, "sigma": pool.covariance_DD}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    if features_KD is not None:
        arrays["features"] = features_KD
    with explained(path, DataError), whole(path) as file:
        np.savez(file, **arrays, count=np.int64(count), record=json.dumps(record))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path} is not an intact npz file: {type(error).__name__}: {reason}") from error


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an array. Raises ValueError."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"an array of version {version}")


class _Npz:
    """An open file. Arrays are named without their suffix."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self.names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}

    def check(self, name: str, kind: str, *axes: int | str) -> tuple[tuple[int, ...], bool]:
        """The shape of an array, and whether it is in Fortran's order. Raises DataError for another type or shape.

        kind: of `_TYPES`. axes: the size of each, or a letter for any size from 1.
        """
        with self._archive.open(f"{name}.npy") as member:
            shape, fortran, dtype = _read_header(member)
        if dtype.hasobject:
            raise DataError(f"{self.path}: {name} holds pickled objects, which are not read")
        fits = len(shape) == len(axes) and all(
            size == axis or (size >= 1 and isinstance(axis, str)) for size, axis in zip(shape, axes, strict=True)
        )
        if not (fits and _TYPES[kind](dtype)):
            wanted = kind + (f" of shape [{', '.join(map(str, axes))}]" if axes else "")
            raise DataError(f"{self.path}: {name} is {dtype} of shape {list(shape)}; it should be {wanted}")
        return shape, fortran

    def read(self, name: str, kind: str, *axes: int | str) -> np.ndarray:
        """The values of an array. Raises as `check`, and DataError for values that are not finite."""
        self.check(name, kind, *axes)
        with self._archive.open(f"{name}.npy") as member:
            values = np.lib.format.read_array(member, allow_pickle=False)
            # zipfile compares the checksum at the end.
            if member.read(1):
                raise ValueError(f"{name} is longer than its header says")
        if values.dtype.kind == "f" and (bad := int((~np.isfinite(values)).sum())):
            raise DataError(f"{self.path}: {name} has {bad} values that are not finite")
        return values


def _open_images(file: _Npz) -> NpzImages:
    shape, fortran = file.check("arr_0", "uint8", "N", "H", "W", "C")
    if shape[3] not in (1, 3):
        raise DataError(f"{file.path}: arr_0 is of shape {list(shape)}; images are [N, H, W, 3] or [N, H, W, 1]")
    if fortran:
        raise DataError(f"{file.path}: arr_0 is in Fortran's order; it should have one image after the other")
    return NpzImages(file.path, shape)


def _read_statistics(file: _Npz, mean: str, covariance: str, dimension: int | None) -> Statistics | None:
    present = {mean, covariance} & file.names
    if not present:
        return None
    if len(present) == 1:
        raise DataError(f"{file.path} has {present.pop()} alone; {mean} and {covariance} belong together")
    mean_D = file.read(mean, "float32 or float64", dimension or "D").astype(np.float64)
    matrix = file.read(covariance, "float32 or float64", len(mean_D), len(mean_D)).astype(np.float64)
    if np.abs(matrix - matrix.T).max() > 1e-6 * np.abs(matrix).max() or np.diagonal(matrix).min() < 0:
        raise DataError(f"{file.path}: {covariance} is no covariance: it is not symmetric, or has variances below 0")
    return Statistics(mean_D, matrix)


def _read_features(file: _Npz, pool: Statistics | None) -> np.ndarray:
    if pool is None:
        raise DataError(f"{file.path} has features without mu and sigma; they belong together")
    return file.read("features", "float32 or float64", "K", len(pool.mean_D))


def _read_count(file: _Npz) -> int:
    count = int(file.read("count", "an integer"))
    if count < 2:
        raise DataError(f"{file.path}: count is {count}; a covariance is of at least 2 images")
    return count


def _read_record(file: _Npz) -> dict[str, Any]:
    record = json.loads(str(file.read("record", "a short string")))
    if not isinstance(record, dict):
        raise DataError(f"{file.path}: record holds a {type(record).__name__}; it should hold an object")
    if not isinstance(features := record.get("features", {}), dict):
        raise DataError(f"{file.path}: features of record is {features!r}; it should be an object")
    image_shape = record.get("image_shape", [1, 1, 1])
    if not isinstance(image_shape, list) or [type(side) for side in image_shape] != [int] * 3:
        raise DataError(f"{file.path}: image_shape of record is {image_shape!r}; it should be [H, W, C]")
    return record

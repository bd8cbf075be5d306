"""npz files of images and of the statistics of their features, as ADM's evaluator reads them (Dhariwal & Nichol 2021).

    arr_0              images, uint8 [N, H, W, 3]; [N, H, W, 1] is read too
    mu, sigma          mean [2048] and covariance [2048, 2048] of the pooled features: FID
    mu_s, sigma_s      mean [2023] and covariance [2023, 2023] of the spatial features: sFID

ADM's reference files hold 10,000 images and the statistics of the whole training set; FID and sFID are computed from
the statistics, precision and recall from the images. Files of FID's first code have mu and sigma alone. The files that
are written here have no images, but mu, sigma, mu_s and sigma_s, and three more:

    count              how many images the statistics are of
    features           pooled features of some of the images, float32 or float64 [K, 2048]: precision, recall, KID
    record             JSON: how they were made; where it has them, `features` is an object and `image_shape` [H, W, C]

Other features than Inception's have another size, and no mu_s and sigma_s.
The files are not trusted: nothing is unpickled, and no array is read before its type and shape are known to be right.
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
from sddit_jax.files import explained, whole
from sddit_jax.models.inception import POOL_FEATURES, SPATIAL_FEATURES

_RECORD_BYTES = 1 << 20
# What zipfile and NumPy raise for files that are not as they should be; they have no error of their own for it.
_DAMAGED = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray


class NpzImages(NamedTuple):
    """The images of a file, which are read as they are needed: ten gigabytes for 50,000 of 256 x 256 pixels."""

    path: Path
    shape: tuple[int, int, int, int]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [size, H, W, 3] in the order of the file; the last may be smaller.

        Raises:
          DataError: the file is damaged, which for a checksum shows at its end.
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
    """What a file holds; None or, of `record`, empty for what it does not.

    pool, spatial: for FID and sFID. features_KD: pooled features of some of the images that `pool` is of.
    """

    images: NpzImages | None
    pool: Statistics | None
    spatial: Statistics | None
    features_KD: np.ndarray | None
    count: int | None
    record: dict[str, Any]


def open_evaluation_file(path: str | os.PathLike[str], dimension: int | None = POOL_FEATURES) -> EvaluationFile:
    """Reads all but the images of an npz file of ADM's or of `write_statistics`.

    dimension: of the features that mu is to be of; None: whatever the file has.

    Raises:
      DataError: no such file, a damaged one, one with neither images nor statistics, or it names what is of a wrong
        type or shape, not finite, or no covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        # Damage to the directory could hide an array: by its name, which opening compares with a second copy, or as
        # the comment of the one before.
        for member in archive.infolist():
            archive.open(member).close()
            if member.comment:
                raise DataError(f"{path} is damaged, or not from NumPy: {member.filename} has a comment")
        if not names & {"arr_0", "mu"}:
            raise DataError(f"{path} has neither arr_0 (images) nor mu and sigma; it has {sorted(names) or 'nothing'}")
        pool = _read_statistics(path, archive, names, "mu", "sigma", dimension)
        return EvaluationFile(
            _open_images(path, archive) if "arr_0" in names else None,
            pool,
            _read_statistics(path, archive, names, "mu_s", "sigma_s", SPATIAL_FEATURES),
            _read_features(path, archive, pool) if "features" in names else None,
            _read_count(path, archive) if "count" in names else None,
            _read_record(path, archive) if "record" in names else {},
        )


def write_statistics(
    path: str | os.PathLike[str],
    pool: Statistics,
    spatial: Statistics | None,
    features_KD: np.ndarray | None,
    count: int,
    record: dict[str, Any],
) -> None:
    """Writes a file of statistics of `count` images, and of the features of K of them.

    Raises DataError if it cannot.
    """
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


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(f"{name}.npy") as member:
        shape, fortran, dtype = _read_header(member)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds pickled objects, which are not read")
    return shape, fortran, dtype


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        values = np.lib.format.read_array(member, allow_pickle=False)
        # The checksum is compared at the end.
        if member.read(1):
            raise ValueError(f"{name} is longer than its header says")
    return values


def _open_images(path: Path, archive: zipfile.ZipFile) -> NpzImages:
    shape, fortran, dtype = _header(path, archive, "arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
        raise DataError(f"{path}: arr_0 is {dtype} of shape {list(shape)}; images are uint8 [N, H, W, 3]")
    if fortran:
        raise DataError(f"{path}: arr_0 is in Fortran's order; images have to lie one after the other")
    return NpzImages(path, shape)


def _read_statistics(
    path: Path, archive: zipfile.ZipFile, names: set[str], mean: str, covariance: str, dimension: int | None
) -> Statistics | None:
    present = {mean, covariance} & names
    if not present:
        return None
    if len(present) == 1:
        raise DataError(f"{path} has {present.pop()} alone; {mean} and {covariance} belong together")
    if dimension is None:
        shape = _header(path, archive, mean)[0]
        dimension = shape[0] if shape else 0
    for name, wanted in ((mean, (dimension,)), (covariance, (dimension, dimension))):
        shape, _, dtype = _header(path, archive, name)
        if dtype.kind != "f" or dtype.itemsize not in (4, 8) or shape != wanted:
            raise DataError(
                f"{path}: {name} is {dtype} of shape {list(shape)}; it should be float64 or float32 of shape "
                f"{list(wanted)}"
            )
    found = Statistics(*(_read_finite(path, archive, name).astype(np.float64) for name in (mean, covariance)))
    matrix = found.covariance_DD
    if np.abs(matrix - matrix.T).max() > 1e-6 * np.abs(matrix).max() or np.diagonal(matrix).min() < 0:
        raise DataError(f"{path}: {covariance} is no covariance: it is not symmetric, or has variances below 0")
    return found


def _read_features(path: Path, archive: zipfile.ZipFile, pool: Statistics | None) -> np.ndarray:
    if pool is None:
        raise DataError(f"{path} has features without mu and sigma; they belong together")
    shape, _, dtype = _header(path, archive, "features")
    dimension = len(pool.mean_D)
    if dtype not in (np.float32, np.float64) or len(shape) != 2 or shape[0] < 1 or shape[1] != dimension:
        raise DataError(
            f"{path}: features is {dtype} of shape {list(shape)}; it should be float32 or float64 of shape "
            f"[K, {dimension}]"
        )
    return _read_finite(path, archive, "features")


def _read_finite(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    values = _read(archive, name)
    if bad := int((~np.isfinite(values)).sum()):
        raise DataError(f"{path}: {name} has {bad} values that are not finite")
    return values


def _read_count(path: Path, archive: zipfile.ZipFile) -> int:
    shape, _, dtype = _header(path, archive, "count")
    if shape != () or dtype.kind not in "iu":
        raise DataError(f"{path}: count is {dtype} of shape {list(shape)}; it should be an integer")
    count = int(_read(archive, "count"))
    if count < 2:
        raise DataError(f"{path}: count is {count}; a covariance is of at least 2 images")
    return count


def _read_record(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    shape, _, dtype = _header(path, archive, "record")
    if shape != () or dtype.kind != "U" or dtype.itemsize > _RECORD_BYTES:
        raise DataError(f"{path}: record is {dtype} of shape {list(shape)}; it should be a short string")
    record = json.loads(str(_read(archive, "record")))
    if not isinstance(record, dict):
        raise DataError(f"{path}: record holds a {type(record).__name__}; it should hold an object")
    if not isinstance(features := record.get("features", {}), dict):
        raise DataError(f"{path}: features of record is {features!r}; it should be an object")
    image_shape = record.get("image_shape", [1, 1, 1])
    if not isinstance(image_shape, list) or [type(side) for side in image_shape] != [int] * 3:
        raise DataError(f"{path}: image_shape of record is {image_shape!r}; it should be [height, width, channels]")
    return record

"""Files that are written whole or not at all, hashes, and JSON that may be damaged."""

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import flax.traverse_util
import numpy as np

from sddit_jax.errors import UserError


@contextmanager
def whole(path: str | os.PathLike[str], folder: Path | None = None) -> Iterator[IO[bytes]]:
    """Gives the body a binary file to write. When the body has ended, the file is on the disk at `path`.

    If the body raises or the process is killed, `path` stays as it was. Meanwhile the bytes are in a hidden file in
    `folder` (None: the folder of `path`), on the same file system; a library that opens files itself takes its name,
    `file.name`. A symbolic link stays one. A pipe or a device such as /dev/stdout is written directly. Raises OSError.

        with whole("samples.npz") as file:
            np.savez(file, images)
    """
    path = Path(path)
    if not _can_be_replaced(path):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    folder = path.parent if folder is None else folder
    _remove_leftovers(folder, path.name)
    with _temporary(folder, path.name) as file:
        temporary, mode = Path(file.name), os.fstat(file.fileno()).st_mode
        try:
            yield file
            file.flush()
            # A library may have replaced the file by one that only its owner can read.
            with temporary.open("rb") as written:
                os.fchmod(written.fileno(), mode)
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes the bytes of a file, whole or not at all. Raises OSError."""
    with whole(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON value with indentation, whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(value, indent=2).encode())


def check_output(path: Path) -> None:
    """Raises UserError if `whole` cannot write to a path. Commands call it before hours of work."""
    folder, why = Path(os.path.realpath(path)).parent, ""
    written = [path] * path.exists() + [folder] * _can_be_replaced(path)
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"{folder} is not a folder"
    elif not all(os.access(each, os.W_OK) for each in written):
        why = "there is no permission"
    if why:
        raise UserError(f"{path} could not be written: {why}")


@contextmanager
def explained(what: object, kind: type[UserError], *also: type[Exception], ending: str = "") -> Iterator[None]:
    """Turns an OSError of the body into an error of type `kind`: "WHAT could not be written: WHY" and `ending`.

    what: the path, or the flag that names it. also: further exceptions, which a library raises for a full disk.
    """
    try:
        yield
    except (OSError, *also) as error:
        raise kind(f"{what} could not be written: {error}{ending}") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes: 64 hexadecimal digits. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(params: Mapping[str, Any]) -> str:
    """A hash of a nested dict of arrays: the first 16 hexadecimal digits of a SHA-256.

    It covers paths, dtypes, shapes and values in the order of the paths, and does not depend on the file's format.
    """
    total = hashlib.sha256()
    for path, leaf in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        value = np.asarray(leaf)
        total.update(f"{path} {value.dtype} {value.shape}\n".encode())
        total.update(value.reshape(-1).view(np.uint8))
    return total.hexdigest()[:16]


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError if the text is no JSON, nested too deep, or not an object."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deep: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} instead of an object")
    return value


def read_json(path: Path, kind: type[UserError], ending: str = "") -> dict[str, Any]:
    """Reads a JSON object from a file. If it cannot, raises `kind` with the path, the reason and `ending`."""
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read as JSON: {error}{ending}") from error


@contextmanager
def undamaged(path: Path, kind: type[UserError], ending: str = "") -> Iterator[None]:
    """Turns what the body raises for a missing value or a value of a wrong type in a file into `kind`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise kind(f"{path} is damaged: {type(error).__name__}: {error}{ending}") from error


def _can_be_replaced(path: Path) -> bool:
    return path.is_file() or not path.exists()


def _temporary(folder: Path, name: str) -> IO[bytes]:
    """Opens a file of its own for this process, and locks it as long as it is open."""
    while True:
        file = (folder / f".{name}.{secrets.token_hex(4)}").open("xb")
        # A file system without locks keeps the leftovers of killed processes.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have deleted the file as a leftover before it was locked.
        if os.path.exists(file.name):
            return file
        file.close()


def _remove_leftovers(folder: Path, name: str) -> None:
    """Deletes the hidden files that killed processes left; a file that a process is writing is locked, and stays."""
    leftover = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}")
    for path in [entry.path for entry in os.scandir(folder) if leftover.fullmatch(entry.name)]:
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)

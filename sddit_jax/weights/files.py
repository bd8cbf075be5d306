"""Named tensors of files that are not trusted, and trees of parameters filled from them.

A safetensors file holds nothing but tensors and strings. A PyTorch file is a pickle, so it is read with torch's
restricted unpickler, which makes tensors and plain containers and refuses all else. Training codes save the arguments
of their command line beside the weights, as an argparse.Namespace: an object that does nothing takes its place.
"""

import dataclasses
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
import safetensors

from sddit_jax.errors import UserError, WeightsError

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)
# What can be widened to float32 without loss, by the names of safetensors and of torch.
FLOATS = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")
NAMESPACE = "argparse.Namespace"
# The order of our axes in PyTorch, by their number.
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
# torch has no error of its own for a file that is not one of its: these are what its reader and its unpickler raise.
_TORCH_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, zipfile.BadZipFile, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its shape and type are known before `read` takes its values from the disk."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
    """What a file holds: groups of tensors by name ("" if it is one group), a line for all else, and its metadata."""

    groups: dict[str, dict[str, Tensor]]
    skipped: list[str]
    metadata: dict[str, str]


class _Skipped:
    """Stands for an object of a file that is passed over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __setstate__(self, state: Any) -> None:
        del state


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A .safetensors, .pth, .pt, .ckpt or .bin file: tensors by name, or, of PyTorch, a dict of such dicts.

    Raises:
      WeightsError: not such a file, damaged, unreadable, without tensors, or its library is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; a file of weights is needed")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _open_safetensors(path)
    if path.suffix not in TORCH_SUFFIXES:
        raise WeightsError(f"{path}: the name of a file of weights should end in one of {', '.join(SUFFIXES)}")
    torch, content = _load_torch(path)
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return Checkpoint({"": _torch_tensors(path, content)}, [], {})
    groups, skipped = {}, []
    for key, value in content.items():
        if isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()):
            groups[str(key)] = _torch_tensors(path, value)
        else:
            kind = f"{NAMESPACE}, not executed" if isinstance(value, _Skipped) else type(value).__name__
            skipped.append(f"{key} ({kind})")
    if not groups:
        raise WeightsError(f"{path} has no tensors by name, only {', '.join(skipped) or 'an empty dict'}")
    return Checkpoint(groups, skipped, {})


def open_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file that is one group, or of its group "state_dict". Raises WeightsError: `open_checkpoint`."""
    groups = open_checkpoint(path).groups
    for name in ("state_dict", ""):
        if name in groups:
            return groups[name]
    raise WeightsError(f"{path} has its tensors under {', '.join(groups)}; they should be under state_dict, or alone")


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        file = safetensors.safe_open(path, "numpy")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not an intact safetensors file: {error}") from error
    if not parts:
        raise WeightsError(f"{path} has no tensors")

    def tensor(name: str, part: Any) -> Tensor:
        return Tensor(tuple(part.get_shape()), part.get_dtype(), lambda: file.get_tensor(name).astype(np.float32))

    return Checkpoint({"": {name: tensor(name, part) for name, part in parts.items()}}, [], file.metadata() or {})


def import_torch() -> ModuleType:
    """PyTorch. Raises UserError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is needed for this: pip install -e '.[torch]'") from error
    return torch


def _load_torch(path: Path) -> tuple[ModuleType, Mapping]:
    torch = import_torch()
    try:
        _check_sums(path)
        with torch.serialization.safe_globals([(_Skipped, NAMESPACE)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except _TORCH_ERRORS as error:
        raise WeightsError(f"{path} is not an intact PyTorch file of tensors: {_reason(torch, error)}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; it should hold tensors by name")
    return torch, content


def _torch_tensors(path: Path, content: Mapping) -> dict[str, Tensor]:
    torch = import_torch()

    def tensor(name: Any, value: Any) -> Tensor:
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not dense:
            raise WeightsError(f"{path}: {name!r} is a {type(value).__name__}; it should be a dense tensor")
        return Tensor(
            tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda: value.detach().float().numpy()
        )

    return {name: tensor(name, value) for name, value in content.items()}


def _check_sums(path: Path) -> None:
    """Raises BadZipFile if a part of a PyTorch file is not as it was written; torch itself does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged, its checksum differs")


def _can_be_mapped(path: Path) -> bool:
    """Whether the tensors lie in a PyTorch file as they are; torch maps a compressed zip file too, and reads garbage.

    Before PyTorch 1.6 a file was a plain pickle.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _reason(torch: ModuleType, error: Exception) -> str:
    """What is wrong with a PyTorch file, without torch's advice to load it all the same."""
    text = str(error).replace("Weights only load failed.", "").replace(torch.serialization.UNSAFE_MESSAGE, "")
    _, refused, what = text.partition("WeightsUnpickler error:")
    lines = (what if refused else text).strip().partition(" Please ")[0].splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}"


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What is wrong with a file's tensors where those of `shapes` are wanted, by name, one line each."""
    found = {name: f"{name} is missing" for name in shapes if name not in tensors}
    for name, tensor in tensors.items():
        if name not in shapes:
            found[name] = f"{name} is surplus"
        elif tensor.shape != shapes[name]:
            found[name] = f"{name} has the shape {list(tensor.shape)} instead of {list(shapes[name])}"
        elif tensor.dtype not in FLOATS:
            found[name] = f"{name} is {tensor.dtype} instead of float32, float16 or bfloat16"
    return found


def read_finite(name: str, tensor: Tensor, faults: dict[str, str]) -> np.ndarray:
    """The values as float32; a line in `faults` if they are not all finite."""
    values = tensor.read()
    if bad := int((~np.isfinite(values)).sum()):
        faults[name] = f"{name} has {bad} values that are not finite"
    return values


def fill(
    shapes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name_of: Callable[[str], str],
    where: str | os.PathLike[str],
) -> dict[str, Any]:
    """The tree of `shapes` with values from PyTorch's tensors: float32 NumPy arrays in their own memory.

    shapes: nested dict of what has a shape. name_of: 'encoder/conv_in/kernel' -> the tensor's name. A kernel of two
    axes is [in, out] here and [out, in] or, as a 1x1 convolution, [out, in, 1, 1] there; one of four is
    [row, column, in, out] here and [out, in, row, column] there.

    Raises:
      WeightsError: names every tensor that is missing, surplus, or of another shape or type, or not finite.
    """
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    names = {path: name_of(path) for path in leaves}

    def wanted(path: str, leaf: Any) -> tuple[int, ...]:
        shape = tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim])
        convolution = leaf.ndim == 2 and names[path] in tensors and tensors[names[path]].shape == (*shape, 1, 1)
        return (*shape, 1, 1) if convolution else shape

    if faults := misfits(tensors, {names[path]: wanted(path, leaf) for path, leaf in leaves.items()}):
        raise WeightsError(f"{where} does not fit: {'; '.join(faults.values())}")

    def values(path: str) -> np.ndarray:
        shape = leaves[path].shape
        order = _TO_TORCH[len(shape)]
        value = read_finite(names[path], tensors[names[path]], faults).reshape([shape[axis] for axis in order])
        return np.array(value.transpose(np.argsort(order)), order="C")

    filled = {path: values(path) for path in leaves}
    if faults:
        raise WeightsError(f"{where} is damaged: {'; '.join(faults.values())}")
    return flax.traverse_util.unflatten_dict(filled, sep="/")

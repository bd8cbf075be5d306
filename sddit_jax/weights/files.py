"""Reads named tensors from files that are not trusted, and fills trees of parameters with them.

A safetensors file holds nothing but tensors and strings. A PyTorch file is a pickle, so it is read with torch's
restricted unpickler, which makes tensors and plain containers and refuses all else. Training codes save the arguments
of their command line beside the weights, as an argparse.Namespace: an empty object takes its place.
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
# Types that widen to float32 without loss, as safetensors and as torch call them.
FLOATS = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")
NAMESPACE = "argparse.Namespace"
# Number of axes -> the order in which PyTorch has our axes.
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
# torch has no error of its own for a file in another format. Its reader and its unpickler raise these.
_TORCH_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, zipfile.BadZipFile, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. Only `read` takes its values from the disk, and returns them as float32."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
    """What a file holds.

    groups: name of the group -> name of the tensor -> tensor; a file without groups is one group named "".
    skipped: "KEY (TYPE)" for everything else that a PyTorch file holds. metadata: of a safetensors file.
    """

    groups: dict[str, dict[str, Tensor]]
    skipped: list[str]
    metadata: dict[str, str]


class _Skipped:
    """Takes the place of an argparse.Namespace: nothing of it is executed."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a .safetensors, .pth, .pt, .ckpt or .bin file: a dict of named tensors, or in PyTorch a dict of such dicts.

    Raises:
      WeightsError: the file is missing, damaged, in another format, or without tensors.
      UserError: a PyTorch file, and PyTorch is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; a file of weights is needed")
    if path.suffix == SAFETENSORS_SUFFIX:
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise WeightsError(f"{path}: the name of a file of weights should end in one of {', '.join(SUFFIXES)}")


def open_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file that has one group, or of its group "state_dict". Raises as `open_checkpoint`."""
    groups = open_checkpoint(path).groups
    for name in ("state_dict", ""):
        if name in groups:
            return groups[name]
    raise WeightsError(
        f"{path} has its tensors under {', '.join(groups)}; they should be under state_dict or at the top level"
    )


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


def _open_torch(path: Path) -> Checkpoint:
    torch = import_torch()
    try:
        with torch.serialization.safe_globals([(_Skipped, NAMESPACE)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except _TORCH_ERRORS as error:
        raise WeightsError(f"{path} is not an intact PyTorch file of tensors: {_reason(torch, error)}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; it should hold a dict of named tensors")

    def has_tensors(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())

    def tensor(name: Any, value: Any) -> Tensor:
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not dense:
            raise WeightsError(f"{path}: {name!r} is a {type(value).__name__}; it should be a dense tensor by a name")
        dtype = str(value.dtype).removeprefix("torch.")
        return Tensor(tuple(value.shape), dtype, lambda: value.detach().float().numpy())

    groups, skipped = {}, []
    candidates = {"": content} if has_tensors(content) else content
    for key, value in candidates.items():
        if has_tensors(value):
            groups[str(key)] = {name: tensor(name, item) for name, item in value.items()}
        else:
            kind = f"{NAMESPACE}, not executed" if isinstance(value, _Skipped) else type(value).__name__
            skipped.append(f"{key} ({kind})")
    if not groups:
        raise WeightsError(f"{path} has no named tensors, only {', '.join(skipped) or 'an empty dict'}")
    return Checkpoint(groups, skipped, {})


def _can_be_mapped(path: Path) -> bool:
    """Whether a PyTorch file has its tensors uncompressed: torch maps a compressed file too, and reads garbage.

    Before PyTorch 1.6 a file was a plain pickle, which cannot be mapped. Raises BadZipFile if a checksum differs, since
    torch itself does not compare them.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged, its checksum differs")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _reason(torch: ModuleType, error: Exception) -> str:
    """What is wrong with a PyTorch file, without torch's advice to load it all the same."""
    text = str(error).replace("Weights only load failed.", "").replace(torch.serialization.UNSAFE_MESSAGE, "")
    _, refused, what = text.partition("WeightsUnpickler error:")
    lines = (what if refused else text).strip().partition(" Please ")[0].splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}"


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name -> what is wrong, for each tensor that is missing, surplus, or of another shape or type than `shapes` asks.

    shapes: name -> shape of the tensors that are expected.
    """
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
    """The values as float32. Adds a line to `faults` if they are not all finite."""
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
    """Parameters of the shapes `shapes` with the values of PyTorch tensors, as float32 NumPy arrays.

    A kernel with two axes is [in, out] in the result, and in the file [out, in] or, as a 1x1 convolution,
    [out, in, 1, 1]. A kernel with four axes is [row, column, in, out] in the result, and in the file
    [out, in, row, column].

    shapes: nested dict whose leaves have a shape. name_of: a path such as 'encoder/conv_in/kernel' -> a tensor's name.
    where: the file, for messages. Raises WeightsError with the name of every tensor that is missing, surplus, of
    another shape or type, or not finite.
    """
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    orders = {path: _TO_TORCH[leaf.ndim] for path, leaf in leaves.items()}
    in_torch = {path: tuple(leaves[path].shape[axis] for axis in order) for path, order in orders.items()}
    names = {path: name_of(path) for path in leaves}
    wanted = {names[path]: shape for path, shape in in_torch.items()}
    for name, shape in wanted.items():
        # A linear map of the channels may be a 1x1 convolution.
        if len(shape) == 2 and name in tensors and tensors[name].shape == (*shape, 1, 1):
            wanted[name] = tensors[name].shape
    if faults := misfits(tensors, wanted):
        raise WeightsError(f"{where} does not fit: {'; '.join(faults.values())}")
    filled = {}
    for path, order in orders.items():
        values = read_finite(names[path], tensors[names[path]], faults).reshape(in_torch[path])
        filled[path] = np.array(values.transpose(np.argsort(order)), order="C")
    if faults:
        raise WeightsError(f"{where} is damaged: {'; '.join(faults.values())}")
    return flax.traverse_util.unflatten_dict(filled, sep="/")

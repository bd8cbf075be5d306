"""Files of tensors as numpy arrays. Nothing in them is executed, and none is believed."""

import importlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sddit_jax.errors import UserError, WeightsError

FLOATS = ("float16", "bfloat16", "float32", "float64")


class _Skipped:
    """Stands for an object of the file that is passed over: keeps nothing and does nothing."""

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        del state


# Training codes save their command line's arguments beside the weights. In the file they are a name that unpickling
# would import and call; `_Skipped` is put in its place. Any other name is refused.
SKIPPED = ("argparse.Namespace",)


class Checkpoint(NamedTuple):
    """Named groups of tensors ("" for a file that is one group), and a line for each other entry of the file."""

    groups: dict[str, Mapping[str, Any]]
    skipped: list[str]


def require(module: str, extra: str) -> ModuleType:
    """The module of an optional dependency. Raises UserError that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{module} is needed for this: pip install 'sddit-jax[{extra}]'") from error


def read_torch(path: Path) -> Checkpoint:
    """A file of torch.save: a state_dict, or a dict of state_dicts and other things, which are named and passed over.

    The tensors stay torch's, mapped from the file where its format allows, until `read_array` reads them.
    Raises WeightsError: not there, damaged, or with an object that would have to be executed.
    """
    torch = require("torch", "torch")
    _check_file(path)
    skip = [(_Skipped, name) for name in SKIPPED]
    try:
        with torch.serialization.safe_globals(skip):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} is refused: {_refusal(torch, path, error)}") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # What the readers of zip files and pickles raise for a damaged one.
        raise WeightsError(f"{path} is not a whole file of torch.save: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} has a {type(content).__name__}, not a dict of tensors")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return Checkpoint({"": content}, [])
    groups, skipped = {}, []
    for key, value in content.items():
        tensors = isinstance(value, Mapping) and value and all(isinstance(t, torch.Tensor) for t in value.values())
        if tensors:
            groups[str(key)] = value
        else:
            kind = f"{SKIPPED[0]}, not executed" if isinstance(value, _Skipped) else type(value).__name__
            skipped.append(f"{key} ({kind})")
    if not groups:
        raise WeightsError(f"{path} has no tensors by name, only {', '.join(skipped) or 'nothing'}")
    return Checkpoint(groups, skipped)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, and its metadata. Raises WeightsError: not there or damaged."""
    import safetensors
    from safetensors import numpy as safetensors_numpy

    _check_file(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        return safetensors_numpy.load_file(path), metadata
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {_first_line(error)}") from error


def read_array(name: str, tensor: Any) -> np.ndarray:
    """A tensor of either kind of file as float32; float16 and bfloat16 are widened without loss.

    Raises WeightsError for numbers that are no floats, and for NaN and infinities.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in FLOATS:
        raise WeightsError(f"{name} is of dtype {kind}, but weights are of {', '.join(FLOATS)}")
    values = tensor.astype(np.float32) if isinstance(tensor, np.ndarray) else tensor.detach().float().numpy()
    if not np.isfinite(values).all():
        raise WeightsError(f"{name} has {int((~np.isfinite(values)).sum())} values that are not finite")
    return values


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; a file of weights is needed")
    if not path.stat().st_size:
        raise WeightsError(f"{path} is empty")


def _refusal(torch: ModuleType, path: Path, error: Exception) -> str:
    """What a pickle would have to execute, by name."""
    if zipfile.is_zipfile(path):
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(SKIPPED)
        if names:
            return (
                f"loading it would execute {', '.join(sorted(names))}; nothing was. Where you trust the file, load it "
                "in PyTorch and save its tensors alone"
            )
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

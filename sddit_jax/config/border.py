"""The one border of configuration: ConfigDict in, checked and frozen dataclasses out.

`from_defaults()` makes a locked ConfigDict from the defaults of the sections for a file in configs/ to change, and
`resolve()` turns it into a `Config`; below this border nothing looks a key up by name.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import ml_collections

from sddit_jax.config.checks import check_together
from sddit_jax.config.schema import Config
from sddit_jax.errors import ConfigError

# What may differ between a checkpoint and the config that continues it. All else is the run's identity.
FREE_ON_RESUME = (
    "init_from",
    "parallel",
    "checkpoint",
    "sampling",
    "eval",
    "log",
    "data.download",
    "data.in_memory",
    "data.verify",
    "codec.autoencoder",
    "data.num_threads",
    "data.prefetch",
    "model.attention",
    "model.scan",
    "model.remat",
    "optimizer.max_skipped",
)


def from_defaults() -> ml_collections.ConfigDict:
    """A locked ConfigDict of all defaults."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any], guide: bool = False) -> Config:
    """The checked, frozen form of a ConfigDict. Raises ConfigError: unknown key, wrong type, impossible run.

    guide: another network guides the samples, so that they need no null label.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, _upgraded(values), "")
    check_together(resolved, guide)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict that `resolve` turns back into the same config (tuples become lists in JSON)."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """The value of every leaf by its dotted key."""
    return flax.traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")


def unknown_key(key: str) -> str:
    """Why the config has no such dotted key, and which one may be meant; empty if it has it."""
    known = list(flatten(Config()))
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return ""
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    meant = elsewhere or difflib.get_close_matches(key, known, n=1)
    section = [name for name in known if name.startswith(f"{key.rpartition('.')[0]}.")]
    hint = f"did you mean {' or '.join(meant[:3])}?" if meant else f"known: {', '.join(section[:20] or known[:20])}"
    return f"unknown config key {key}: {hint}"


def identity_differences(saved: Config, current: Config) -> list[str]:
    """Lines 'key: saved -> current' for what differs and may not change when a run is continued."""
    old = flatten(saved)
    return [
        f"{key}: {old[key]!r} -> {value!r}"
        for key, value in flatten(current).items()
        if old[key] != value and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def _upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a run of format 2 with the keys of format 3: in format 2 EDM's lie in `diffusion` itself."""
    diffusion = values.get("diffusion")
    if not isinstance(diffusion, Mapping) or "sigma_data" not in diffusion:
        return values
    edm = {key: value for key, value in diffusion.items() if key != "name"}
    return {**values, "diffusion": {"name": diffusion.get("name", "edm"), "edm": edm}}


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = {key: hint for key, hint in typing.get_type_hints(kind).items() if key in fields}
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown config key {prefix}{key}: {hint}")
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key} is a section of keys, not {value!r}")
            arguments[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            arguments[key] = _typed(hint, value, prefix + key)
            _check_value(fields[key], arguments[key], prefix + key)
    section = kind(**arguments)
    if hasattr(section, "check"):
        section.check()
    return section


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint` (bool, int, float, str or a tuple of floats); an int may stand for a float."""
    if typing.get_origin(hint) is tuple:
        elements = typing.get_args(hint)
        right_length = elements[-1] is Ellipsis or (isinstance(value, (tuple, list)) and len(value) == len(elements))
        if not isinstance(value, (tuple, list)) or not value or not right_length:
            count = "numbers" if elements[-1] is Ellipsis else f"{len(elements)} numbers"
            raise ConfigError(f"{key} is {value!r}, but must be a tuple of {count}")
        return tuple(_typed(elements[0], element, key) for element in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, but must be a finite number")
    if type(value) is not hint:
        raise ConfigError(f"{key} is {value!r} ({type(value).__name__}), but must be of type {hint.__name__}")
    return value


def _check_value(field: dataclasses.Field, value: Any, key: str) -> None:
    """Raises ConfigError for a value that the field's metadata does not allow."""
    allowed = field.metadata
    if "choices" in allowed and value not in allowed["choices"]:
        raise ConfigError(f"{key} is {value!r}, but must be one of {', '.join(allowed['choices'])}")
    for number in value if isinstance(value, tuple) else (value,):
        if "least" in allowed and not number >= allowed["least"]:
            raise ConfigError(f"{key} is {value}, but must be at least {allowed['least']}")
        if "most" in allowed and not number <= allowed["most"]:
            raise ConfigError(f"{key} is {value}, but must be at most {allowed['most']}")
        if "above" in allowed and not number > allowed["above"]:
            raise ConfigError(f"{key} is {value}, but must be above {allowed['above']}")

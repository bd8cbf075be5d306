"""The border of the configuration: a ConfigDict goes in, checked and frozen dataclasses come out.

A file in configs/ changes a locked ConfigDict of all defaults (`presets.default_config`), and `resolve` turns it into a
`Config`. Code below this border reads attributes; none of it looks up a key by name.
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

# Keys and sections that may change when a run is continued. All other keys are the run's identity.
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


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any], guide: bool = False) -> Config:
    """The checked `Config` of a ConfigDict or a nested dict. A key that it lacks has its default.

    guide: whether another network guides the samples; guidance then needs no null label. Raises ConfigError for an
    unknown key, a value of a wrong type or out of range, and values that exclude each other:

        resolve({"model": {"depth": 12}}).model.depth  # 12
        resolve({"depth": 12})  # ConfigError: unknown config key depth: did you mean model.depth?
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, _upgraded(values), "")
    check_together(resolved, guide)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict of a config. `resolve` makes an equal config of it, also if JSON turned its tuples into lists."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """Each value by its dotted key, as in {"seed": 0, "model.depth": 28}."""
    return flax.traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")


def unknown_key(key: str) -> str:
    """The message for a dotted key that no config has, with the key that may be meant; empty for a key that exists."""
    known = list(flatten(Config()))
    section, last = key.rpartition(".")[0], _last(key)
    sections = {name.rpartition(".")[0] for name in known}
    if key in known or key in sections:
        return ""
    meant = keys_named(key) or difflib.get_close_matches(key, [*known, *(sections - {section})], n=1)
    if not meant:
        meant = [name for end in difflib.get_close_matches(last, map(_last, known), n=1) for name in keys_named(end)]
    beside = [name for name in known if name.startswith(f"{section}.")]
    hint = f"did you mean {' or '.join(meant[:4])}?" if meant else f"known: {', '.join((beside or known)[:20])}"
    return f"unknown config key {key}: {hint}"


def keys_named(key: str) -> list[str]:
    """The keys whose last part is that of `key`, at any level: of "model.learning_rate" optimizer.learning_rate.

    A key in a section of nearly the same name is the only answer: of "optimiser.name" optimizer.name.
    """
    named = [name for name in flatten(Config()) if _last(name) == _last(key)]
    return difflib.get_close_matches(key, named, n=1, cutoff=0.8) or named


def free_on_resume(key: str) -> bool:
    """Whether a key may change when a run is continued."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)


def identity_differences(saved: Config, current: Config) -> list[str]:
    """Lines 'key: saved -> current' for the keys that differ and are not in FREE_ON_RESUME."""
    old = flatten(saved)
    return [
        f"{key}: {old[key]!r} -> {value!r}"
        for key, value in flatten(current).items()
        if old[key] != value and not free_on_resume(key)
    ]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a run of format 2 with the keys of format 3: in format 2 the keys of EDM lie in `diffusion`."""
    diffusion = values.get("diffusion")
    if not isinstance(diffusion, Mapping) or "sigma_data" not in diffusion:
        return values
    edm = {key: value for key, value in diffusion.items() if key != "name"}
    return {**values, "diffusion": {"name": diffusion.get("name", "edm"), "edm": edm}}


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    """The checked section `kind` with `values`. prefix: its dotted key and a dot, as in "model."; "" for `Config`."""
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(unknown_key(f"{prefix}{key}") or f"{prefix}{key} must be nested sections")
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
        section.check(prefix)
    return section


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint`: bool, int, float, str or a tuple of numbers. An int may stand for a float."""
    if typing.get_origin(hint) is tuple:
        elements = typing.get_args(hint)
        any_length = elements[-1] is Ellipsis
        if not isinstance(value, (tuple, list)) or not value or not (any_length or len(value) == len(elements)):
            count = "numbers" if any_length else f"{len(elements)} numbers"
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

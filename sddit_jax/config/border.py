"""The one border of configuration: ConfigDict in, checked and frozen dataclasses out.

`default_config()` makes a locked ConfigDict from the defaults in schema.py for a file in configs/ to change, and
`resolve()` turns it into a `Config`; below this border nothing looks a key up by name.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sddit_jax.config.schema import DDPM_STEPS, Config, Diffusion
from sddit_jax.errors import ConfigError

METHODS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "sd_dit": {
            "model.cls_token": True,
            "masking.ratio": 0.2,
            "masking.fill": "noisy",
            "objectives.denoising.scope": "all",
            "objectives.discrimination.weight": 0.1,
            "objectives.reconstruction.weight": 0.0,
        },
        "maskdit": {
            "model.cls_token": False,
            "masking.ratio": 0.5,
            "masking.fill": "mask_token",
            "objectives.denoising.scope": "visible",
            "objectives.discrimination.weight": 0.0,
            "objectives.reconstruction.weight": 0.1,
        },
        "dit_decoder": {
            "model.cls_token": False,
            "masking.ratio": 0.0,
            "masking.fill": "noisy",
            "objectives.denoising.scope": "all",
            "objectives.discrimination.weight": 0.0,
            "objectives.reconstruction.weight": 0.0,
        },
        "dit": {
            "model.cls_token": False,
            "model.decoder_depth": 0,
            "masking.ratio": 0.0,
            "masking.fill": "noisy",
            "objectives.denoising.scope": "all",
            "objectives.discrimination.weight": 0.0,
            "objectives.reconstruction.weight": 0.0,
        },
    }
)

# With iBOT's settings, which are the defaults, the [CLS] term of small runs collapses to the label or to nothing. With
# these it learns: a center for each condition, temperatures in units of the logits' own spread, centers that keep up.
CONDITION_CENTERING: Mapping[str, Any] = types.MappingProxyType(
    {
        "objectives.discrimination.centering": "condition",
        "objectives.discrimination.standardise": True,
        "objectives.discrimination.teacher_temperature": (0.5, 0.5),
        "objectives.discrimination.center_momentum": 0.5,
    }
)

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
    "model.scan",
    "model.remat",
    "optimizer.max_skipped",
)


def default_config(method: str = "sd_dit") -> ml_collections.ConfigDict:
    """A locked ConfigDict of all defaults, with a method's choices (sd_dit, maskdit, dit_decoder, dit)."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config.update_from_flattened_dict(METHODS[method])
    return config.lock()


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any], guide: bool = False) -> Config:
    """The checked, frozen form of a ConfigDict. Raises ConfigError: unknown key, wrong type, impossible run.

    guide: another network guides the samples, so that they need no null label.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, values, "")
    _check_together(resolved, guide)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict that `resolve` turns back into the same config (tuples become lists in JSON)."""
    return dataclasses.asdict(config)


def flatten(config: Config | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def identity_differences(saved: Config, current: Config) -> list[str]:
    """Lines 'key: saved -> current' for what differs and may not change when a run is continued."""
    old = dict(flatten(saved))
    return [
        f"{key}: {old[key]!r} -> {value!r}"
        for key, value in flatten(current)
        if old[key] != value and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown config key {prefix}{key}: {hint}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
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
    return kind(**arguments)


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


def _check_together(config: Config, guide: bool) -> None:
    """Raises ConfigError for values that cannot be run together."""
    model, masking, diffusion, objectives = config.model, config.masking, config.diffusion, config.objectives
    tokens = (model.image_size // model.patch) ** 2
    sampling = config.sampling
    lowest, highest = sampling.sigma_min or diffusion.sigma_min, sampling.sigma_max or diffusion.sigma_max
    guided_from, guided_to = sampling.guidance_interval
    impossible = [
        (
            model.image_size % model.patch != 0,
            f"model.image_size {model.image_size} is not divisible by model.patch {model.patch}",
        ),
        *(
            (w % h != 0, f"model.{width} {w} is not divisible by model.{heads} {h}")
            for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads"))
            for w, h in [(getattr(model, width), getattr(model, heads))]
        ),
        *(
            (w % 4 != 0, f"model.{name} {w} is not divisible by 4, as the 2-D sine-cosine positions need")
            for name, w in (("width", model.width), ("decoder_width", model.decoder_width))
        ),
        (not 0 <= masking.ratio < 1, f"masking.ratio is {masking.ratio}, but must be in [0, 1)"),
        (
            tokens * (1 - masking.ratio) + 1e-9 < 1,
            f"masking.ratio {masking.ratio} leaves none of the {tokens} tokens visible",
        ),
        (
            masking.ratio > 0 and model.decoder_depth == 0,
            f"masking.ratio is {masking.ratio}, but model.decoder_depth is 0, so nothing predicts the invisible "
            "tokens: set masking.ratio to 0",
        ),
        (
            objectives.reconstruction.weight > 0 and masking.ratio == 0,
            f"objectives.reconstruction.weight is {objectives.reconstruction.weight}, but there are no invisible "
            "tokens to reconstruct: masking.ratio is 0",
        ),
        (
            objectives.reconstruction.weight > 0 and model.patch**2 * model.channels == 1,
            "objectives.reconstruction needs patches of more than one value: their variance normalises them",
        ),
        (
            not any((objectives.denoising.weight, objectives.discrimination.weight, objectives.reconstruction.weight)),
            "all weights in objectives are 0, so there is nothing to train",
        ),
        (
            sampling.guidance != 1 and not guide and (model.num_classes == 0 or objectives.label_dropout == 0),
            f"sampling.guidance is {sampling.guidance}, but it needs a trained null label: model.num_classes "
            f"is {model.num_classes}, objectives.label_dropout {objectives.label_dropout}",
        ),
        (
            sampling.solver in ("ddim", "ddpm") and diffusion.name != "ddpm",
            f"sampling.solver is {sampling.solver!r}, but diffusion.name {diffusion.name!r}: set heun, euler, "
            "stochastic or dpmpp_2m",
        ),
        (
            sampling.solver in ("ddim", "ddpm") and sampling.steps > DDPM_STEPS,
            f"sampling.steps is {sampling.steps}, but ddpm has {DDPM_STEPS} noise levels",
        ),
        (
            diffusion.name == "ddpm" and bool(sampling.sigma_min or sampling.sigma_max),
            f"sampling.sigma_min is {sampling.sigma_min} and sampling.sigma_max {sampling.sigma_max}, but "
            "diffusion.name is 'ddpm', whose noise levels are fixed: leave both at 0",
        ),
        (
            diffusion.name == "ddpm" and diffusion != Diffusion(name="ddpm"),
            "diffusion.name is 'ddpm', whose noise levels are fixed: leave the other keys of diffusion as they are",
        ),
        (
            0 < guided_to <= guided_from,
            f"sampling.guidance_interval is {sampling.guidance_interval}, but its high end must be above its low one, "
            "or 0 for none",
        ),
        (
            sampling.solver == "stochastic" and sampling.s_max < sampling.s_min,
            f"sampling.s_max {sampling.s_max} is below sampling.s_min {sampling.s_min}",
        ),
        (
            sampling.guidance_channels > model.channels,
            f"sampling.guidance_channels is {sampling.guidance_channels}, but model.channels {model.channels}",
        ),
        (
            config.eval.name == "digits" and config.data.source != "digits",
            f"eval.name is 'digits', but data.source is {config.data.source!r}",
        ),
        (
            config.eval.every % config.checkpoint.every != 0,
            f"eval.every {config.eval.every} is not divisible by checkpoint.every {config.checkpoint.every}, but "
            "the checkpoint with the lowest distance is kept",
        ),
        (
            config.eval.every > 0 and not config.eval.reference,
            f"eval.every is {config.eval.every}, but eval.reference names no npz file; python -m sddit_jax.evaluate "
            "--write_reference writes one",
        ),
        (
            config.eval.every > 0 and config.eval.features == "inception" and not config.eval.inception,
            f"eval.every is {config.eval.every}, but eval.inception names no file of weights",
        ),
        (
            config.eval.every > 0 and config.codec.name == "latents" and not config.codec.autoencoder,
            f"eval.every is {config.eval.every}, but codec.autoencoder, which makes images of latents, is empty",
        ),
        (
            (config.codec.name == "latents") != config.data.source.startswith("latents:")
            and config.data.source != "folder:",
            f"codec.name is {config.codec.name!r}, but data.source is {config.data.source!r}",
        ),
        (0.0 in config.codec.scale, f"codec.scale is {config.codec.scale}, but must not have a 0"),
        (
            diffusion.sigma_max <= diffusion.sigma_min,
            f"diffusion.sigma_max {diffusion.sigma_max} is not above diffusion.sigma_min {diffusion.sigma_min}",
        ),
        (
            highest <= lowest,
            f"sampling goes from noise level {highest} (sampling.sigma_max, or diffusion.sigma_max if that is 0) to "
            f"{lowest} (sampling.sigma_min, or diffusion.sigma_min if that is 0), which must be below it",
        ),
        *(
            (
                len(values) not in (1, model.channels),
                f"codec.{name} has {len(values)} values, but must have 1 or one for each of {model.channels} channels",
            )
            for name, values in (("mean", config.codec.mean), ("scale", config.codec.scale))
        ),
        (
            config.batch_size % config.parallel.microbatches != 0,
            f"batch_size {config.batch_size} is not divisible by parallel.microbatches {config.parallel.microbatches}",
        ),
    ]
    for holds, message in impossible:
        if holds:
            raise ConfigError(message)

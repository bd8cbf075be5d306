"""The one border of configuration: frozen dataclasses, and the only code that reads a ConfigDict.

Defaults live here, once. `default_config()` makes a locked ConfigDict from them for a file in configs/ to change,
and `resolve()` turns it back into a checked `Config`; below this border nothing looks a key up by name.

Each default says where its value is from:
  P  the SD-DiT paper's abstract or introduction
  S  a secondary source about SD-DiT
  I  inferred from MaskDiT, iBOT or EDM, on which SD-DiT builds
  C  our choice
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sddit_jax.errors import ConfigError


def _default(value: Any, source: str, meaning: str) -> Any:
    """A dataclass field with a default, its provenance (P, S, I or C) and one line of documentation."""
    return dataclasses.field(default=value, metadata={"source": source, "meaning": meaning})


def _section(kind: type) -> Any:
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. `models.sizes.decode` names the published sizes; any other numbers are as good."""

    image_size: int = _default(32, "I", "height and width of what the network sees (latents of 256 px: 32)")
    channels: int = _default(4, "I", "channels of what the network sees")
    num_classes: int = _default(1000, "I", "class labels; 0 trains without labels")
    patch: int = _default(2, "I", "height and width of a patch")
    depth: int = _default(28, "I", "encoder blocks")
    width: int = _default(1152, "I", "encoder width")
    heads: int = _default(16, "I", "encoder attention heads")
    mlp_ratio: float = _default(4.0, "I", "hidden width of a block's MLP over its width")
    decoder_depth: int = _default(8, "I", "decoder blocks; 0 puts the final layer on the encoder (DiT)")
    decoder_width: int = _default(512, "I", "decoder width")
    decoder_heads: int = _default(16, "I", "decoder attention heads")
    cls_token: bool = _default(True, "S", "whether the encoder carries a [CLS] token")
    null_label: str = _default("zero", "I", "the dropped label: 'zero' vector (MaskDiT) or a learnt 'row' (DiT)")
    learn_sigma: bool = _default(False, "I", "twice the output channels, as DiT's checkpoints have")
    scan: bool = _default(True, "C", "one compiled block in a loop (fast to compile), or unrolled")
    remat: str = _default("none", "C", "what the backward pass recomputes: none, dots or full")
    dtype: str = _default("float32", "C", "dtype of the matrix products: float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """EDM's noise level distribution and preconditioning (Karras et al. 2022, Table 1)."""

    sigma_data: float = _default(0.5, "I", "standard deviation of the data that the network sees")
    log_sigma_mean: float = _default(-1.2, "I", "mean of ln sigma in training")
    log_sigma_std: float = _default(1.2, "I", "standard deviation of ln sigma in training")
    sigma_min: float = _default(0.002, "S", "lowest noise level; the teacher's, always")
    sigma_max: float = _default(80.0, "I", "noise level at which sampling starts")


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which tokens the student's encoder does not see, and what the decoder gets in their place."""

    ratio: float = _default(0.2, "S", "share of the student's tokens made invisible, in [0, 1)")
    fill: str = _default("noisy", "P", "decoder input there: 'noisy' tokens, or a learnt 'mask_token' (MaskDiT)")


@dataclasses.dataclass(frozen=True)
class Denoising:
    """EDM's weighted denoising loss."""

    weight: float = _default(1.0, "I", "weight in the total loss")
    scope: str = _default("all", "I", "average over 'all' patches, or the 'visible' ones (MaskDiT)")


@dataclasses.dataclass(frozen=True)
class Discrimination:
    """Self-distillation between the student's and the teacher's tokens."""

    weight: float = _default(0.1, "C", "weight in the total loss; 0 trains without teacher and head")
    prototypes: int = _default(8192, "I", "number of prototypes K")
    head_width: int = _default(2048, "I", "hidden width of the projection head")
    bottleneck: int = _default(256, "I", "width of the head's normalised output")
    student_temperature: float = _default(0.1, "I", "temperature of the student's softmax")
    teacher_temperature: tuple[float, float] = _default(
        (0.04, 0.07), "I", "temperature of the teacher's softmax: first and last"
    )
    teacher_temperature_warmup: float = _default(0.3, "I", "share of the run in which it rises")
    centering: str = _default(
        "mean", "S", "running mean of the logits: one 'mean' (DINO), or one per 'condition' (position, label)"
    )
    standardise: bool = _default(
        False, "C", "teacher temperatures in units of the running standard deviation of the centered logits"
    )
    center_momentum: float = _default(0.9, "I", "momentum of the running centers")
    teacher: str = _default("own", "C", "'own' EMA law, or 'ema': read the sampling EMA")
    teacher_momentum: tuple[float, float] = _default(
        (0.996, 1.0), "C", "own law: momentum, first and last, by cosine over the run"
    )
    chunk: int = _default(16, "C", "token positions whose prototype logits exist at one time")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """MaskDiT's auxiliary loss: the noisy input of the invisible patches, normalised per patch."""

    weight: float = _default(0.0, "I", "weight in the total loss (MaskDiT: 0.1)")


@dataclasses.dataclass(frozen=True)
class Objectives:
    """The terms of the loss. A weight of 0 leaves a term, and all that only it needs, out."""

    denoising: Denoising = _section(Denoising)
    discrimination: Discrimination = _section(Discrimination)
    reconstruction: Reconstruction = _section(Reconstruction)
    label_dropout: float = _default(0.1, "I", "share of labels replaced by the null label")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser of optax by name, with its learning rate a function of the step."""

    name: str = _default("adamw", "I", "adamw, adam, lion, sgd, radam, nadamw, lamb or muon")
    learning_rate: float = _default(1e-4, "I", "peak learning rate")
    schedule: str = _default("constant", "I", "after warm-up: constant or cosine (to 0)")
    warmup_steps: int = _default(0, "I", "steps of linear warm-up")
    b1: float = _default(0.9, "I", "decay of the first moment (momentum for sgd)")
    b2: float = _default(0.999, "I", "decay of the second moment")
    eps: float = _default(1e-8, "I", "added to the root of the second moment")
    weight_decay: float = _default(0.0, "I", "decoupled weight decay")
    clip_norm: float = _default(0.0, "I", "largest global gradient norm; 0 does not clip")
    max_skipped: int = _default(10, "C", "non-finite steps in a row, each skipped, before the run ends")


@dataclasses.dataclass(frozen=True)
class EMA:
    """The weights that sampling uses: decay(t) = min(decay, (1 + t) / (10 + t))."""

    decay: float = _default(0.9999, "I", "decay of the sampling EMA")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from."""

    source: str = _default("folder:", "C", "digits, folder:PATH or tfds:NAME")
    split: str = _default("train", "C", "split of the dataset")
    flip: bool = _default(True, "I", "mirror half of the images")
    num_threads: int = _default(16, "C", "reading threads")
    prefetch: int = _default(8, "C", "batches read ahead")


@dataclasses.dataclass(frozen=True)
class Codec:
    """How pixels become what the network sees: z = (x - mean) * scale, x in [-1, 1], per channel."""

    name: str = _default("pixels", "C", "pixels")
    mean: tuple[float, ...] = _default((0.0,), "C", "mean per channel; one value serves all")
    scale: tuple[float, ...] = _default((0.5,), "C", "scale per channel; one value serves all")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The device mesh, and how a batch is computed on it."""

    data: int = _default(-1, "C", "devices along the data axis; -1: what is left")
    fsdp: int = _default(1, "C", "devices along the fsdp axis, which shards parameters too")
    tensor: int = _default(1, "C", "devices along the tensor axis")
    microbatches: int = _default(1, "C", "parts in which a batch's gradient is computed, one after another")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep."""

    every: int = _default(5000, "C", "steps between checkpoints")
    keep_last: int = _default(2, "C", "newest checkpoints to keep")
    keep_every: int = _default(50_000, "I", "also keep every step divisible by this; 0: none")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """EDM's deterministic Heun sampler, and the grid of samples drawn during training."""

    steps: int = _default(40, "I", "noise levels (network passes: 2 * steps - 1)")
    rho: float = _default(7.0, "I", "exponent of the noise schedule")
    guidance: float = _default(1.0, "C", "classifier-free guidance; 1: none")
    every: int = _default(5000, "C", "steps between sample grids; 0: none")
    grid: int = _default(64, "C", "images in a grid")


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured when the run is done."""

    name: str = _default("none", "C", "none, or digits: the samples judged against the real digits")
    draws: int = _default(5, "C", "independent draws of samples")
    num_samples: int = _default(1000, "C", "samples in a draw")


@dataclasses.dataclass(frozen=True)
class Log:
    """What is written, and how often."""

    every: int = _default(100, "C", "steps between rows of metrics.jsonl")
    diagnose_every: int = _default(1000, "C", "steps between diagnoses of the teacher's assignments; 0: none")
    tensorboard: bool = _default(True, "C", "write TensorBoard events when a writer is installed")
    wandb: str = _default("", "C", "Weights & Biases project; empty: off")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    seed: int = _default(0, "I", "seed of everything")
    steps: int = _default(400_000, "I", "training steps")
    batch_size: int = _default(256, "I", "global batch size")
    model: Model = _section(Model)
    diffusion: Diffusion = _section(Diffusion)
    masking: Masking = _section(Masking)
    objectives: Objectives = _section(Objectives)
    optimizer: Optimizer = _section(Optimizer)
    ema: EMA = _section(EMA)
    data: Data = _section(Data)
    codec: Codec = _section(Codec)
    parallel: Parallel = _section(Parallel)
    checkpoint: Checkpoint = _section(Checkpoint)
    sampling: Sampling = _section(Sampling)
    eval: Eval = _section(Eval)
    log: Log = _section(Log)


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

# What may differ between a checkpoint and the config that continues it. All else is the run's identity.
FREE_ON_RESUME = ("steps", "parallel", "checkpoint", "sampling", "eval", "log", "data.num_threads", "data.prefetch",
                  "data.source", "model.scan", "model.remat", "optimizer.max_skipped")  # fmt: skip


def default_config(method: str = "sd_dit") -> ml_collections.ConfigDict:
    """A locked ConfigDict of all defaults, with a method's choices (sd_dit, maskdit, dit_decoder, dit)."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config.update_from_flattened_dict(METHODS[method])
    return config.lock()


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """The checked, frozen form of a ConfigDict. Raises ConfigError: unknown key, wrong type, impossible run."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, values, "")
    _check(resolved)
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
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key} is a section of keys, not {value!r}")
            arguments[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            arguments[key] = _typed(hint, value, prefix + key)
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
    if type(value) is not hint:
        raise ConfigError(f"{key} is {value!r} ({type(value).__name__}), but must be of type {hint.__name__}")
    return value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _choice(key: str, value: str, *choices: str) -> None:
    _require(value in choices, f"{key} is {value!r}, but must be one of {', '.join(choices)}")


def _check(config: Config) -> None:
    """Raises ConfigError for a value out of range or a combination that cannot be run."""
    model, masking, objectives = config.model, config.masking, config.objectives
    for key, value in flatten(config):
        smallest = 1 if key in _AT_LEAST_ONE else 0 if key in _AT_LEAST_ZERO else None
        _require(smallest is None or value >= smallest, f"{key} is {value}, but must be at least {smallest}")
    for key, value, choices in (
        ("model.null_label", model.null_label, ("zero", "row")),
        ("model.remat", model.remat, ("none", "dots", "full")),
        ("model.dtype", model.dtype, ("float32", "bfloat16")),
        ("masking.fill", masking.fill, ("noisy", "mask_token")),
        ("objectives.denoising.scope", objectives.denoising.scope, ("all", "visible")),
        ("objectives.discrimination.centering", objectives.discrimination.centering, ("mean", "condition")),
        ("objectives.discrimination.teacher", objectives.discrimination.teacher, ("own", "ema")),
        ("optimizer.schedule", config.optimizer.schedule, ("constant", "cosine")),
        ("codec.name", config.codec.name, ("pixels",)),
        ("eval.name", config.eval.name, ("none", "digits")),
    ):
        _choice(key, value, *choices)
    _require(
        model.image_size % model.patch == 0,
        f"model.image_size {model.image_size} is not divisible by model.patch {model.patch}",
    )
    for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
        w, h = getattr(model, width), getattr(model, heads)
        _require(w % h == 0, f"model.{width} {w} is not divisible by model.{heads} {h}")
        _require(w % 4 == 0, f"model.{width} {w} must be divisible by 4 (2-D sine-cosine positions)")
    _require(0 <= masking.ratio < 1, f"masking.ratio is {masking.ratio}, but must be in [0, 1)")
    tokens = (model.image_size // model.patch) ** 2
    _require(
        tokens * (1 - masking.ratio) + 1e-9 >= 1,
        f"masking.ratio {masking.ratio} leaves none of the {tokens} tokens visible",
    )
    _require(
        masking.ratio == 0 or model.decoder_depth > 0,
        f"masking.ratio {masking.ratio} needs a decoder to predict the invisible tokens, but "
        "model.decoder_depth is 0; set masking.ratio to 0",
    )
    _require(
        objectives.reconstruction.weight == 0 or masking.ratio > 0,
        "objectives.reconstruction is about the invisible tokens, but masking.ratio is 0",
    )
    for key, value in (
        ("objectives.label_dropout", objectives.label_dropout),
        ("ema.decay", config.ema.decay),
        ("objectives.discrimination.center_momentum", objectives.discrimination.center_momentum),
        *(("objectives.discrimination.teacher_momentum", m) for m in objectives.discrimination.teacher_momentum),
        ("objectives.discrimination.teacher_temperature_warmup",
         objectives.discrimination.teacher_temperature_warmup),
    ):  # fmt: skip
        _require(0 <= value <= 1, f"{key} is {value}, but must be in [0, 1]")
    for key, value in (
        ("diffusion.sigma_data", config.diffusion.sigma_data),
        ("diffusion.sigma_min", config.diffusion.sigma_min),
        ("objectives.discrimination.student_temperature", objectives.discrimination.student_temperature),
        *(("objectives.discrimination.teacher_temperature", t)
          for t in objectives.discrimination.teacher_temperature),
    ):  # fmt: skip
        _require(value > 0, f"{key} is {value}, but must be above 0")
    _require(
        config.diffusion.sigma_max > config.diffusion.sigma_min,
        f"diffusion.sigma_max {config.diffusion.sigma_max} is not above sigma_min {config.diffusion.sigma_min}",
    )
    for name in ("mean", "scale"):
        length = len(getattr(config.codec, name))
        _require(
            length in (1, model.channels),
            f"codec.{name} has {length} values, but model.channels is {model.channels}: give 1 or {model.channels}",
        )
    _require(
        config.batch_size % config.parallel.microbatches == 0,
        f"batch_size {config.batch_size} is not divisible by parallel.microbatches {config.parallel.microbatches}",
    )


_AT_LEAST_ONE = frozenset(
    ["steps", "batch_size", "model.image_size", "model.channels", "model.patch", "model.depth", "model.width", "model.heads", "model.decoder_width", "model.decoder_heads", "model.mlp_ratio", "objectives.discrimination.prototypes", "objectives.discrimination.head_width", "objectives.discrimination.bottleneck", "objectives.discrimination.chunk", "optimizer.max_skipped", "data.num_threads", "data.prefetch", "parallel.fsdp", "parallel.tensor", "parallel.microbatches", "checkpoint.every", "checkpoint.keep_last", "sampling.steps", "sampling.grid", "eval.draws", "eval.num_samples", "log.every"]
)
_AT_LEAST_ZERO = frozenset(
    ["model.num_classes", "model.decoder_depth", "objectives.denoising.weight", "objectives.discrimination.weight", "objectives.reconstruction.weight", "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm", "checkpoint.keep_every", "sampling.every", "log.diagnose_every", "seed"]
)

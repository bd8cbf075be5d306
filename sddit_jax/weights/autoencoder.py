"""Loads autoencoders from the files that diffusers and CompVis (Stable Diffusion, U-ViT, MaskDiT) publish."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from sddit_jax.errors import ConfigError, WeightsError
from sddit_jax.files import read_json
from sddit_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sddit_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from sddit_jax.weights.files import SUFFIXES, Tensor, fill, open_tensors

CONFIG = "config.json"
TENSORS = "diffusion_pytorch_model.safetensors"
# Type of a config's field -> words for its value in config.json, and a check of the value. The checks compare types,
# since isinstance takes Python's bool for an int.
_KINDS = {
    int: ("an integer", lambda value: type(value) is int),
    tuple[int, ...]: ("a list of integers", lambda value: type(value) is list and {type(x) for x in value} <= {int}),
    float: ("a number", lambda value: type(value) in (int, float)),
    bool: ("true or false", lambda value: type(value) is bool),
}
# Field of AutoencoderConfig and of TinyAutoencoderConfig -> its key in config.json, where that has another name.
_KL_KEYS = {
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "norm_groups": "norm_num_groups",
    "mid_attention": "mid_block_add_attention",
    "quant_conv": "use_quant_conv",
    "post_quant_conv": "use_post_quant_conv",
}
_TINY_KEYS = {"encoder_blocks": "num_encoder_blocks", "decoder_blocks": "num_decoder_blocks"}

# These substitutions, in order, turn our paths into the names of a file's tensors.
_EVERYWHERE = (
    ("^encoder/(?=quant_conv)|^decoder/(?=post_quant_conv)", ""),
    ("(kernel|scale)$", "weight"),
    ("/", "."),
)
_DIFFUSERS = (
    (r"encoder/stage_(\d+)/block_", r"encoder/down_blocks/\1/resnets/"),
    (r"encoder/down_(\d+)", r"encoder/down_blocks/\1/downsamplers/0/conv"),
    (r"decoder/stage_(\d+)/block_", r"decoder/up_blocks/\1/resnets/"),
    (r"decoder/up_(\d+)", r"decoder/up_blocks/\1/upsamplers/0/conv"),
    ("mid/before", "mid_block/resnets/0"),
    ("mid/after", "mid_block/resnets/1"),
    ("mid/attention", "mid_block/attentions/0"),
    ("attentions/0/norm", "attentions/0/group_norm"),
    ("shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
)
_ATTENTION = (("attentions/0/([qkv])/", r"attentions/0/to_\1/"), ("attentions/0/out", "attentions/0/to_out/0"))
_OLD_ATTENTION = (
    ("attentions/0/q/", "attentions/0/query/"),
    ("attentions/0/k/", "attentions/0/key/"),
    ("attentions/0/v/", "attentions/0/value/"),
    ("attentions/0/out", "attentions/0/proj_attn"),
)
_COMPVIS = (
    (r"encoder/stage_(\d+)/block_", r"encoder/down/\1/block/"),
    (r"encoder/down_(\d+)", r"encoder/down/\1/downsample/conv"),
    (r"decoder/stage_(\d+)/block_", r"decoder/up/\1/block/"),
    (r"decoder/up_(\d+)", r"decoder/up/\1/upsample/conv"),
    ("mid/before", "mid/block_1"),
    ("mid/after", "mid/block_2"),
    ("mid/attention", "mid/attn_1"),
    ("attn_1/out", "attn_1/proj_out"),
    ("shortcut", "nin_shortcut"),
)
_TINY = (("layer_", "layers/"), ("conv_", "conv/"))


def load_autoencoder(
    source: str | os.PathLike[str], *, scaling_factor: float | None = None, shift_factor: float | None = None
) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """The config and the parameters (float32 NumPy arrays) of a KL autoencoder, for `Autoencoder`.

        config, params = load_autoencoder("stabilityai/sd-vae-ft-mse")
        mean, std = Autoencoder(config).encode(params, x_BHWC)

    Args:
      source: a diffusers folder (config.json and diffusion_pytorch_model.safetensors), a file of tensors with such a
        config.json beside it, a file in the layout of CompVis (autoencoder_kl.pth), or a repository of the Hugging Face
        hub, as in 'stabilityai/sd-vae-ft-mse' or, for a folder of the repository, 'owner/name/vae'.
      scaling_factor, shift_factor: used instead of the file's. CompVis's files have none: 4 latent channels get those
        of Stable Diffusion 1 and 2 (Stable Diffusion XL's scaling factor is 0.13025); other files need both.

    Raises WeightsError: no such source, a damaged file, an unknown architecture, or tensors that do not fit it.
    """
    path = _locate(source)
    tensors = open_tensors(path)
    if "encoder.down.0.block.0.conv1.weight" in (stripped := _strip(tensors)):
        scaled = scaling_factor is not None and shift_factor is not None
        config, table, tensors = _compvis_config(path, stripped, scaled), _COMPVIS, stripped
    else:
        config = _diffusers_config(_config_beside(path), path.with_name(CONFIG))
        old = "encoder.mid_block.attentions.0.query.weight" in tensors
        table = _DIFFUSERS + (_OLD_ATTENTION if old else _ATTENTION)
    given = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    given = {key: value for key, value in given.items() if value is not None}
    config = _checked(path, dataclasses.replace, config, **given)
    last = len(config.widths) - 1

    def name_of(ours: str) -> str:
        if table is not _COMPVIS:
            # diffusers counts a decoder's stages in the order of computation.
            ours = re.sub(r"(?<=^decoder/)(stage|up)_(\d+)", lambda m: f"{m[1]}_{last - int(m[2])}", ours)
        return _substitute(ours, table)

    shapes = jax.eval_shape(Autoencoder(config).init, jax.random.key(0))
    return config, fill(shapes, tensors, name_of, path)


def load_tiny_autoencoder(source: str | os.PathLike[str]) -> tuple[TinyAutoencoderConfig, dict[str, Any]]:
    """The config and the parameters (float32 NumPy arrays) of a tiny autoencoder, for `TinyAutoencoder`.

    source: a folder that diffusers' AutoencoderTiny has saved, a .safetensors file with its config.json beside it,
    or a repository of the hub such as 'madebyollin/taesd'. Raises as `load_autoencoder`.
    """
    path = _locate(source)
    config = _tiny_config(_config_beside(path), path.with_name(CONFIG))
    shapes = jax.eval_shape(TinyAutoencoder(config).init, jax.random.key(0))
    return config, fill(shapes, open_tensors(path), lambda ours: _substitute(ours, _TINY), path)


def is_tiny(source: str | os.PathLike[str]) -> bool:
    """Whether the config.json of a source names a tiny autoencoder. Raises WeightsError: no such source."""
    path = _locate(source)
    return path.with_name(CONFIG).is_file() and _config_beside(path).get("_class_name") == "AutoencoderTiny"


def _substitute(ours: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in (*table, *_EVERYWHERE):
        ours = re.sub(pattern, replacement, ours)
    return ours


def _locate(source: str | os.PathLike[str]) -> Path:
    """The file of tensors of a source."""
    path = Path(source)
    if not path.exists():
        return _fetch(str(source))
    if path.is_dir():
        for name in (CONFIG, TENSORS):
            if not (path / name).is_file():
                raise WeightsError(f"{path} has no {name}; if the file has another name, give the file's path")
        return path / TENSORS
    return path


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.with_name(CONFIG)
    if not file.is_file():
        raise WeightsError(
            f"{path} is no autoencoder that is known: {CONFIG} is not beside it, as for a file of diffusers, and its "
            "tensors are not called as CompVis calls an autoencoder's"
        )
    return read_json(file, WeightsError)


def _fetch(source: str) -> Path:
    """Downloads config.json and the tensors of a repository into one folder of the cache; the path of the tensors."""
    if source.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", source):
        raise WeightsError(
            f"{source!r} is no file, no folder, and no repository of the Hugging Face hub such as "
            "'stabilityai/sd-vae-ft-mse'"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f"{source} is not a file or folder here; fetching it from the Hugging Face hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    owner, name, *folder = source.split("/")
    try:
        for file in (CONFIG, TENSORS):
            path = huggingface_hub.hf_hub_download(f"{owner}/{name}", "/".join([*folder, file]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(
            f"{source} is not a file or folder here and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
    return Path(path)


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of CompVis's autoencoder, without its training loss and the other parts of a latent diffusion."""
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}


def _compvis_config(path: Path, tensors: Mapping[str, Tensor], scaled: bool) -> AutoencoderConfig:
    """The architecture that follows from the shapes. scaled: the caller gives the scaling and shift factors."""

    def axis(name: str, axis: int) -> int:
        if name not in tensors:
            raise WeightsError(f"{path} does not fit: {name} is missing")
        if len(tensors[name].shape) != 4:
            raise WeightsError(f"{path} does not fit: {name} has the shape {list(tensors[name].shape)}, not four axes")
        return tensors[name].shape[axis]

    def count(pattern: str) -> int:
        """The number n of parts 0, 1, ..., n - 1 whose names match."""
        found = {int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name, re.ASCII))}
        return next(i for i in range(len(found) + 1) if i not in found)

    latent_channels = axis("decoder.conv_in.weight", 1)
    if latent_channels != 4 and not scaled:
        raise WeightsError(
            f"{path} does not say how its {latent_channels} latent channels are scaled; give scaling_factor and "
            "shift_factor"
        )
    stages = count(r"encoder\.down\.(\d{1,3})\.block\.0\.conv1\.weight")
    return _checked(
        path,
        AutoencoderConfig,
        in_channels=axis("encoder.conv_in.weight", 1),
        out_channels=axis("decoder.conv_out.weight", 0),
        latent_channels=latent_channels,
        widths=tuple(axis(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(stages)),
        blocks=count(r"encoder\.down\.0\.block\.(\d{1,3})\.conv1\.weight"),
        mid_attention="encoder.mid.attn_1.q.weight" in tensors,
        quant_conv="quant_conv.weight" in tensors,
        post_quant_conv="post_quant_conv.weight" in tensors,
    )


def _diffusers_config(raw: Mapping[str, Any], path: Path) -> AutoencoderConfig:
    """The config of diffusers' AutoencoderKL."""
    _expect(raw, path, _class_name="AutoencoderKL", act_fn="silu", latents_mean=None, latents_std=None)
    config = _read_config(AutoencoderConfig, _KL_KEYS, raw, path)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        _expect(raw, path, **{key: [kind] * len(config.widths)})
    return config


def _tiny_config(raw: Mapping[str, Any], path: Path) -> TinyAutoencoderConfig:
    """The config of diffusers' AutoencoderTiny, whose blocks have one width in all published files."""
    expected = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    _expect(raw, path, _class_name="AutoencoderTiny", **expected)
    widths = set()
    for key in ("encoder_block_out_channels", "decoder_block_out_channels"):
        widths |= set(_value(raw, path, key, tuple[int, ...]))
    if len(widths) != 1:
        raise WeightsError(f"{path}: the blocks have several widths, {sorted(widths)}; they should have one")
    return _read_config(TinyAutoencoderConfig, _TINY_KEYS, raw | {"width": widths.pop()}, path)


def _expect(raw: Mapping[str, Any], path: Path, **expected: Any) -> None:
    """Raises WeightsError if a key is there with another value than the one that is implemented."""
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise WeightsError(f"{path}: {key} is {raw[key]!r}; only {value!r} can be loaded")


def _read_config(make: type, keys: Mapping[str, str], raw: Mapping[str, Any], path: Path) -> Any:
    """A config dataclass from a config.json. keys: field -> key, where the names differ. Raises WeightsError.

    Old versions of diffusers wrote no scaling and no switches, and used the values that are the dataclass's defaults.
    """
    fields = {}
    for field in dataclasses.fields(make):
        key = keys.get(field.name, field.name)
        if raw.get(key) is not None or field.type not in (float, bool):
            fields[field.name] = _value(raw, path, key, field.type)
    return _checked(path, make, **fields)


def _value(raw: Mapping[str, Any], path: Path, key: str, kind: type) -> Any:
    words, is_right = _KINDS[kind]
    if not is_right(value := raw.get(key)):
        raise WeightsError(f"{path}: {key} is {value!r}; it should be {words}")
    return tuple(value) if isinstance(value, list) else value


def _checked(path: Path, make: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """The config that `make` returns. A value that is out of range in it is the file's fault."""
    try:
        return make(*args, **fields)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error

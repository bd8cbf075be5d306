"""Weights of autoencoders, from the files that diffusers and CompVis (Stable Diffusion, U-ViT, MaskDiT) publish."""

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
_REQUIRED = object()
# bool is a kind of int in Python, but not in JSON.
_KINDS = {
    "an integer": lambda value: type(value) is int,
    "a list of integers": lambda value: type(value) is list and all(type(item) is int for item in value),
    "a number": lambda value: type(value) in (int, float),
    "true or false": lambda value: type(value) is bool,
}

# Our paths become a file's names by these substitutions, in order.
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

    source: a diffusers folder (config.json and diffusion_pytorch_model.safetensors), a file of tensors with such a
    config.json beside it, a file in the layout of CompVis (autoencoder_kl.pth), or the id of a repository of the
    Hugging Face hub, with a folder of it if need be, as in 'stabilityai/sd-vae-ft-mse' or 'owner/name/vae'.

    scaling_factor, shift_factor: instead of the file's. CompVis's files have none: by default, 4 latent channels get
    those of Stable Diffusion 1 and 2 (Stable Diffusion XL's scaling factor is 0.13025); for others, give both.

    Raises:
      WeightsError: no such source, a damaged file, an architecture that is not known, or tensors that do not fit.
    """
    path = _locate(source)
    tensors = open_tensors(path)
    if "encoder.down.0.block.0.conv1.weight" in (stripped := _strip(tensors)):
        scaled = scaling_factor is not None and shift_factor is not None
        config, table, tensors = _compvis_config(path, stripped, scaled), _COMPVIS, stripped
    else:
        config, table = _diffusers_config(_read_config(path), path.with_name(CONFIG)), _DIFFUSERS
        table += _OLD_ATTENTION if "encoder.mid_block.attentions.0.query.weight" in tensors else _ATTENTION
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
    or a hub id such as 'madebyollin/taesd'.

    Raises:
      WeightsError: as `load_autoencoder`.
    """
    path = _locate(source)
    config = _tiny_config(_read_config(path), path.with_name(CONFIG))
    shapes = jax.eval_shape(TinyAutoencoder(config).init, jax.random.key(0))
    return config, fill(shapes, open_tensors(path), lambda ours: _substitute(ours, _TINY), path)


def is_tiny(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a tiny autoencoder, by the config.json beside it. Raises WeightsError: no such source."""
    path = _locate(source)
    return path.with_name(CONFIG).is_file() and _read_config(path).get("_class_name") == "AutoencoderTiny"


def _substitute(ours: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in (*table, *_EVERYWHERE):
        ours = re.sub(pattern, replacement, ours)
    return ours


def _locate(source: str | os.PathLike[str]) -> Path:
    """The file of tensors."""
    path = Path(source)
    if not path.exists():
        return _fetch(str(source))
    if path.is_dir():
        for name in (CONFIG, TENSORS):
            if not (path / name).is_file():
                raise WeightsError(f"{path} has no {name}; for a file of another name, give the file")
        return path / TENSORS
    return path


def _read_config(path: Path) -> dict[str, Any]:
    """The content of the config.json beside a file of tensors."""
    file = path.with_name(CONFIG)
    if not file.is_file():
        raise WeightsError(
            f"{path}: {CONFIG} is not beside it, which a file of diffusers needs, and its tensors are not called as "
            "CompVis calls an autoencoder's"
        )
    return read_json(file, WeightsError)


def _fetch(source: str) -> Path:
    """The file of tensors of a repository of the hub, in the hub's cache; its config.json lies beside it."""
    if source.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", source):
        raise WeightsError(f"{source} is neither a file, a folder, nor a hub id such as 'stabilityai/sd-vae-ft-mse'")
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
    """The tensors of CompVis's autoencoder: without its training loss and, in a whole model's file, the rest."""
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}


def _compvis_config(path: Path, tensors: Mapping[str, Tensor], scaled: bool) -> AutoencoderConfig:
    """The architecture that the shapes tell. scaled: how the latents are scaled is known from elsewhere."""

    def axis(name: str, axis: int) -> int:
        if name not in tensors:
            raise WeightsError(f"{path} does not fit: {name} is missing")
        if len(tensors[name].shape) != 4:
            raise WeightsError(f"{path} does not fit: {name} has the shape {list(tensors[name].shape)}, not four axes")
        return tensors[name].shape[axis]

    def count(pattern: str) -> int:
        """How many of 0, 1, ... a name has."""
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
    """The config of diffusers' AutoencoderKL. What older versions did not write has the value that they used."""
    _expect(raw, path, _class_name="AutoencoderKL", act_fn="silu", latents_mean=None, latents_std=None)
    get = _reader(raw, path)
    widths = get("block_out_channels", "a list of integers")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        _expect(raw, path, **{key: [kind] * len(widths)})
    return _checked(
        path,
        AutoencoderConfig,
        in_channels=get("in_channels", "an integer"),
        out_channels=get("out_channels", "an integer"),
        latent_channels=get("latent_channels", "an integer"),
        widths=widths,
        blocks=get("layers_per_block", "an integer"),
        norm_groups=get("norm_num_groups", "an integer"),
        mid_attention=get("mid_block_add_attention", "true or false", True),
        quant_conv=get("use_quant_conv", "true or false", True),
        post_quant_conv=get("use_post_quant_conv", "true or false", True),
        scaling_factor=get("scaling_factor", "a number", 0.18215),
        shift_factor=get("shift_factor", "a number", 0.0),
    )


def _tiny_config(raw: Mapping[str, Any], path: Path) -> TinyAutoencoderConfig:
    """The config of diffusers' AutoencoderTiny, of one width as all published ones."""
    expected = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    _expect(raw, path, _class_name="AutoencoderTiny", **expected)
    get = _reader(raw, path)
    widths = {
        *get("encoder_block_out_channels", "a list of integers"),
        *get("decoder_block_out_channels", "a list of integers"),
    }
    if len(widths) != 1:
        raise WeightsError(f"{path}: blocks of several widths, {sorted(widths)}; there should be one")
    return _checked(
        path,
        TinyAutoencoderConfig,
        in_channels=get("in_channels", "an integer"),
        out_channels=get("out_channels", "an integer"),
        latent_channels=get("latent_channels", "an integer"),
        width=widths.pop(),
        encoder_blocks=get("num_encoder_blocks", "a list of integers"),
        decoder_blocks=get("num_decoder_blocks", "a list of integers"),
        scaling_factor=get("scaling_factor", "a number", 1.0),
        shift_factor=get("shift_factor", "a number", 0.0),
    )


def _expect(raw: Mapping[str, Any], path: Path, **expected: Any) -> None:
    """Raises WeightsError where a key that is there has a value that is not implemented."""
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise WeightsError(f"{path}: {key} is {raw[key]!r}; only {value!r} can be loaded")


def _reader(raw: Mapping[str, Any], path: Path) -> Callable[..., Any]:
    """Reads a key of a given kind; null is the same as absent."""

    def get(key: str, kind: str, default: Any = _REQUIRED) -> Any:
        value = raw.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not _KINDS[kind](value):
            raise WeightsError(f"{path}: {key} is {value!r}; it should be {kind}")
        return tuple(value) if isinstance(value, list) else value

    return get


def _checked(path: Path, make: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """The config that `make` gives; what is impossible in it is the file's fault."""
    try:
        return make(*args, **fields)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error

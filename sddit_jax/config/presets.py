"""Choices of many keys at once: methods, settings of the discrimination, and what the ImageNet configs share."""

import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from sddit_jax.config import sizes
from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.border import from_defaults
from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import STABLE_DIFFUSION_SCALE

# The network trained to denoise only. Every method says how it differs from this.
_DENOISING_ONLY = {
    "model.cls_token": False,
    "masking.ratio": 0.0,
    "masking.fill": "noisy",
    "objectives.denoising.scope": "all",
    "objectives.discrimination.weight": 0.0,
    "objectives.reconstruction.weight": 0.0,
}
_DIFFERENCES = {
    "sd_dit": {"model.cls_token": True, "masking.ratio": 0.2, "objectives.discrimination.weight": 0.1},
    "maskdit": {
        "masking.ratio": 0.5,
        "masking.fill": "mask_token",
        "objectives.denoising.scope": "visible",
        "objectives.reconstruction.weight": 0.1,
    },
    "dit_decoder": {},
    "dit": {"model.decoder_depth": 0},
}
METHODS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {name: types.MappingProxyType(_DENOISING_ONLY | differences) for name, differences in _DIFFERENCES.items()}
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

IMAGENET_IMAGES = 1_281_167  # of the training split
DOWNSAMPLING = 8  # of Stable Diffusion's autoencoder


def default_config(method: str = "sd_dit") -> ml_collections.ConfigDict:
    """A locked ConfigDict of all defaults, with a method's choices. Raises ConfigError for another method."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config = from_defaults()
    config.update_from_flattened_dict(METHODS[method])
    return config


def imagenet(resolution: int, text: str) -> ml_collections.ConfigDict:
    """Training on latents of ImageNet: DiT's and SD-DiT's batches of 256 images, or MaskDiT's of 1,024.

    text: the config's argument, as in 'data=DIR,size=B/2,method=maskdit'.
    """
    arguments = parse_arguments(text, {"data": "", "size": "XL/2", "method": "sd_dit"})
    config = default_config(arguments["method"])
    with config.unlocked():
        config.model.update(sizes.parse_size(arguments["size"]))
        config.model.image_size = resolution // DOWNSAMPLING
        config.model.dtype = "bfloat16"
        config.model.remat = "dots"
        config.codec.name, config.codec.scale = "latents", (STABLE_DIFFUSION_SCALE,)
        config.data.source = f"latents:{arguments['data']}"
        if arguments["method"] == "maskdit":
            # Its code: 2M steps at 256 pixels, 1M at 512; each image as it is.
            config.batch_size = 1024
            config.steps = 2_000_000 if resolution == 256 else 1_000_000
            config.data.flip = False
        else:
            config.batch_size = 256
            config.steps = 480 * IMAGENET_IMAGES // config.batch_size
        config.parallel.data, config.parallel.fsdp = 1, -1
        config.sampling.every, config.sampling.grid = 10_000, 32
        config.log.diagnose_every = 5000
    return config

"""Many keys chosen at once: the methods, the settings of the discrimination, and the ImageNet configs."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from sddit_jax.config import sizes
from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.border import to_dict
from sddit_jax.config.schema import Config
from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import STABLE_DIFFUSION_SCALE

# The keys that methods differ in, for a network that is trained to denoise only.
_DENOISING_ONLY = {
    "model.cls_token": False,
    "masking.ratio": 0.0,
    "masking.fill": "noisy",
    "objectives.denoising.scope": "all",
    "objectives.discrimination.weight": 0.0,
    "objectives.reconstruction.weight": 0.0,
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "sd_dit": {
        **_DENOISING_ONLY,
        "model.cls_token": True,
        "masking.ratio": 0.2,
        "objectives.discrimination.weight": 0.1,
    },
    "maskdit": {
        **_DENOISING_ONLY,
        "masking.ratio": 0.5,
        "masking.fill": "mask_token",
        "objectives.denoising.scope": "visible",
        "objectives.reconstruction.weight": 0.1,
    },
    "dit_decoder": _DENOISING_ONLY,
    "dit": {**_DENOISING_ONLY, "model.decoder_depth": 0},
}

# The defaults are iBOT's settings. With them the [CLS] term of small runs collapses: its assignments tell the label or
# nothing. With these settings the term learns; docs/discrimination.md says why.
CONDITION_CENTERING: Mapping[str, Any] = {
    "objectives.discrimination.centering": "condition",
    "objectives.discrimination.standardise": True,
    "objectives.discrimination.teacher_temperature": (0.5, 0.5),
    "objectives.discrimination.center_momentum": 0.5,
}

IMAGENET_IMAGES = 1_281_167  # in the training split
DOWNSAMPLING = 8  # image side over latent side, of Stable Diffusion's autoencoder


def default_config(method: str = "sd_dit") -> ml_collections.ConfigDict:
    """A locked ConfigDict of all defaults, changed to a method of METHODS. Raises ConfigError for any other name."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config = ml_collections.ConfigDict(to_dict(Config())).lock()
    config.update_from_flattened_dict(METHODS[method])
    return config


def imagenet(resolution: int, text: str) -> ml_collections.ConfigDict:
    """The locked ConfigDict for training on latents of ImageNet.

    A batch has 256 images, as in DiT and SD-DiT, or for maskdit 1,024, as in MaskDiT. resolution: side of the images in
    pixels, 256 or 512. text: what follows the config file's colon, as in 'data=DIR,size=B/2,method=maskdit'.
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
            # MaskDiT's code trains 2M steps at 256 pixels and 1M at 512, and mirrors no images.
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

"""What the ImageNet configs share: SD-DiT in its paper's setting and the baselines in theirs, by arguments."""

import dataclasses

import ml_collections

from sddit_jax.config import sizes
from sddit_jax.config.border import METHODS, default_config
from sddit_jax.errors import ConfigError
from sddit_jax.method.codec import STABLE_DIFFUSION_SCALE

IMAGES = 1_281_167  # of ImageNet's training split
DOWNSAMPLING = 8  # of Stable Diffusion's autoencoder


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What may stand behind the colon of a config, as in size=B/2,method=maskdit,data=/data/imagenet256."""

    size: str = "XL/2"
    method: str = "sd_dit"
    data: str = ""


def parse(text: str) -> Arguments:
    """Arguments from 'name=value,name=value'. Raises ConfigError for a name that there is not."""
    values = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        names = [field.name for field in dataclasses.fields(Arguments)]
        if not equals or name not in names:
            raise ConfigError(f"config argument {pair!r} is not one of {', '.join(f'{n}=...' for n in names)}")
        values[name] = value
    arguments = Arguments(**values)
    if arguments.method not in METHODS:
        raise ConfigError(f"method={arguments.method} is not one of {', '.join(METHODS)}")
    return arguments


def imagenet(resolution: int, text: str) -> ml_collections.ConfigDict:
    """Training on latents of ImageNet: DiT's and SD-DiT's batches of 256 images, or MaskDiT's of 1,024."""
    arguments = parse(text)
    config = default_config(arguments.method)
    with config.unlocked():
        config.model.update(sizes.decode(arguments.size))
        config.model.image_size = resolution // DOWNSAMPLING
        config.model.dtype = "bfloat16"
        config.model.remat = "dots"
        config.codec.name, config.codec.scale = "latents", (STABLE_DIFFUSION_SCALE,)
        config.data.source = f"latents:{arguments.data}"
        if arguments.method == "maskdit":
            # Its code: 2M steps at 256 pixels, 1M at 512; each image as it is.
            config.batch_size = 1024
            config.steps = 2_000_000 if resolution == 256 else 1_000_000
            config.data.flip = False
        else:
            config.batch_size = 256
            config.steps = 480 * IMAGES // config.batch_size
        config.parallel.data, config.parallel.fsdp = 1, -1
        config.sampling.every, config.sampling.grid = 10_000, 32
        config.log.diagnose_every = 5000
    return config

"""Trains SD-DiT-S/4 in pixels on a folder of PNG, JPEG or WebP files, 64 x 64 pixels, for 200,000 steps of 128 images.

    python -m sddit_jax.main --config=configs/folder.py:photos --workdir=runs/photos

Each sub-folder is a class; a folder without sub-folders trains without labels. Images are resized and cropped to
64 x 64. --config.model.image_size=32 sets another size; images of 256 pixels and more are better trained on as latents
(see imagenet256.py).

Arguments choose folder, size (S/2 to H/8) and method (sd_dit, maskdit, dit_decoder, dit):
folder.py:data=photos,size=B/2,method=maskdit. The folder may stand alone, as above.
"""

import ml_collections

from sddit_jax.config import sizes
from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.presets import CONDITION_CENTERING, default_config
from sddit_jax.data.sources import open_source


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    chosen = parse_arguments(arguments, {"data": "", "size": "S/4", "method": "sd_dit"}, short="data", path=True)
    path, config = chosen["data"], default_config(chosen["method"])
    with config.unlocked():
        config.steps = 200_000
        config.batch_size = 128
        config.model.update(sizes.parse_size(chosen["size"]))
        config.model.image_size = 64
        config.model.channels = 3
        config.model.dtype = "bfloat16"
        config.model.remat = "dots"
        config.codec.scale = (1.0,)

        config.update_from_flattened_dict(CONDITION_CENTERING)
        config.objectives.discrimination.prototypes = 1024

        config.optimizer.warmup_steps = 1000
        config.data.source = f"folder:{path}"
        if path:
            source = open_source(config.data.source, split="train", image_size=64, channels=3)
            config.model.num_classes = source.num_classes
        config.sampling.steps = 18
    return config

"""Trains SD-DiT-S/2 in pixels on CIFAR-10, 32 x 32 pixels, for 200,000 steps of 256 images: one GPU or a few TPU cores.

    python -c "import tensorflow_datasets as t; t.builder('cifar10', file_format='array_record').download_and_prepare()"
    python -m sddit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

The first command downloads and prepares the data once, without TensorFlow.

Arguments choose method (sd_dit, maskdit, dit_decoder, dit) and size (S/2 to H/8): cifar10.py:method=maskdit,size=B/2. A
method may stand alone: cifar10.py:maskdit. Neither the time nor the FID of this run has been measured with this code.
"""

import ml_collections

from sddit_jax.config import sizes
from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.presets import CONDITION_CENTERING, default_config


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    chosen = parse_arguments(arguments, {"method": "sd_dit", "size": "S/2"}, short="method")
    config = default_config(chosen["method"])
    with config.unlocked():
        config.steps = 200_000
        config.batch_size = 256

        config.model.update(sizes.parse_size(chosen["size"]))
        config.model.image_size = 32
        config.model.channels = 3
        config.model.num_classes = 10
        config.model.dtype = "bfloat16"

        # In [-1, 1] the training images have a mean of (-0.02, -0.04, -0.11) and a standard deviation of 0.50.
        config.codec.mean = (-0.02, -0.04, -0.11)
        config.codec.scale = (1.0,)

        config.update_from_flattened_dict(CONDITION_CENTERING)
        config.objectives.discrimination.prototypes = 1024

        config.optimizer.warmup_steps = 1000
        config.data.source = "tfds:cifar10"
        config.sampling.steps = 18
        config.checkpoint.every = 5000
    return config

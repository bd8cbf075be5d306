"""SD-DiT on CIFAR-10, in pixels: a day on one GPU or a few TPU cores.

    python -m sddit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

The data comes from TensorFlow Datasets, in array_record format, which needs no TensorFlow. Prepare it once:

    python -c "import tensorflow_datasets as t; t.builder('cifar10', file_format='array_record').download_and_prepare()"

Arguments choose method and size: --config=configs/cifar10.py:method=maskdit,size=B/2 (sd_dit, maskdit, dit_decoder,
dit; S/2 to H/8). A method may stand alone, as in cifar10.py:maskdit.
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

        # Mean and standard deviation of the training images in [-1, 1] are (-0.02, -0.04, -0.11) and 0.50.
        config.codec.mean = (-0.02, -0.04, -0.11)
        config.codec.scale = (1.0,)

        config.update_from_flattened_dict(CONDITION_CENTERING)
        config.objectives.discrimination.prototypes = 1024

        config.optimizer.warmup_steps = 1000
        config.data.source = "tfds:cifar10"
        config.sampling.steps = 18
        config.checkpoint.every = 5000
    return config

"""SD-DiT-XL/2 on ImageNet at 512 pixels, in the latents of Stable Diffusion's autoencoder.

    python -m sddit_jax.main --config=configs/imagenet512.py:data=/data/imagenet512 --workdir=runs/imagenet512

Arguments behind the colon: data=DIR, what `python -m sddit_jax.prepare --resolution=512` wrote (168 GB with both mirror
images); size=S/2 to H/8; method=maskdit (batches of 1,024, 1M steps, its paper's), dit_decoder (the same network,
trained to denoise only) or dit (DiT's network under EDM; not the training of the DiT paper).

For SD-DiT-XL/2 at batch 256 the state is 0.22 GiB of each of 64 chips; an image takes 3.78 TFLOP in training and 480
epochs 2,324 EFLOP. For other sizes and chips:

    python -m sddit_jax.preflight --config=configs/imagenet512.py:size=B/2 --topology=v5e:4x4

On 64 chips of TPU v5e the step takes 3.5 GiB of a chip's 15.75; with model.remat=full 1.2.
"""

import ml_collections

from sddit_jax.config.presets import imagenet


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    return imagenet(512, arguments)

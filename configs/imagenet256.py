"""SD-DiT-XL/2 on ImageNet at 256 pixels, in the latents of Stable Diffusion's autoencoder.

    python -m sddit_jax.main --config=configs/imagenet256.py:data=/data/imagenet256 --workdir=runs/imagenet256

Arguments behind the colon: data=DIR, what `python -m sddit_jax.prepare --resolution=256` wrote (42 GB with both mirror
images); size=S/2 to H/8; method=maskdit (batches of 1,024, 2M steps, its paper's), dit_decoder (the same network,
trained to denoise only) or dit (DiT's network under EDM; not the training of the DiT paper).

For SD-DiT-XL/2 at batch 256 the state is 0.86 GiB of each of 16 chips; an image takes 0.86 TFLOP in training and 480
epochs 531 EFLOP, which 16 chips of TPU v5e do in four days at half of their peak. For other sizes and chips:

    python -m sddit_jax.preflight --config=configs/imagenet256.py:size=B/2 --topology=v5e:2x4

On 16 chips of TPU v5e the step takes 4.0 GiB of a chip's 15.75; with model.remat=full 1.8. fsdp takes all chips by
default; beyond 16, copies of 16 shards send less: --config.parallel.data=4 --config.parallel.fsdp=16 on 64.
"""

import ml_collections

from sddit_jax.config.presets import imagenet


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    return imagenet(256, arguments)

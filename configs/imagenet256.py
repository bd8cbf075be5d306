"""Trains SD-DiT-XL/2 on ImageNet at 256 pixels, in latents of Stable Diffusion's autoencoder, for 480 epochs.

    python -m sddit_jax.main --config=configs/imagenet256.py:data=/data/imagenet256 --workdir=runs/imagenet256

Arguments: data=DIR, a folder that `python -m sddit_jax.prepare --resolution=256` wrote (42 GB); size=S/2 to H/8;
method=sd_dit, maskdit (2M steps of 1,024 images, as in MaskDiT's code), dit_decoder (the network of SD-DiT, trained to
denoise only) or dit (the network of DiT, trained with EDM, unlike in DiT's paper).

Cost, by count and by compilation: 0.86 TFLOP for an image, 531 EFLOP for the run, which is four days on 16 chips of TPU
v5e at half of their peak; 4.0 of the 15.75 GiB of a chip, or 1.8 with model.remat=full, of which the state is 0.86.
The run itself has not been done with this code. For other sizes and chips:

    python -m sddit_jax.preflight --config=configs/imagenet256.py:size=B/2 --topology=v5e:2x4

By default the state is sharded over all chips. On more than 16, copies of 16 shards send less: on 64 chips
--config.parallel.data=4 --config.parallel.fsdp=16.
"""

import ml_collections

from sddit_jax.config.presets import imagenet


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    return imagenet(256, arguments)

"""Trains SD-DiT-XL/2 on ImageNet at 512 pixels, in latents of Stable Diffusion's autoencoder, for 480 epochs.

    python -m sddit_jax.main --config=configs/imagenet512.py:data=/data/imagenet512 --workdir=runs/imagenet512

Arguments: data=DIR, a folder that `python -m sddit_jax.prepare --resolution=512` wrote (168 GB); size=S/2 to H/8;
method=sd_dit, maskdit (1M steps of 1,024 images, as in MaskDiT's code), dit_decoder (the network of SD-DiT, trained to
denoise only) or dit (the network of DiT, trained with EDM, unlike in DiT's paper).

Cost, by count and by compilation: 3.78 TFLOP for an image, 2,324 EFLOP for the run; on 64 chips of TPU v5e 3.5 of 15.75
GiB of each chip, or 1.2 with model.remat=full, of which the train state is 0.22. The run itself has not been done with
this code. For other sizes and chips:

    python -m sddit_jax.preflight --config=configs/imagenet512.py:size=B/2 --topology=v5e:4x4
"""

import ml_collections

from sddit_jax.config.presets import imagenet


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    return imagenet(512, arguments)

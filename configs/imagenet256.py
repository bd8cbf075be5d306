"""SD-DiT-XL/2 on ImageNet at 256 pixels, in the latents of Stable Diffusion's autoencoder.

    python -m sddit_jax.main --config=configs/imagenet256.py:data=/data/imagenet256 --workdir=runs/imagenet256

Arguments behind the colon: data=DIR, what `python -m sddit_jax.prepare --resolution=256` wrote (42 GB with both mirror
images); size=S/2 to H/8; method=maskdit (batches of 1,024, 2M steps, its paper's), dit_decoder (the same network,
trained to denoise only) or dit (DiT's network under EDM; not the training of the DiT paper).
"""

import ml_collections

from sddit_jax.recipes import imagenet


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    return imagenet(256, arguments)

"""A run of seconds on latents, for tests of the commands: tests/configs/latents.py:DIR."""

import ml_collections

from sddit_jax.config.presets import default_config


def get_config(path: str) -> ml_collections.ConfigDict:
    config = default_config("sd_dit")
    with config.unlocked():
        config.steps = 20
        config.batch_size = 8
        config.model.update(image_size=8, channels=4, num_classes=0, patch=2, depth=1, width=16, heads=2)
        config.model.update(decoder_depth=1, decoder_width=16, decoder_heads=2)
        config.objectives.discrimination.update(prototypes=8, head_width=16, bottleneck=8)
        config.codec.update(name="latents", scale=(0.18215,))
        config.data.update(source=f"latents:{path}", num_threads=1)
        config.checkpoint.update(every=10, keep_last=1, keep_every=0)
        config.sampling.update(steps=3, every=0, grid=4)
        config.log.update(every=5, diagnose_every=10)
    return config

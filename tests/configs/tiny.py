"""A run of seconds on the real digits, for tests of the commands."""

import ml_collections

from sddit_jax.config.presets import CONDITION_CENTERING, default_config


def get_config(method: str = "sd_dit") -> ml_collections.ConfigDict:
    config = default_config(method)
    with config.unlocked():
        config.update_from_flattened_dict(CONDITION_CENTERING)
        config.steps = 60
        config.batch_size = 16
        config.model.update(image_size=8, channels=1, num_classes=10, patch=2, depth=1, width=16, heads=2)
        config.model.update(decoder_depth=min(config.model.decoder_depth, 1), decoder_width=16, decoder_heads=2)
        config.objectives.discrimination.update(prototypes=8, head_width=16, bottleneck=8)
        config.optimizer.learning_rate = 1e-3
        config.data.update(source="digits", flip=False, num_threads=1)
        config.checkpoint.update(every=10, keep_last=3, keep_every=0)
        config.sampling.update(steps=3, every=30, grid=4)
        config.log.update(every=5, diagnose_every=20)
    return config

"""The network and the parts of a train step, built from a checked configuration."""

import functools

from sddit_jax.config.schema import Config
from sddit_jax.method import schedules
from sddit_jax.method.codec import make_codec
from sddit_jax.method.diffusions import make_diffusion
from sddit_jax.method.objectives.base import Context
from sddit_jax.method.objectives.compose import make_objectives
from sddit_jax.method.optimizer import make_optimizer
from sddit_jax.method.state import Parts
from sddit_jax.models.layers import Hooks
from sddit_jax.models.transformer import Network


def make_network(config: Config, hooks: Hooks = Hooks()) -> Network:
    """The network of a checked configuration."""
    return Network(config.model, config.masking.fill, hooks)


def make_parts(config: Config, hooks: Hooks = Hooks()) -> Parts:
    """The parts of a train step. Raises ConfigError for an unknown optimiser, and for what an objective cannot get."""
    network, diffusion, o = make_network(config, hooks), make_diffusion(config.diffusion), config.optimizer
    ema_decay = functools.partial(schedules.ema_decay, decay=config.ema.decay, warmup=config.ema.warmup)
    return Parts(
        network=network,
        diffusion=diffusion,
        codec=make_codec(config.codec),
        objectives=make_objectives(config.objectives, Context(network, diffusion, config.steps, ema_decay)),
        optimizer=make_optimizer(o),
        learning_rate=functools.partial(
            schedules.learning_rate,
            peak=o.learning_rate,
            kind=o.schedule,
            warmup_steps=o.warmup_steps,
            steps=config.steps,
        ),
        ema_decay=ema_decay,
        mask_ratio=config.masking.ratio,
        label_dropout=config.objectives.label_dropout,
        microbatches=config.parallel.microbatches,
        seed=config.seed,
    )

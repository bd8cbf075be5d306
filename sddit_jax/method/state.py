"""The parts of one configuration, put together, and the train state they start from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sddit_jax.config import schema
from sddit_jax.method.codec import Codec, make_codec
from sddit_jax.method.diffusion import Diffusion, make_diffusion
from sddit_jax.method.objectives.base import Objective
from sddit_jax.method.objectives.compose import make_objectives
from sddit_jax.method.optimizer import make_optimizer
from sddit_jax.models.layers import Constrain, unconstrained
from sddit_jax.models.transformer import Network

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a configuration is made of. Holds no arrays."""

    config: schema.Config
    network: Network
    diffusion: Diffusion
    codec: Codec
    objectives: tuple[Objective, ...]
    optimizer: optax.GradientTransformation

    def init_state(self, key: jax.Array) -> State:
        """The state that a run starts from, with fresh parameters; see `state_from`."""
        return self.state_from(self.network.init(key))

    def state_from(self, params: Any, ema: Any = None) -> State:
        """{params, ema: {name: params}, opt_state, aux: {objective: its state}, step, skipped} at step 0.

        No buffer is in it twice, so that it can be donated. The EMA starts as `ema`, or as the parameters. `skipped`
        counts the non-finite steps in a row.
        """
        return {
            "params": params,
            "ema": {"default": jax.tree.map(jnp.copy, params) if ema is None else ema},
            "opt_state": self.optimizer.init(params),
            "aux": {objective.name: objective.init(params) for objective in self.objectives},
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
        }


def make_parts(config: schema.Config, constrain: Constrain = unconstrained) -> Parts:
    """The parts of a checked configuration. Raises ConfigError for an unknown optimiser."""
    network = Network(config, constrain)
    diffusion = make_diffusion(config.diffusion)
    return Parts(
        config=config,
        network=network,
        diffusion=diffusion,
        codec=make_codec(config.codec),
        objectives=make_objectives(config, network, diffusion),
        optimizer=make_optimizer(config.optimizer),
    )

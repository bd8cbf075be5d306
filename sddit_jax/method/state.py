"""The parts of a train step, and the train state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sddit_jax.method.codec import Codec
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.method.objectives.base import Objective
from sddit_jax.models.transformer import Network
from sddit_jax.settings import setting

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """The exponential moving average (EMA) of the network's weights, which sampling uses."""

    decay: float = setting(
        0.9999, "I", "fraction of the EMA that a step keeps; the rest is the step's weights", least=0, most=1
    )
    warmup: bool = setting(
        True,
        "C",
        "whether the decay at step t is min(decay, (1 + t) / (10 + t)), which forgets random first weights; false: "
        "for a run that starts from trained weights",
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a train step; see `parts.make_parts`. Holds no arrays.

    learning_rate(step), ema_decay(step): schedules. mask_ratio: fraction of tokens that are invisible to the student.
    """

    network: Network
    diffusion: Diffusion
    codec: Codec
    objectives: tuple[Objective, ...]
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]
    ema_decay: Callable[[jax.Array], jax.Array]
    mask_ratio: float
    label_dropout: float
    microbatches: int
    seed: int

    def init_state(self, key: jax.Array) -> State:
        """The state of a run at step 0 with fresh parameters; see `state_from`."""
        return self.state_from(self.init_params(key))

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters: {"network": ..., the name of each objective that owns parameters: ...}."""
        objective_key = jax.random.split(key, 3)[2]
        own = {objective.name: objective.init_params(objective_key) for objective in self.objectives}
        return {"network": self.network.init(key)} | {name: tree for name, tree in own.items() if tree}

    def state_from(self, params: Any, ema: Any = None) -> State:
        """The state of a run at step 0.

        ema: the network's EMA to start from; None starts it from the parameters. `aux` has the state of each objective,
        `skipped` counts the steps in a row that were not finite. No buffer is in it twice, so that it can be donated.
        """
        return {
            "params": params,
            "ema": {"default": jax.tree.map(jnp.copy, params["network"]) if ema is None else ema},
            "opt_state": self.optimizer.init(params),
            "aux": {objective.name: objective.init_state(params) for objective in self.objectives},
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
        }


def by_owner(params: Any) -> dict[str, Any]:
    """A tree like a state's `params` as {"encoder": ..., "decoder": ..., the name of each objective with some: ...}."""
    return params["network"] | {name: tree for name, tree in params.items() if name != "network"}

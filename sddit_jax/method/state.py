"""The parts that a train step is put together from, and the train state that it starts from."""

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
    """The weights that sampling uses."""

    decay: float = setting(0.9999, "I", "decay of the sampling EMA", least=0, most=1)
    warmup: bool = setting(
        True,
        "C",
        "decay(t) = min(decay, (1 + t) / (10 + t)): forgets a random start; off for weights that are trained",
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a train step is made of. Holds no arrays.

    learning_rate(step), ema_decay(step): schedules. mask_ratio: the share of tokens that the student does not see.
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
        """The state that a run starts from, with fresh parameters; see `state_from`."""
        return self.state_from(self.init_params(key))

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters: {"network": ..., and by name what each objective owns, if it owns any}."""
        objective_key = jax.random.split(key, 3)[2]
        own = {objective.name: objective.init_params(objective_key) for objective in self.objectives}
        return {"network": self.network.init(key)} | {name: tree for name, tree in own.items() if tree}

    def state_from(self, params: Any, ema: Any = None) -> State:
        """{params, ema: {name: network}, opt_state, aux: {objective: its state}, step, skipped} at step 0.

        No buffer is in it twice, so that it can be donated. The EMA is of the network alone; it starts as `ema`, or as
        the parameters. `skipped` counts the non-finite steps in a row.
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
    """What is laid out like `params` of a state, by encoder, decoder, and each objective that owns some."""
    return params["network"] | {name: tree for name, tree in params.items() if name != "network"}

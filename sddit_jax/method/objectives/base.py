"""The interface of objectives, and the data that they get."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax

from sddit_jax.errors import ConfigError
from sddit_jax.method import schedules
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.models.masking import Mask
from sddit_jax.models.transformer import Encoded, Network
from sddit_jax.settings import setting

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Drawn:
    """A batch of clean images and the random variables that the step drew for it. Images are float32 [B, H, W, C]."""

    x0_BHWC: jax.Array
    eps_BHWC: jax.Array
    sigma_B: jax.Array
    label_B: jax.Array  # int32, after label dropout
    mask: Mask | None
    features: Mapping[str, jax.Array]  # the arrays of the batch that `Needs.features` names, [B, ...]


@flax.struct.dataclass
class Views(Drawn):
    """A drawn batch with the student's results."""

    noised_BHWC: jax.Array  # x_S = x0 + sigma_S * eps
    encoded: Encoded  # of the visible tokens of x_S
    denoised_BHWC: jax.Array  # D(x_S; sigma_S)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What every objective's section has: its weight, which may change from a step to a step."""

    weight: float = setting(0.0, "C", "weight in the loss; if it is 0 at every step, the term is not computed", least=0)
    weight_schedule: str = setting(
        "constant",
        "C",
        "how the weight changes with the step: 'constant', or 'linear' or 'cosine' from weight to final_weight",
        choices=("constant", "linear", "cosine"),
    )
    final_weight: float = setting(
        0.0, "C", "weight after a 'linear' or 'cosine' change; with 'constant' it must be 0", least=0
    )
    weight_steps: tuple[int, int] = setting(
        (0, 0),
        "C",
        "steps at which a 'linear' or 'cosine' change starts and ends; with 'constant' they must be (0, 0)",
        least=0,
    )

    @property
    def active(self) -> bool:
        """Whether the weight is above 0 at some step."""
        return self.weight > 0 or (self.weight_schedule != "constant" and self.final_weight > 0)

    def check(self, prefix: str) -> None:
        """Raises ConfigError for keys of the weight's schedule that contradict each other."""
        constant = self.weight_schedule == "constant"
        if not constant and self.weight_steps[1] <= self.weight_steps[0]:
            raise ConfigError(
                f"{prefix}weight_steps is {self.weight_steps}, but with {prefix}weight_schedule "
                f"{self.weight_schedule!r} its last step must be above its first"
            )
        if constant and (self.final_weight or self.weight_steps != (0, 0)):
            raise ConfigError(
                f"{prefix}final_weight is {self.final_weight} and {prefix}weight_steps {self.weight_steps}, but "
                f"{prefix}weight_schedule is 'constant': set it to linear or cosine, or both to 0"
            )


class Needs(NamedTuple):
    """The inputs that an objective needs beside the other fields of `Views`.

    blocks: numbers, from 1, of encoder blocks of the student, whose outputs are then in `views.encoded.tapped`.
    features: names of arrays of the batch, which are then in `views.features`.
    """

    blocks: tuple[int, ...] = ()
    features: tuple[str, ...] = ()


class Context(NamedTuple):
    """What all objectives of a run share. steps: of the run. ema_decay(step): the decay of the sampling EMA."""

    network: Network
    diffusion: Diffusion
    steps: int
    ema_decay: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """One term of the loss.

    An objective may own parameters, which are trained with the network's but never reach sampling, and a state, any
    pytree, which the train state carries. name: the key of its section, parameters, state and metrics. Config: its
    section's class.
    """

    config: Any
    context: Context

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveConfig]]

    @property
    def network(self) -> Network:
        """The student's network."""
        return self.context.network

    @property
    def needs(self) -> Needs:
        """The inputs that it needs."""
        return Needs()

    def weight(self, step: jax.Array) -> jax.Array | float:
        """The weight in the loss at a step."""
        c = self.config
        return schedules.between(step, c.weight_schedule, (c.weight, c.final_weight), c.weight_steps)

    def init_params(self, key: jax.Array) -> Any:
        """The parameters that it owns, float32. All objectives get the same key: fold a number of its own into it."""
        return {}

    def init_state(self, params: Any) -> Any:
        """Its state at step 0. params: {"network": ..., the name of each objective that owns parameters: ...}."""
        return {}

    @abc.abstractmethod
    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """(loss without its weight, metrics, statistics for `update`).

        params: as in `init_state`; the gradient is taken with respect to them. ema: the sampling EMA of the network.
        statistics must be means over the batch, since the step averages them over microbatches.
        """

    def update(self, state: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[Any, Metrics]:
        """(state for the next step, metrics), called once a step. params: the parameters after the step."""
        return state, {}

    def flops(self, visible: int) -> dict[str, float]:
        """FLOPs of its matrix products for an image in a training step, by part. visible: number of visible tokens."""
        return {}

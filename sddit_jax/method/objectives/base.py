"""What an objective is, and what it is given."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax

from sddit_jax.method import schedules
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.models.masking import Mask
from sddit_jax.models.transformer import Encoded, Network
from sddit_jax.settings import setting

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Drawn:
    """A batch of clean images with all that is drawn for it. Images are [B, H, W, C]."""

    x0_BHWC: jax.Array
    eps_BHWC: jax.Array
    sigma_B: jax.Array
    label_B: jax.Array  # after label dropout
    mask: Mask | None
    features: Mapping[str, jax.Array]  # what else of the batch an objective needs, [B, ...]


@flax.struct.dataclass
class Views(Drawn):
    """A drawn batch as the student computed it, for the objectives to read."""

    noised_BHWC: jax.Array  # the student's x_S = x0 + sigma_S * eps
    encoded: Encoded  # the student's encoder on the visible tokens
    denoised_BHWC: jax.Array  # D(x_S; sigma_S)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What every objective's section has: its weight, which may change from a step to a step."""

    weight: float = setting(0.0, "C", "weight in the total loss; always 0 leaves the term out", least=0)
    weight_schedule: str = setting(
        "constant",
        "C",
        "weight by step: constant, or linear or cosine to final_weight",
        choices=("constant", "linear", "cosine"),
    )
    final_weight: float = setting(
        0.0, "C", "of linear and cosine: the weight from the last of weight_steps on", least=0
    )
    weight_steps: tuple[int, int] = setting(
        (0, 0), "C", "of linear and cosine: first and last step of the change", least=0
    )

    @property
    def active(self) -> bool:
        """Whether the weight is above 0 at any step."""
        return self.weight > 0 or (self.weight_schedule != "constant" and self.final_weight > 0)


class Needs(NamedTuple):
    """What an objective reads of a step beside the student's last tokens and its denoised image.

    blocks: numbers of the student's encoder blocks, from 1, whose outputs are in `views.encoded.tapped`.
    features: names of arrays of the batch that are in `views.features`.
    """

    blocks: tuple[int, ...] = ()
    features: tuple[str, ...] = ()


class Context(NamedTuple):
    """What a run's objectives share. ema_decay(step): the law of the sampling EMA. steps: of the run."""

    network: Network
    diffusion: Diffusion
    steps: int
    ema_decay: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """One term of the loss.

    It may own parameters, which are trained beside the network's and never reach inference, and a state, any pytree
    that the train state carries. A subclass has a `name`, under which its section, parameters, state and metrics are
    found, and a `Config`, its section.
    """

    config: Any
    context: Context

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveConfig]]

    @property
    def network(self) -> Network:
        """The network that is trained."""
        return self.context.network

    @property
    def needs(self) -> Needs:
        """What it reads of a step."""
        return Needs()

    def weight(self, step: jax.Array) -> jax.Array | float:
        """Weight in the total loss."""
        c = self.config
        return schedules.between(step, c.weight_schedule, (c.weight, c.final_weight), c.weight_steps)

    def init_params(self, key: jax.Array) -> Any:
        """The parameters that it owns, float32. All objectives get one key: draw from a `fold_in` of your own."""
        del key
        return {}

    def init_state(self, params: Any) -> Any:
        """Its state at step 0. params: {"network": ..., and each objective's own by name}."""
        del params
        return {}

    @abc.abstractmethod
    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """(unweighted loss, metrics, statistics).

        params: as of `init_state`, to which the gradient is taken. ema: the network's, as sampling uses it.
        statistics: means over the batch for `update`; the step averages them over microbatches.
        """

    def update(self, state: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[Any, Metrics]:
        """(state for the next step, metrics), once a step, from the parameters that the optimiser has just made."""
        del statistics, params, step
        return state, {}

    def flops(self, visible: int) -> dict[str, float]:
        """What it adds to a step's matrix products for an image, by part; the student sees `visible` patch tokens."""
        del visible
        return {}

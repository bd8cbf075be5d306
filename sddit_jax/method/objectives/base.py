"""What an objective is, and what it is given."""

from typing import Any, Protocol

import flax.struct
import jax

from sddit_jax.models.masking import Mask
from sddit_jax.models.transformer import Encoded

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Views:
    """One batch as the step computed it, for the objectives to read. Images are [B, H, W, C]."""

    x0: jax.Array
    eps: jax.Array
    noised: jax.Array  # the student's x_S = x0 + sigma_S * eps
    sigma_B: jax.Array
    label_B: jax.Array  # after label dropout
    mask: Mask | None
    encoded: Encoded  # the student's encoder on the visible tokens
    denoised: jax.Array  # D(x_S; sigma_S)


class Stateless:
    """The `init` and `update` of an objective that has no state of its own."""

    def init(self, params: Any) -> Any:
        """An empty tree."""
        del params
        return {}

    def update(self, aux: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[Any, Metrics]:
        """The same empty tree, and no metrics."""
        del statistics, params, step
        return aux, {}


class Objective(Protocol):
    """One term of the loss. `aux` is its own state, a pytree that the train state carries.

    `statistics` are means over the batch; the step averages them over microbatches before `update`, which runs
    once per step, after the optimiser.
    """

    name: str
    weight: float

    def init(self, params: Any) -> Any:
        """The state at step 0."""

    def loss(self, params: Any, aux: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """(unweighted loss, metrics, statistics)."""

    def update(self, aux: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[Any, Metrics]:
        """(state for the next step, metrics), from the parameters that the optimiser has just made."""

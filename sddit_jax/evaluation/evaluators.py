"""The table of evaluators."""

from sddit_jax.evaluation.diagnosis import Diagnosis
from sddit_jax.evaluation.digits import Digits
from sddit_jax.evaluation.distance import Distance
from sddit_jax.evaluation.protocol import Evaluator, Run

# Adding an evaluator is one class and one row. The evaluators that are due at a step measure in this order.
EVALUATORS: tuple[type[Evaluator], ...] = (
    Diagnosis,
    Distance,
    Digits,
)


def make_evaluators(run: Run, start: int) -> list[Evaluator]:
    """The evaluators that a run's config asks for. start: see `Evaluator`. Raises UserError, as `Evaluator.make`."""
    made = (kind.make(run, start) for kind in EVALUATORS)
    return [evaluator for evaluator in made if evaluator is not None]

"""What the assignments of the discrimination's teacher tell of the images."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Self

import jax
import numpy as np

from sddit_jax.evaluation.protocol import Evaluator, Moment, Run
from sddit_jax.method.objectives.discrimination import Discrimination
from sddit_jax.method.state import Parts, State
from sddit_jax.method.train_step import clean, step_key
from sddit_jax.parallel.sharding import replicated

log = logging.getLogger("sddit_jax")


class Diagnosis(Evaluator):
    """`diagnose` on the batch at hand, every `log.diagnose_every` steps and at the last one."""

    name = "teacher/patch/information"
    joins_step = True

    def __init__(self, run: Run, start: int) -> None:
        super().__init__(run, start)
        self._diagnose = make_diagnose(run)

    @classmethod
    def make(cls, run: Run, start: int) -> Self | None:
        """None without a discrimination, or if log.diagnose_every is 0."""
        asked_for = run.config.log.diagnose_every and discrimination_of(run.parts)
        return cls(run, start) if asked_for else None

    def due(self, step: int) -> bool:
        """Whether to diagnose a step."""
        return step % self.run.config.log.diagnose_every == 0 or step == self.run.config.steps

    def measure(self, state: State, moment: Moment) -> Mapping[str, jax.Array]:
        """teacher/{patch,cls}/information, in nats; see `Discrimination.diagnose`."""
        return self._diagnose(state, moment.batch)

    def say(self, step: int, row: Mapping[str, float]) -> None:
        """Warns of a collapse, once a tenth of the steps are done."""
        if step > self.run.config.steps // 10 and (reason := collapse(self.run.parts, row)):
            log.warning("step %d: the discrimination looks collapsed: %s", step, reason)


def discrimination_of(parts: Parts) -> Discrimination | None:
    """The discrimination objective of a run, if it has one."""
    return next((o for o in parts.objectives if isinstance(o, Discrimination)), None)


def diagnose(parts: Parts, state: State, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`Discrimination.diagnose` on a batch; its noise follows from the seed and the step. To be jitted."""
    x0_BHWC = clean(parts, batch, state["step"])
    eps_BHWC = jax.random.normal(step_key(parts, state["step"]), x0_BHWC.shape)
    objective = discrimination_of(parts)
    return objective.diagnose(
        state["aux"][objective.name], state["ema"]["default"], x0_BHWC, eps_BHWC, batch["label"], state["step"]
    )


def make_diagnose(run: Run) -> Callable[[State, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """`diagnose` of a run's state and a batch, jitted; the results are on every device."""
    return jax.jit(functools.partial(diagnose, run.parts), out_shardings=replicated(run.mesh))


def collapse(parts: Parts, metrics: Mapping[str, float]) -> str:
    """Why the teacher's assignments look collapsed, from metrics with a diagnosis; empty if they do not."""
    reasons = []
    objective = discrimination_of(parts)
    full = np.log(objective.config.prototypes) if objective else 0.0
    for kind in ("patch", "cls"):
        information = metrics.get(f"teacher/{kind}/information")
        if information is None:
            continue
        mean_entropy = metrics[f"teacher/{kind}/mean_entropy"]
        if information < 0.02:
            reasons.append(f"{kind} assignments tell {information:.3f} nats of the image beyond position and label")
        if mean_entropy < full / 4:
            reasons.append(f"{kind} assignments use few prototypes (entropy {mean_entropy:.2f} of {full:.2f})")
    return "; ".join(reasons)

"""Measures what the assignments of the discrimination's teacher tell about the images."""

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
    """`Discrimination.diagnose` on the batch of a step, every `log.diagnose_every` steps and at the last step."""

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
        """Every `log.diagnose_every` steps, and at the last step."""
        return step % self.run.config.log.diagnose_every == 0 or step == self.run.config.steps

    def measure(self, state: State, moment: Moment) -> Mapping[str, jax.Array]:
        """teacher/{patch,cls}/information, in nats."""
        return self._diagnose(state, moment.batch)

    def say(self, step: int, row: Mapping[str, float]) -> None:
        """Warns if the teacher's assignments look collapsed, after the first tenth of the steps."""
        full = np.log(discrimination_of(self.run.parts).config.prototypes)
        reasons = []
        for kind in ("patch", "cls"):
            if f"teacher/{kind}/information" not in row:
                continue
            information, mean_entropy = (row[f"teacher/{kind}/{name}"] for name in ("information", "mean_entropy"))
            if information < 0.02:
                reasons.append(f"{kind} assignments tell {information:.3f} nats of the image beyond position and label")
            if mean_entropy < full / 4:
                reasons.append(f"{kind} assignments use few prototypes (entropy {mean_entropy:.2f} of {full:.2f})")
        if reasons and step > self.run.config.steps // 10:
            log.warning("step %d: the discrimination looks collapsed: %s", step, "; ".join(reasons))


def discrimination_of(parts: Parts) -> Discrimination | None:
    """The discrimination objective of a run; None if the run has none."""
    return next((o for o in parts.objectives if isinstance(o, Discrimination)), None)


def make_diagnose(run: Run) -> Callable[[State, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """`Discrimination.diagnose` as a jitted function of a run's state and a batch, with its results on every device.

    The noise follows from the run's seed and the state's step.
    """
    parts, objective = run.parts, discrimination_of(run.parts)

    def diagnose(state: State, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        x0_BHWC = clean(parts, batch, state["step"])
        eps_BHWC = jax.random.normal(step_key(parts, state["step"]), x0_BHWC.shape)
        return objective.diagnose(
            state["aux"][objective.name], state["ema"]["default"], x0_BHWC, eps_BHWC, batch["label"], state["step"]
        )

    return jax.jit(diagnose, out_shardings=replicated(run.mesh))

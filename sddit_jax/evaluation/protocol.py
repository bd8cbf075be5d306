"""The protocol of evaluators, which measure a run while it trains or when it ends."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
from jax.sharding import Mesh

from sddit_jax.config.schema import Config
from sddit_jax.data.image_sources import Source
from sddit_jax.generation.decoding import Decode
from sddit_jax.generation.drawing import Generate, make_generate
from sddit_jax.method.state import Parts, State
from sddit_jax.sampling.sampler import Sample, make_sample


@dataclasses.dataclass(frozen=True)
class Run:
    """The opened and checked parts of a run, before its first step.

    codec: the record of the codec. decode: turns samples into images, or leaves them as they are.
    """

    config: Config
    workdir: Path
    mesh: Mesh
    parts: Parts
    source: Source
    codec: dict[str, Any]
    decode: Decode

    @property
    def sample(self) -> Sample:
        """The pure function that draws a batch with the config's sampler."""
        return make_sample(self.parts.network, self.parts.diffusion, self.parts.codec, self.config.sampling)

    @functools.cached_property
    def generate(self) -> Generate:
        """generate(params, seed, label_N) -> images, drawn with the config's sampler; see `make_generate`."""
        return make_generate(self.sample, self.mesh, self.config.sampling.grid, self.decode)


@dataclasses.dataclass(frozen=True)
class Moment:
    """The moment at which an evaluator measures.

    step: number of steps that the state has done. check(): raises if the run is to stop; a long measurement calls it
    between its parts. batch: the step's batch on the devices, for an evaluator that joins the step.
    """

    step: int
    check: Callable[[], None] = lambda: None
    batch: Mapping[str, jax.Array] | None = None


class Evaluator(abc.ABC):
    """Measures a run at steps that it chooses. All processes make the same calls.

    A subclass is one row of `evaluators.EVALUATORS`.

    name: a metric that each of the evaluator's rows has. When a run starts from a step that is due, the row with this
    metric is dropped, and measured again.

    joins_step: whether the metrics go into the row of the step. `measure` is then called as soon as the step has been
    dispatched; it calls jitted functions and must not wait for a device: mixing numbers of the host with arrays raises.
    Otherwise `measure` is called when the step is done, may take long, and its metrics get a row of their own.
    """

    name: str
    joins_step: ClassVar[bool] = False

    def __init__(self, run: Run, start: int) -> None:
        """start: the step that the run starts from, 0 for a new run."""
        self.run, self.start = run, start

    @classmethod
    def make(cls, run: Run, start: int) -> Self | None:
        """The evaluator of a run; None if its config asks for none. Raises UserError for what cannot be measured."""
        return cls(run, start)

    @property
    def best(self) -> int | None:
        """The step with the best `name`, whose checkpoint is kept; None: no checkpoint is kept for this evaluator."""
        return None

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether to measure after a step, from 1. It must depend on the step alone."""

    @abc.abstractmethod
    def measure(self, state: State, moment: Moment) -> Mapping[str, float | jax.Array]:
        """The metrics of a state. Lets through what `moment.check` raises, and then keeps nothing."""

    def say(self, step: int, row: Mapping[str, float]) -> None:
        """Called after a row was written, to write about it to the log."""
        del step, row

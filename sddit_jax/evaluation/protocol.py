"""What an evaluator is: whatever measures a run while it trains, or when it ends."""

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
    """What a run is made of, opened and checked, before its first step.

    codec: the record of what lies between the images and what the network learns. decode: how samples become images.
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
        """The pure function that draws a batch as the config says."""
        return make_sample(self.parts.network, self.parts.diffusion, self.parts.codec, self.config.sampling)

    @functools.cached_property
    def generate(self) -> Generate:
        """generate(params, seed, label_N) -> images, sampled as the config says; see `make_generate`."""
        return make_generate(self.sample, self.mesh, self.config.sampling.grid, self.decode)


def _nothing() -> None:
    """The check of a measurement that nobody can stop."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When an evaluator measures.

    step: the one that the state has done. check(): raises if the run is to stop; a long measurement calls it between
    its parts. batch: what the step has learnt from, on the devices, for an evaluator that joins the step.
    """

    step: int
    check: Callable[[], None] = _nothing
    batch: Mapping[str, jax.Array] | None = None


class Evaluator(abc.ABC):
    """Measures a run at the steps that it chooses. All processes make the same calls.

    name: the metric that each of its rows has. When a run starts, a row of its first state with this metric is dropped
    if the step is due, and measured again.

    joins_step: what `measure` returns stands in the row of the step itself. It is called as soon as the step has been
    dispatched, calls what is jitted, and waits for nothing: a number of the host's among the devices' arrays raises.
    Otherwise `measure` is called when the step is done, may take its time, and has a row of its own.

    A subclass is one row of `evaluators.EVALUATORS`.
    """

    name: str
    joins_step: ClassVar[bool] = False

    def __init__(self, run: Run, start: int) -> None:
        """start: the step that the run starts from, 0 if it is fresh."""
        self.run, self.start = run, start

    @classmethod
    def make(cls, run: Run, start: int) -> Self | None:
        """The evaluator of a run, or None if the run's config asks for none.

        Raises UserError, before the first step, for what could not be measured.
        """
        return cls(run, start)

    @property
    def best(self) -> int | None:
        """The step with the lowest `name`, whose checkpoint is kept; None if none is kept for it."""
        return None

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether to measure a step, from 1; a function of it alone."""

    @abc.abstractmethod
    def measure(self, state: State, moment: Moment) -> Mapping[str, float | jax.Array]:
        """The metrics of a state. What `moment.check` raises passes through, and then nothing is kept."""

    def say(self, step: int, row: Mapping[str, float]) -> None:
        """Tells a person about a row that has just been written, through the log."""
        del step, row

"""The table of objectives, and the objectives of a configuration."""

import dataclasses

from sddit_jax.errors import ConfigError
from sddit_jax.method.objectives.base import Context, Objective
from sddit_jax.method.objectives.denoising import Denoising
from sddit_jax.method.objectives.discrimination import Discrimination
from sddit_jax.method.objectives.reconstruction import Reconstruction
from sddit_jax.settings import setting

# Adding an objective is one file and one row.
OBJECTIVES: tuple[type[Objective], ...] = (
    Denoising,
    Discrimination,
    Reconstruction,
)

ObjectivesConfig = dataclasses.make_dataclass(
    "ObjectivesConfig",
    [
        *((kind.name, kind.Config, kind.Config()) for kind in OBJECTIVES),
        (
            "label_dropout",
            float,
            setting(
                0.1,
                "I",
                "fraction of labels replaced by the null label, for classifier-free guidance; 0: none",
                least=0,
                most=1,
            ),
        ),
    ],
    frozen=True,
    namespace={
        "__doc__": "The terms of the loss, each with a section. A term whose weight is 0 at every step is not computed."
    },
)


def make_objectives(config: ObjectivesConfig, context: Context) -> tuple[Objective, ...]:
    """The objectives whose weight is above 0 at some step, in the order of the table.

    Raises ConfigError if an objective needs the tokens of a block that the encoder does not have.
    """
    sections = ((kind, getattr(config, kind.name)) for kind in OBJECTIVES)
    objectives = tuple(kind(section, context) for kind, section in sections if section.active)
    depth = context.network.model.depth
    for objective in objectives:
        if absent := [block for block in objective.needs.blocks if not 1 <= block <= depth]:
            raise ConfigError(
                f"objectives.{objective.name} needs the tokens of block {absent[0]}, but model.depth is {depth}"
            )
    return objectives

"""The table of objectives, and those that a configuration is made of."""

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
        ("label_dropout", float, setting(0.1, "I", "share of labels replaced by the null label", least=0, most=1)),
    ],
    frozen=True,
    namespace={"__doc__": "The terms of the loss. One whose weight is always 0 is left out, with all that it needs."},
)


def make_objectives(config: ObjectivesConfig, context: Context) -> tuple[Objective, ...]:
    """The objectives whose weight is not always 0, in the order of the table.

    Raises ConfigError if one needs the tokens of a block that the encoder does not have.
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

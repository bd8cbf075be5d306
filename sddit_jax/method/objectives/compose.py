"""The methods as compositions: which objectives a configuration is made of."""

from sddit_jax.config import schema
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.method.objectives.base import Objective
from sddit_jax.method.objectives.denoising import Denoising, Reconstruction
from sddit_jax.method.objectives.discrimination import Discrimination
from sddit_jax.models.transformer import Network


def make_objectives(config: schema.Config, network: Network, diffusion: Diffusion) -> tuple[Objective, ...]:
    """The objectives with a weight above 0, in a fixed order."""
    o, patch = config.objectives, config.model.patch
    objectives = (
        Denoising(o.denoising.weight, o.denoising.scope == "visible", patch, diffusion),
        Discrimination(o.discrimination, network, diffusion, config.steps),
        Reconstruction(o.reconstruction.weight, patch),
    )
    return tuple(objective for objective in objectives if objective.weight)

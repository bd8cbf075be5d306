"""The table of feature spaces."""

from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from sddit_jax.errors import UserError
from sddit_jax.evaluation.feature_spaces import FeatureSpace, inception_space, pixels_space

# Adding a feature space is one function and one row: open(file of weights, mesh, images at a time).
SPACES: Mapping[str, Callable[[str, Mesh, int], FeatureSpace]] = {
    "inception": inception_space,
    "pixels": lambda file, mesh, batch_size: pixels_space(),
}


def open_space(name: str, file: str, mesh: Mesh, batch_size: int) -> FeatureSpace:
    """A feature space by name. Raises UserError for an unknown name or missing weights, WeightsError for damaged ones.

    file: of weights, "" for a space without. batch_size: images at a time, over all devices.
    """
    if name not in SPACES:
        raise UserError(f"features {name!r} are unknown; there are {', '.join(SPACES)}")
    return SPACES[name](file, mesh, batch_size)

"""The table of diffusions, and the one that a configuration names."""

import dataclasses

from sddit_jax.method.diffusion import DDPM, EDM, Diffusion
from sddit_jax.settings import setting

# Adding a diffusion is one class and one row.
DIFFUSIONS: dict[str, type[Diffusion]] = {
    "edm": EDM,
    "ddpm": DDPM,
}

DiffusionConfig = dataclasses.make_dataclass(
    "DiffusionConfig",
    [
        ("name", str, setting("edm", "I", "edm, or ddpm: what DiT's checkpoints need", choices=tuple(DIFFUSIONS))),
        *((name, kind, kind()) for name, kind in DIFFUSIONS.items()),
    ],
    frozen=True,
    namespace={"__doc__": "The diffusion by name, and a section for each kind; the others have no effect."},
)


def make_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion that a configuration names."""
    return getattr(config, config.name)

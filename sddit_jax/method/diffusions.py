"""The table of diffusions, and the diffusion of a configuration."""

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
        ("name", str, setting("edm", "I", "kind: 'edm', or 'ddpm', for checkpoints of DiT", choices=tuple(DIFFUSIONS))),
        *((name, kind, kind()) for name, kind in DIFFUSIONS.items()),
    ],
    frozen=True,
    namespace={
        "__doc__": "The diffusion: how noise is added and removed. Only the section of the kind in name has an effect."
    },
)


def make_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion that a configuration names."""
    return getattr(config, config.name)

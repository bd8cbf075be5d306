"""What several test files share."""

import math

import jax
import numpy as np

from sddit_jax.config.border import Config, resolve
from sddit_jax.config.presets import METHODS, default_config

TINY = {
    "model.image_size": 8,
    "model.channels": 3,
    "model.num_classes": 4,
    "model.patch": 2,
    "model.depth": 2,
    "model.width": 32,
    "model.heads": 4,
    "model.decoder_depth": 1,
    "model.decoder_width": 16,
    "model.decoder_heads": 2,
    "objectives.discrimination.prototypes": 8,
    "objectives.discrimination.head_width": 16,
    "objectives.discrimination.bottleneck": 8,
}


def make_config(method: str = "sd_dit", changes: dict | None = None) -> Config:
    """The resolved config of a method with some keys changed."""
    config = default_config(method)
    config.update_from_flattened_dict(changes or {})
    return resolve(config)


def tiny_config(method: str = "sd_dit", changes: dict | None = None) -> Config:
    """A method's config with a network that computes in milliseconds: 16 tokens, 2 + 1 blocks."""
    return make_config(method, {**TINY, **METHODS[method], **(changes or {})})


def random_params(init, *args, scale: float = 0.1):
    """Normal leaves of the shapes that `init(key, *args)` has: a fresh adaLN-Zero network outputs 0."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: np.float32(scale * rng.normal(size=leaf.shape)), shapes)


def denoise(diffusion, network, x_BHWC, sigma_B):
    """D(x; sigma) by network(c_in * x, c_noise) -> F."""
    return diffusion.denoised(x_BHWC, network(*diffusion.network_input(x_BHWC, sigma_B)), sigma_B)


def products(jaxpr):
    """Operations of all dot_generals of a jaxpr, loops counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
        times = equation.params.get("length", 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
                elif hasattr(inner, "jaxpr"):
                    total += times * products(inner.jaxpr)
    return total

"""Sampling with guidance in float32 on the CPU, beside the same in PyTorch: prints a table.

    python benchmarks/sampling.py [--models=digits,S/2] [--images=16] [--steps=18] [--nocompiled]

Heun's method from the same weights, 2 * steps - 1 passes of 2 * images each. PyTorch's network is the one that
`convert to-torch` is read by. Needs pip install -e '.[torch]', and for torch.compile a C++ compiler (--nocompiled).
"""

import dataclasses
import os
from typing import Any

import harness
import jax
import jax.numpy as jnp
import models
import torch
from absl import flags

from sddit_jax import flops
from sddit_jax.interop import pytorch
from sddit_jax.interop.twin import make_twin
from sddit_jax.sampling.sampler import make_sample
from sddit_jax.state import make_parts

MODELS = flags.DEFINE_list("models", ["digits", "S/2"], "digits, or sizes of latents of 256 pixels.")
IMAGES = flags.DEFINE_integer("images", 16, "Images at a time.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 18, "Noise levels.", lower_bound=1)
COMPILED = flags.DEFINE_bool("compiled", True, "torch.compile too.")


def row(model: str) -> dict[str, Any]:
    """The cells of a row."""
    config = models.configuration(model, "sd_dit")
    sampling = dataclasses.replace(config.sampling, steps=STEPS.value, guidance=1.5)
    config = dataclasses.replace(config, sampling=sampling)
    parts = make_parts(config)
    params = jax.jit(parts.network.init)(jax.random.key(0))
    index_B = jnp.arange(IMAGES.value)
    label_B = index_B % config.model.num_classes
    sample = jax.jit(make_sample(parts.network, parts.diffusion, parts.codec, sampling))
    ways = {"JAX": lambda: sample(params, jnp.int32(0), index_B, label_B)}
    labels = label_B.tolist()
    for name in ("PyTorch", "compiled") if COMPILED.value else ("PyTorch",):
        twin = make_twin(config, params).eval()
        if name == "compiled":
            twin.output = torch.compile(twin.output)
        ways[name] = lambda twin=twin: pytorch.sample(twin, labels)
    product, operations = harness.matrix_product()
    times = harness.measure(ways | {"product": product}, harness.REPETITIONS.value)
    arithmetic = IMAGES.value * 2 * (2 * STEPS.value - 1) * flops.sampling(config)
    own = times["JAX"].median
    cells = {"model": model, "images": IMAGES.value} | {f"{name}, s": times[name] for name in ways}
    cells |= {f"{name} / JAX": times[name].median / own for name in ways if name != "JAX"}
    return cells | {"products": arithmetic / own / (operations / times["product"].median)}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    harness.show([row(model) for model in MODELS.value])


if __name__ == "__main__":
    harness.run(main)

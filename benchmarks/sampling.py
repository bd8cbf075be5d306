"""Prints the time of sampling with guidance beside the same in PyTorch, in float32 on CPUs, in bfloat16 on GPUs.

    python benchmarks/sampling.py --models=digits,S/2 --images=16 --steps=18

Needs pip install -e '.[torch]' (on a GPU a PyTorch for CUDA), and for torch.compile a C++ compiler; --nocompiled leaves
torch.compile out.

Both sample by Heun's method from the same weights: 2 * steps - 1 passes of 2 * images rows each. PyTorch computes the
two halves of a pass one after the other, in a process of its own, with the network that loads the files of
`convert to-torch`. For "fraction of the measured matmul rate" see train_step.py.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import models
import torch
from absl import flags
from twin import make_twin

from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config, ParallelConfig
from sddit_jax.cost import flops
from sddit_jax.interop import pytorch
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import make_mesh
from sddit_jax.sampling.sampler import make_sample

MODELS = flags.DEFINE_list("models", ["digits", "S/2"], "digits, or sizes for latents of 256-pixel images.")
IMAGES = flags.DEFINE_integer("images", 16, "Images that are sampled together.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 18, "Noise levels.", lower_bound=1)
COMPILED = flags.DEFINE_bool("compiled", True, "Whether to measure PyTorch under torch.compile too.")


def sampling_config(model: str) -> Config:
    """The config of SD-DiT, to be sampled with guidance."""
    config = models.configuration(model, "sd_dit")
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, steps=STEPS.value, guidance=1.5))


def torch_sample(model: str, compiled: bool, device: str) -> Callable[[], Any]:
    """The sampling in PyTorch. device: "cpu" or "cuda"."""
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = sampling_config(model)
    params = jax.jit(make_parts(config).network.init)(jax.random.key(0))
    twin = make_twin(config, params).eval()
    if device != "cpu":
        pytorch.cast(twin, torch.bfloat16).to(device)
    if compiled:
        twin.output = torch.compile(twin.output)
    labels = [index % config.model.num_classes for index in range(IMAGES.value)]
    return lambda: pytorch.sample(twin, labels).cpu()


def row(model: str) -> dict[str, Any]:
    """The cells of a row."""
    config = sampling_config(model)
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    parts = make_parts(config, make_hooks(mesh, config.model, whole=True))
    params = jax.jit(parts.network.init)(jax.random.key(0))
    index_B = jnp.arange(IMAGES.value)
    sample = jax.jit(make_sample(parts.network, parts.diffusion, parts.codec, config.sampling))
    cells, times, rate = harness.beside_torch(
        lambda: sample(params, jnp.int32(0), index_B, index_B % config.model.num_classes),
        torch_sample,
        (model,),
        COMPILED.value,
    )
    needed = IMAGES.value * 2 * (2 * STEPS.value - 1) * flops.sampling(config)
    fraction = needed / times["JAX"].median / rate
    return {"model": model, "images": IMAGES.value, **cells, "fraction of the measured matmul rate": fraction}


def main() -> None:
    """Prints the table."""
    harness.show([row(model) for model in MODELS.value], device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    harness.run(main)

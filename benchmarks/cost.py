"""What a run costs, before it is started: parameters, state per chip, and the arithmetic of an image and of the run.

    python benchmarks/cost.py --config=configs/imagenet256.py [--chips=16]

The operations are those of the train step as it is traced, counted by XLA before it compiles: without what
rematerialisation adds, and with every loop unrolled.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from sddit_jax import cli, sharding
from sddit_jax.config import resolve
from sddit_jax.errors import UserError
from sddit_jax.schema import Config
from sddit_jax.state import make_parts
from sddit_jax.train_step import make_train_step

CONFIG = config_flags.DEFINE_config_file("config", None, "Config, as for main.", lock_config=True)
CHIPS = flags.DEFINE_integer("chips", 16, "Chips along the fsdp axis.", lower_bound=1)


def flops(config: Config, batch_size: int) -> float:
    """Floating-point operations of a training step."""
    m = config.model
    discrimination = dataclasses.replace(config.objectives.discrimination, chunk=(m.image_size // m.patch) ** 2)
    config = dataclasses.replace(
        config,
        batch_size=batch_size,
        model=dataclasses.replace(m, scan=False, remat="none"),
        objectives=dataclasses.replace(config.objectives, discrimination=discrimination),
        parallel=dataclasses.replace(config.parallel, microbatches=1),
    )
    parts, image_shape = make_parts(config), (m.image_size, m.image_size, m.channels)
    batch = {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    if config.codec.name == "pixels":
        batch["image"] = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)
    else:
        batch["moments"] = jax.ShapeDtypeStruct((batch_size, 2, *image_shape), jnp.float16)
    state = jax.eval_shape(parts.init_state, jax.random.key(0))
    return jax.jit(make_train_step(parts)).lower(state, batch).cost_analysis()["flops"]


def main() -> None:
    """Prints a line for each figure."""
    if CONFIG.value is None:
        raise UserError("--config=FILE is needed, as in --config=configs/imagenet256.py")
    config = resolve(CONFIG.value)
    state = jax.eval_shape(make_parts(config).init_state, jax.random.key(0))
    mesh = AbstractMesh((1, CHIPS.value, 1), sharding.AXES)
    shares = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)), state, sharding.shardings(mesh, state))
    # The difference leaves out what is done once a step.
    image = flops(config, 2) - flops(config, 1)
    run = image * config.batch_size * config.steps
    print(f"parameters         {sum(leaf.size for leaf in jax.tree.leaves(state['params'])):,}")
    print(f"state of a chip    {4 * sum(jax.tree.leaves(shares)) / 2**30:.2f} GiB of each of {CHIPS.value}")
    print(f"operations         {image / 1e12:.3f} TFLOP an image, {run / 1e18:.0f} EFLOP in {config.steps:,} steps")


if __name__ == "__main__":
    cli.run(main)

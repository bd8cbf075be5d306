"""Prints the cost of guidance in an interval of noise levels, in passes of the network and in seconds.

    python benchmarks/guidance_interval.py --config=configs/digits.py --batch_size=64 --steps=18 --solver=heun

Samples without guidance, with guidance at all noise levels, and with guidance at the middle third of them. The sentence
about savings uses the shortest time of the --repetitions.
"""

import dataclasses
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from sddit_jax.config import schema
from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.errors import UserError
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import make_mesh
from sddit_jax.sampling.sampler import make_sample, schedule

CONFIG = config_flags.DEFINE_config_file("config", None, "Config, as for main.", lock_config=True)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images that are sampled together.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 18, "Noise levels.", lower_bound=3)
SOLVER = flags.DEFINE_enum("solver", "heun", ["heun", "euler", "dpmpp_2m"], "Solver.")


def main() -> None:
    """Prints a row for each way to guide, and how much the interval saves."""
    if CONFIG.value is None:
        raise UserError("--config=FILE is needed, as in --config=configs/digits.py")
    config = resolve(CONFIG.value)
    mesh = make_mesh(schema.ParallelConfig(), jax.devices()[:1])
    parts = make_parts(config, make_hooks(mesh, config.model, whole=True))
    plain = dataclasses.replace(config.sampling, solver=SOLVER.value, steps=STEPS.value, guidance=1.0)
    levels = schedule(parts.diffusion, plain)
    third = STEPS.value // 3
    interval = float(levels[2 * third]), float(levels[third])
    everywhere = dataclasses.replace(plain, guidance=1.5)
    ways = {
        "none": plain,
        "everywhere": everywhere,
        "interval": dataclasses.replace(everywhere, guidance_interval=interval),
    }
    # Heun's method calls the network twice at each noise level but the first.
    called = np.concatenate([levels[:-1], levels[1:-1]]) if SOLVER.value == "heun" else levels[:-1]
    guided = {
        "none": 0,
        "everywhere": len(called),
        "interval": np.sum((interval[0] < called) & (called <= interval[1])),
    }
    passes = {name: BATCH_SIZE.value * int(len(called) + count) for name, count in guided.items()}

    params = parts.network.init(jax.random.key(0))
    index_B = jnp.arange(BATCH_SIZE.value)
    arguments = params, jnp.int32(0), index_B, index_B % max(config.model.num_classes, 1)

    def way(sampling: schema.SamplingConfig) -> Callable[[], jax.Array]:
        sample = jax.jit(make_sample(parts.network, parts.diffusion, parts.codec, sampling))
        return lambda: sample(*arguments)

    times = harness.measure({name: way(sampling) for name, sampling in ways.items()}, harness.REPETITIONS.value)
    harness.show([{"guidance": name, "passes of one image": passes[name], "s": times[name]} for name in ways])
    # Fractions of what guidance at all levels adds to sampling without guidance.
    fastest = {name: seconds.low for name, seconds in times.items()}
    saved, time_saved = ((a["everywhere"] - a["interval"]) / (a["everywhere"] - a["none"]) for a in (passes, fastest))
    print(
        f"guidance only at noise levels in ({interval[0]:.3g}, {interval[1]:.3g}] saves {saved:.1%} of the passes that "
        f"guidance adds and {time_saved:.1%} of the seconds: {time_saved / saved - 1:+.1%} relative to the passes"
    )


if __name__ == "__main__":
    harness.run(main)

"""Prints how much the same images differ when they are sampled on more devices or in other batches.

    python benchmarks/sampling_invariance.py --workdir=runs/digits --num_samples=64 --devices=8

Samples images 0 to N - 1 of a run of pixels on one device in one batch, and then in other ways, in float32 and in
bfloat16. Columns: the largest and the mean difference, in levels of 0 to 255, and the fraction of values that differ.
On CPUs the devices are simulated; on other machines all devices are used. The last row compares bfloat16 with float32.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.errors import UserError
from sddit_jax.generation.drawing import make_generate
from sddit_jax.parallel import sharding
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.runs.folder import open_checkpoints
from sddit_jax.sampling.labels import balanced_labels
from sddit_jax.sampling.sampler import make_sample

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of pixels.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "Images.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 8, "Devices to simulate on CPUs.", lower_bound=1)


def draw(ema: dict, settings: dict, dtype: str, devices: int, batch_size: int) -> np.ndarray:
    """The sampled images, int32 [N, H, W, C]."""
    config = resolve({**settings, "model": {**settings["model"], "dtype": dtype}})
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:devices])
    parts = make_parts(config, make_hooks(mesh, config.model, whole=True, trained=True))
    sample = make_sample(parts.network, parts.diffusion, parts.codec, config.sampling)
    params = jax.device_put(ema["default"], sharding.replicated(mesh))
    labels = balanced_labels(NUM_SAMPLES.value, config.model.num_classes)
    return make_generate(sample, mesh, batch_size)(params, 0, labels).astype(np.int32)


def main() -> None:
    """Prints the table."""
    if not WORKDIR.value:
        raise UserError("--workdir=RUN is needed: the folder of a run of pixels")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    ema, meta = open_checkpoints(Path(WORKDIR.value).expanduser()).restore_ema()
    if meta["codec"]["name"] != "pixels":
        raise UserError(f"{WORKDIR.value} was trained on {meta['codec']['name']}, but must be a run of pixels")
    ema = jax.device_get(ema)
    count, devices = NUM_SAMPLES.value, len(jax.devices())
    print(f"{'dtype':10}{'devices':>8}{'batch':>7}{'largest':>9}{'mean':>10}{'differ':>9}")
    first = {}
    for dtype in ("float32", "bfloat16"):
        first[dtype] = draw(ema, meta["config"], dtype, 1, count)
        for number, batch_size in dict.fromkeys([(1, count), (1, 1), (1, count // 2 + 1), (devices, count)]):
            images = draw(ema, meta["config"], dtype, number, batch_size)
            row(dtype, str(number), str(batch_size), images - first[dtype])
    row("both", "1", str(count), first["bfloat16"] - first["float32"])


def row(dtype: str, devices: str, batch_size: str, difference: np.ndarray) -> None:
    """Prints a row of the table."""
    size = np.abs(difference)
    print(f"{dtype:10}{devices:>8}{batch_size:>7}{size.max():9d}{size.mean():10.5f}{(size > 0).mean():9.3%}")


if __name__ == "__main__":
    cli.run(main)

"""Draws samples: python -m sddit_jax.sample --workdir=RUN --output=DIR --num_samples=N.

Writes DIR/samples.npz (arr_0: uint8 [N, H, W, C]; arr_1: int32 labels), DIR/samples.json (how they were made) and
DIR/grid.png. --format=png writes DIR/images/INDEX.png and DIR/labels.txt instead of the npz file. The samples of a
network of latents need --vae; without it they are latents.npz (float32, as an autoencoder's decoder takes them),
latents.json, and a grid in false colours. --strip and --class_grid add pictures; --num_samples=0 leaves all else out.

Image i depends on --seed, on i and on its label: up to rounding, or bit for bit on the same devices with the same
--batch_size. So --first=I --num_samples=N draws images I to I + N - 1 of a larger set. After an interruption the same
command continues, and ends with the same bytes.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sddit_jax import cli, process_flags
from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import ParallelConfig, SamplingConfig
from sddit_jax.errors import UserError
from sddit_jax.generation.decoding import load_decode
from sddit_jax.generation.drawing import Generator, draw_class_grid, draw_samples, draw_strip
from sddit_jax.generation.sample_folder import SampleFolder
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.parallel import sharding
from sddit_jax.parallel.hooks import attention_kernel, make_hooks
from sddit_jax.runs.folder import open_checkpoints, restore_guide, weights_record
from sddit_jax.runs.versions import versions
from sddit_jax.sampling.labels import labels_of
from sddit_jax.sampling.sampler import make_sample, schedule

log = logging.getLogger("sddit_jax")

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; its EMA weights are used.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to; it is made if it is missing.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "Number of images.", lower_bound=0)
FIRST = flags.DEFINE_integer("first", 0, "Index of the first image, so that several jobs can draw one set.", 0)
FORMAT = flags.DEFINE_enum("format", "npz", ["npz", "png"], "One npz file, as evaluators read it, or a PNG an image.")
STRIP = flags.DEFINE_bool("strip", False, "Also write strip.png: four images, denoised, at up to ten noise levels.")
CLASS_GRID = flags.DEFINE_bool(
    "class_grid", False, "Also write class_grid.png: rows for --labels or ten classes, a column for each noise."
)
LABELS = flags.DEFINE_string("labels", "balanced", "balanced, random, or class labels such as 3,1,4, repeated.")
# A flag for each key of the section `sampling`, but for those of the grids that a run draws while it trains.
DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
SETTINGS = {
    field.name: DEFINE.get(field.type, flags.DEFINE_list)(
        field.name, None, f"{field.metadata['meaning']}. Left out: the run's setting."
    )
    for field in dataclasses.fields(SamplingConfig)
    if field.name not in ("every", "grid")
}
GUIDE = flags.DEFINE_string("guide", None, "Folder of a weaker run, whose EMA weights guide instead of the null label.")
GUIDE_STEP = flags.DEFINE_integer("guide_step", None, "Step of its checkpoint. Left out: the newest intact one.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder that decodes latents. Left out: the run's codec.autoencoder.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise and of random labels.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Images in a batch, over all devices; a multiple of their number. A batch is computed whole.", 1
)
STEP = flags.DEFINE_integer("checkpoint_step", None, "Step of the checkpoint. Left out: the newest intact one.")
flags.adopt_module_key_flags(process_flags)


def settings() -> dict[str, Any]:
    """The keys of the section `sampling` that flags set."""
    given = {key: flag.value for key, flag in SETTINGS.items() if flag.value is not None}
    try:
        return {key: [float(v) for v in value] if isinstance(value, list) else value for key, value in given.items()}
    except ValueError as error:
        interval = ",".join(given["guidance_interval"])
        raise UserError(f"--guidance_interval={interval} is not numbers such as 0.3,5") from error


def main() -> None:
    """Draws the images and the pictures that the flags ask for."""
    if not WORKDIR.value or not OUTPUT.value:
        raise UserError("--workdir=RUN and --output=DIR are needed")
    if not (NUM_SAMPLES.value or STRIP.value or CLASS_GRID.value):
        raise UserError("--num_samples=0 is for --strip and --class_grid; set one of them")
    process_flags.start_processes()
    ema, meta = open_checkpoints(Path(WORKDIR.value).expanduser()).restore_ema(step=STEP.value)
    config = resolve({**meta["config"], "sampling": {**meta["config"]["sampling"], **settings()}}, bool(GUIDE.value))
    mesh = sharding.make_mesh(ParallelConfig())
    parts = make_parts(config, make_hooks(mesh, config.model, whole=True, trained=True))
    params, guide, guide_record = ema["default"], None, None
    if GUIDE.value:
        if config.sampling.guidance == 1:
            raise UserError(f"--guide={GUIDE.value} does nothing with a guidance of 1: set --guidance")
        workdir = Path(GUIDE.value).expanduser()
        guide, weaker, guide_meta = restore_guide(workdir, config, meta["codec"], mesh, GUIDE_STEP.value)
        params, guide_record = (params, weaker), weights_record(GUIDE.value, guide_meta, ("ema/",))
    indices = _indices()
    autoencoder = config.codec.autoencoder if VAE.value is None else VAE.value
    decode = load_decode(autoencoder, meta["codec"], mesh)
    generator = Generator(
        lambda levels=None: make_sample(parts.network, parts.diffusion, parts.codec, config.sampling, guide, levels),
        schedule(parts.diffusion, config.sampling),
        decode,
        mesh,
        jax.device_put(params, sharding.replicated(mesh)),
        SEED.value,
        lambda indices: labels_of(LABELS.value, indices, config.model.num_classes, SEED.value),
    )
    record = {
        **weights_record(WORKDIR.value, meta, ("ema/",)),
        "seed": SEED.value,
        "first_index": indices.start,
        "count": len(indices),
        "batch_size": BATCH_SIZE.value,
        "labels": LABELS.value,
        **_sampler_record(config.sampling, generator.noise_levels),
        "guide": guide_record,
        "dtype": config.model.dtype,
        "codec": meta["codec"],
        "autoencoder": autoencoder,
        "autoencoder_weights": decode.weights,
        "format": FORMAT.value,
    }
    kind = "latents" if meta["codec"]["name"] == "latents" and not autoencoder else "samples"
    if FORMAT.value == "png" and kind == "latents":
        raise UserError("--format=png is for images, but these are latents: --vae decodes them")
    classes = _classes(config.model.num_classes) if CLASS_GRID.value else None
    output = Path(OUTPUT.value).expanduser()
    if indices:
        folder = SampleFolder(
            output, record, _environment(config.model), indices, BATCH_SIZE.value, kind=kind, png=FORMAT.value == "png"
        )
        draw_samples(generator, folder)
        log.info("%d images of step %d in %s", len(indices), meta["step"], output)
    if STRIP.value:
        draw_strip(generator, indices.start, output / "strip.png", record)
    if CLASS_GRID.value:
        draw_class_grid(generator, classes, indices.start, output / "class_grid.png", record)


def _indices() -> range:
    indices = range(FIRST.value, FIRST.value + NUM_SAMPLES.value)
    # The last batch, with indices behind the last image, must fit in int32.
    last = 2**31 - BATCH_SIZE.value
    if indices.stop > last:
        raise UserError(f"--first={FIRST.value} --num_samples={NUM_SAMPLES.value}: indices end at {last - 1}")
    return indices


def _sampler_record(sampling: SamplingConfig, noise_levels: np.ndarray) -> dict[str, Any]:
    churn = {key: getattr(sampling, key) for key in ("s_churn", "s_min", "s_max", "s_noise")}
    return {
        "sampler": {
            "name": sampling.solver,
            "steps": sampling.steps,
            "rho": sampling.rho,
            "guidance_channels": sampling.guidance_channels,
        },
        "noise_levels": noise_levels.tolist(),
        "churn": churn if sampling.solver == "stochastic" else None,
        "guidance": sampling.guidance,
        "guidance_interval": sampling.guidance_interval,
    }


def _classes(num_classes: int) -> np.ndarray:
    """The class label of each row of class_grid.png."""
    if not num_classes:
        raise UserError("--class_grid needs classes, but the network was trained without labels")
    if LABELS.value in ("balanced", "random"):
        return np.linspace(0, num_classes - 1, min(num_classes, 10)).round().astype(np.int32)
    return labels_of(LABELS.value, range(LABELS.value.count(",") + 1), num_classes, SEED.value)


def _environment(model: ModelConfig) -> str:
    device = jax.devices()[0]
    words = [f"{name} {version}" for name, version in versions().items()]
    kernel = f"attention {attention_kernel(model, device, trained=True)}"
    return ", ".join([*words, f"{jax.device_count()} x {device.device_kind}", kernel])


if __name__ == "__main__":
    cli.run(main)

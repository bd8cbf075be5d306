"""Draws samples: python -m sddit_jax.sample --workdir=RUN --output=DIR --num_samples=N.

Writes DIR/samples.npz (`arr_0` uint8 NHWC, `arr_1` int32 labels), DIR/samples.json (how they were made), DIR/grid.png.
Of a model of latents --vae decodes them; without it these are latents.npz (float32, as an autoencoder's decoder takes
them), latents.json, and a grid in false colours.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sddit_jax import cli, process_flags, sharding
from sddit_jax.config import resolve
from sddit_jax.errors import UserError
from sddit_jax.reporting import save_grid
from sddit_jax.runs import open_checkpoints, restore_guide
from sddit_jax.sampling.sampler import balanced_labels, make_generate, make_sample, schedule
from sddit_jax.schema import Parallel, Sampling
from sddit_jax.state import make_parts
from sddit_jax.weights.decoding import load_decode

log = logging.getLogger("sddit_jax")

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run whose EMA weights are used.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to; it is made.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "How many images.", lower_bound=1)
LABELS = flags.DEFINE_string("labels", "balanced", "balanced, random, or class labels such as 3,1,4 that are repeated.")
# Each stands for a key of the run's config.sampling.
DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
SETTINGS = {
    field.name: DEFINE.get(field.type, flags.DEFINE_list)(
        field.name, None, f"{field.metadata['meaning']}. Left out: the run's setting."
    )
    for field in dataclasses.fields(Sampling)
    if field.name not in ("every", "grid")
}
GUIDE = flags.DEFINE_string("guide", None, "Folder of a weaker run, whose EMA weights guide instead of the null label.")
GUIDE_STEP = flags.DEFINE_integer("guide_step", None, "Step of its checkpoint. Left out: the newest that is intact.")
VAE = flags.DEFINE_string(
    "vae", None, "Autoencoder that decodes latents. Left out: the run's setting, which may be none."
)
SEED = flags.DEFINE_integer("seed", 0, "Image i is a function of seed, i and its label.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images computed at a time.", lower_bound=1)
STEP = flags.DEFINE_integer("checkpoint_step", None, "Step of the checkpoint. Left out: the newest that is intact.")
flags.adopt_module_key_flags(process_flags)


def parse_labels(spec: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """int32 [count] from balanced, random or a list. Raises UserError for a label that the model does not have."""
    if spec == "balanced":
        return balanced_labels(count, num_classes)
    if spec == "random":
        return np.random.default_rng(seed).integers(max(num_classes, 1), size=count, dtype=np.int32)
    try:
        labels = [int(label) for label in spec.split(",")]
    except ValueError as error:
        raise UserError(f"--labels={spec} is not balanced, random or numbers such as 3,1,4") from error
    if not num_classes:
        raise UserError(f"--labels={spec}, but the model was trained without labels")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"--labels has {label}, but the model's classes are 0 to {num_classes - 1}")
    return np.resize(np.array(labels, np.int32), count)


def settings() -> dict[str, Any]:
    """The keys of config.sampling that flags set."""
    given = {key: flag.value for key, flag in SETTINGS.items() if flag.value is not None}
    try:
        return {key: [float(v) for v in value] if isinstance(value, list) else value for key, value in given.items()}
    except ValueError as error:
        raise UserError(
            f"--guidance_interval={','.join(given['guidance_interval'])} is not numbers such as 0.3,5"
        ) from error


def main() -> None:
    """Draws what the flags say."""
    if not WORKDIR.value or not OUTPUT.value:
        raise UserError("--workdir=RUN and --output=DIR are needed")
    process_flags.start_processes()
    ema, meta = open_checkpoints(Path(WORKDIR.value).expanduser()).restore_ema(step=STEP.value)
    config = resolve({**meta["config"], "sampling": {**meta["config"]["sampling"], **settings()}}, bool(GUIDE.value))
    label_N = parse_labels(LABELS.value, NUM_SAMPLES.value, config.model.num_classes, SEED.value)

    parts = make_parts(config)
    params, guide, guide_record = ema["default"], None, None
    if GUIDE.value:
        if config.sampling.guidance == 1:
            raise UserError(f"--guide={GUIDE.value} does nothing with a guidance of 1: set --guidance")
        workdir = Path(GUIDE.value).expanduser()
        guide, weaker, guide_meta = restore_guide(workdir, config, meta["codec"], GUIDE_STEP.value)
        params, guide_record = (params, weaker), _origin(GUIDE.value, guide_meta)
    sample = make_sample(parts.network, parts.diffusion, parts.codec, config.sampling, guide)
    mesh = sharding.make_mesh(Parallel())
    generate = make_generate(sample, mesh, min(BATCH_SIZE.value, NUM_SAMPLES.value))
    autoencoder = config.codec.autoencoder if VAE.value is None else VAE.value
    decode = load_decode(autoencoder, meta["codec"], mesh)
    images_NHWC = decode(generate(jax.device_put(params, sharding.replicated(mesh)), SEED.value, label_N))
    if jax.process_index() != 0:
        return

    output = Path(OUTPUT.value).expanduser()
    churn = {key: getattr(config.sampling, key) for key in ("s_churn", "s_min", "s_max", "s_noise")}
    record = {
        **_origin(WORKDIR.value, meta),
        "seed": SEED.value,
        "first_index": 0,
        "count": len(label_N),
        "labels": LABELS.value,
        "sampler": {
            "name": config.sampling.solver,
            "steps": config.sampling.steps,
            "rho": config.sampling.rho,
            "guidance_channels": config.sampling.guidance_channels,
        },
        "noise_levels": schedule(parts.diffusion, config.sampling).tolist(),
        "churn": churn if config.sampling.solver == "stochastic" else None,
        "guidance": config.sampling.guidance,
        "guidance_interval": config.sampling.guidance_interval,
        "guide": guide_record,
        "codec": meta["codec"],
        "autoencoder": autoencoder,
    }
    name = "samples" if images_NHWC.dtype == np.uint8 else "latents"
    try:
        output.mkdir(parents=True, exist_ok=True)
        np.savez(output / f"{name}.npz", arr_0=images_NHWC, arr_1=label_N)
        (output / f"{name}.json").write_text(json.dumps(record, indent=2))
        save_grid(images_NHWC[:100], output / "grid.png")
    except OSError as error:
        raise UserError(f"--output={output} could not be written: {error}") from error
    log.info("%d images of step %d in %s", len(label_N), meta["step"], output)


def _origin(workdir: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Where weights are from."""
    digests = {path: value for path, value in meta["digests"].items() if path.startswith("ema/")}
    return {"workdir": workdir, "checkpoint_step": meta["step"], "checkpoint_digests": digests}


if __name__ == "__main__":
    cli.run(main)

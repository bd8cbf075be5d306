"""Measures what the encoder of a run knows of images: python -m sddit_jax.probe --workdir=RUN.

Computes the encoder's features at several noise levels, under the null label, and the accuracy of k nearest neighbours
and of a linear probe on them, beside the accuracy for the untrained network. Prints a table, and writes DIR/probe.json
(the table and how it was made) and DIR/pca.png: a row of test images, and for each noise level and encoder a row with
the first three principal components of their patch features as colours.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sddit_jax import cli, process_flags
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.errors import UserError
from sddit_jax.evaluation.metrics import PROBE_L2
from sddit_jax.evaluation.representation import (
    NEIGHBOURS,
    STATE_PATHS,
    TEMPERATURE,
    WEIGHTS,
    FeatureExtractor,
    chance,
    load_encoders,
    load_images,
    principal_rows,
    probe,
    probe_table,
    untrained_encoder,
)
from sddit_jax.files import check_output, explained, write_json
from sddit_jax.generation.decoding import load_decode
from sddit_jax.parallel import sharding
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.rows import gather_rows, put_rows
from sddit_jax.runs.folder import weights_record
from sddit_jax.runs.pictures import as_pictures
from sddit_jax.runs.reporting import save_grid

log = logging.getLogger("sddit_jax")

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to; it is made if missing. Left out: WORKDIR/probe.")
SOURCE = flags.DEFINE_string(
    "source", "", "Images to fit probes: digits, folder:PATH, tfds:NAME or latents:PATH. Left out: the run's images."
)
SPLIT = flags.DEFINE_string("split", "", "Split of --source. Left out: train, or for the run's images the run's split.")
TEST_SOURCE = flags.DEFINE_string("test_source", "", "Images to test probes. Left out: as --source.")
TEST_SPLIT = flags.DEFINE_string(
    "test_split", "", "Split of --test_source. Left out: a validation or test split, or a random fifth of --source."
)
NUM_TRAIN = flags.DEFINE_integer("num_train", 50_000, "Largest number of images that fit the probes.", lower_bound=1)
NUM_TEST = flags.DEFINE_integer("num_test", 10_000, "Largest number of images that test the probes.", lower_bound=1)
SIGMAS = flags.DEFINE_string("sigmas", "", "Noise levels such as 0.002,0.5,2. Left out: the lowest one, 0.5 and 2.")
BLOCKS = flags.DEFINE_string("blocks", "last", "Blocks whose outputs are probed: last, all, or numbers from 1, as 3,5.")
ENCODERS = flags.DEFINE_list(
    "weights", [], f"Encoders to probe, of {','.join(WEIGHTS)}. Left out: ema, and teacher if the run has its own."
)
PICTURES = flags.DEFINE_integer("pictures", 8, "Images in pca.png.", lower_bound=1)
VAE = flags.DEFINE_string("vae", None, "Autoencoder that decodes latents for pca.png. Left out: codec.autoencoder.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of images and of their noise.", 0, 2**31 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images in a batch, on each device.", lower_bound=1)
STEP = flags.DEFINE_integer("checkpoint_step", None, "Step of the checkpoint. Left out: the newest intact one.")
flags.adopt_module_key_flags(process_flags)


def parse_sigmas(spec: str, sigma_min: float, sigma_max: float) -> list[float]:
    """The noise levels of a text such as "0.002,0.5"; [sigma_min, 0.5, 2] of "". Raises UserError for any other."""
    if not spec:
        return [sigma_min, 0.5, 2.0]
    return _numbers("sigmas", spec, float, "numbers such as 0.002,0.5,2", "the noise levels", sigma_min, sigma_max)


def parse_blocks(spec: str, depth: int) -> list[int]:
    """The numbers of blocks, from 1, of a text "last", "all" or "3,5". Raises UserError for any other."""
    if spec in ("last", "all"):
        return [depth] if spec == "last" else list(range(1, depth + 1))
    return _numbers("blocks", spec, int, "last, all or numbers such as 3,5", "the encoder's blocks", 1, depth)


def _numbers(flag: str, spec: str, kind: type, right: str, what: str, least: float, most: float) -> list[Any]:
    try:
        numbers = [kind(number) for number in spec.split(",")]
    except ValueError as error:
        raise UserError(f"--{flag}={spec} is not {right}") from error
    for number in numbers:
        if not least <= number <= most:
            raise UserError(f"--{flag} has {number:g}, but {what} are {least:g} to {most:g}")
    return numbers


def main() -> None:
    """Probes the encoders that the flags name."""
    if not WORKDIR.value:
        raise UserError("--workdir=RUN is needed")
    for name in ENCODERS.value:
        if name not in WEIGHTS:
            raise UserError(f"--weights has {name!r}; there are {', '.join(WEIGHTS)}")
    process_flags.start_processes()
    workdir = Path(WORKDIR.value).expanduser()
    # The weights are split over all devices; each block gathers its own.
    mesh = sharding.make_mesh(ParallelConfig(data=1, fsdp=-1))
    config, encoders, meta = load_encoders(workdir, mesh, ENCODERS.value, STEP.value)
    parts = make_parts(config, make_hooks(mesh, config.model, trained=True))
    sigmas = parse_sigmas(SIGMAS.value, parts.diffusion.sigma_min, parts.diffusion.sigma_max)
    blocks = parse_blocks(BLOCKS.value, config.model.depth)
    decode = load_decode(config.codec.autoencoder if VAE.value is None else VAE.value, meta["codec"], mesh)
    output = _output(workdir)
    train, test, data = load_images(
        config,
        meta["codec"],
        source=SOURCE.value,
        split=SPLIT.value,
        test_source=TEST_SOURCE.value,
        test_split=TEST_SPLIT.value,
        num_train=NUM_TRAIN.value,
        num_test=NUM_TEST.value,
        seed=SEED.value,
    )
    features = FeatureExtractor(parts, mesh, SEED.value, BATCH_SIZE.value)
    pictured = test.keep(slice(PICTURES.value))
    x_BHWC = parts.codec.as_stored(parts.codec.expected(pictured.batch))
    images_BHWC = as_pictures(gather_rows(decode(put_rows(mesh, x_BHWC)), len(x_BHWC)))
    rows = probe(features, encoders, untrained_encoder(parts, mesh), train, test, sigmas, blocks)
    components_BHW3 = principal_rows(features, encoders, pictured, sigmas, blocks[-1], images_BHWC.shape[1])
    if jax.process_index() != 0:
        return

    record = {
        **weights_record(WORKDIR.value, meta, tuple(STATE_PATHS[name] for name in encoders)),
        "label": "null",
        "seed": SEED.value,
        "data": data,
        "codec": meta["codec"],
        "latents": "means of the moments" if parts.codec.name == "latents" else None,
        "chance": chance(train, test),
        "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE, "similarity": "cosine"},
        "linear": {"l2_candidates": PROBE_L2, "l2_chosen_on": "the last fifth of the training images"},
        "untrained": {"seed": config.seed},
        "rows": rows,
        "pca": {
            "test_images": pictured.index_n.tolist(),
            "block": blocks[-1],
            "rows": ["image", *(f"{name} at sigma {sigma:g}" for sigma in sigmas for name in encoders)],
        },
    }
    with explained(f"--output={output}", UserError):
        write_json(output / "probe.json", record)
        save_grid(np.concatenate([images_BHWC, components_BHW3]), output / "pca.png", columns=len(images_BHWC))
    _show(record)
    log.info("written to %s; rows of pca.png from the top: %s", output, ", ".join(record["pca"]["rows"]))


def _output(workdir: Path) -> Path:
    """Makes the folder to write to. Raises UserError if it takes no files."""
    output = Path(OUTPUT.value).expanduser() if OUTPUT.value else workdir / "probe"
    with explained(f"--output={output}", UserError):
        output.mkdir(parents=True, exist_ok=True)
    check_output(output / "probe.json")
    return output


def _show(record: Mapping[str, Any]) -> None:
    train, test = record["data"]["train"], record["data"]["test"]
    counts = f"{train['count']:,} images of {train['source']}, tested on {test['count']:,} of {test['source']}"
    print(f"step {record['checkpoint_step']}; fitted on {counts}; chance {record['chance']:.1%}")
    print(*probe_table(record["rows"]), sep="\n")


if __name__ == "__main__":
    cli.run(main)

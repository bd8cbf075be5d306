"""Compares images with a reference: python -m sddit_jax.evaluate --samples=IMAGES --reference=REF.npz --inception=FILE.

Prints FID, sFID, Inception Score, precision, recall and KID, and writes them with all conditions to
IMAGES.evaluation.json. --samples takes an npz file, a folder of images, or a folder that `sample` wrote to. --reference
takes one of ADM's files (VIRTUAL_imagenet256_labeled.npz), images (arr_0), or a file that this command writes:

    python -m sddit_jax.evaluate --source=folder:PATH --resolution=256 --inception=FILE --write_reference=REF.npz

--inception is pt_inception-2015-12-05-6726825d.pth, a release of mseitzer/pytorch-fid on GitHub. --features=pixels
compares the pixels of small images, and needs no weights.
"""

import logging
from pathlib import Path

import jax
from absl import flags

from sddit_jax import cli, process_flags
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data.sources import open_source
from sddit_jax.errors import UserError
from sddit_jax.evaluation.comparison import comparison_table, evaluate, find_samples, full_record
from sddit_jax.evaluation.image_sets import ImageSet, open_image_set, source_image_set
from sddit_jax.evaluation.metric_table import METRICS
from sddit_jax.evaluation.reference import measure_set, open_reference, write_reference
from sddit_jax.evaluation.spaces import SPACES, open_space
from sddit_jax.files import check_output, explained, write_json
from sddit_jax.parallel import sharding

log = logging.getLogger("sddit_jax")

SAMPLES = flags.DEFINE_string("samples", None, "Images to evaluate: an npz file (arr_0) or a folder of image files.")
REFERENCE = flags.DEFINE_string("reference", None, "npz file to compare with: statistics, or images (arr_0).")
INCEPTION = flags.DEFINE_string("inception", "", "File with the weights of Inception, for --features=inception.")
FEATURES = flags.DEFINE_enum("features", "inception", list(SPACES), "What to compare: Inception's features, or pixels.")
CHOSEN = flags.DEFINE_list("metrics", [], f"Metrics to compute, of {','.join(METRICS)}. Left out: all possible ones.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results. Left out: SAMPLES.evaluation.json.")
WRITE = flags.DEFINE_string("write_reference", None, "npz file to write the statistics of --source to.")
SOURCE = flags.DEFINE_string("source", None, "Images for a reference: digits, folder:PATH, tfds:NAME or npz:PATH.")
KEEP = flags.DEFINE_integer(
    "keep_features", 10_000, "Images of --source, evenly spaced, whose features the file keeps, for pr and kid.", 0
)
SPLIT = flags.DEFINE_string("split", "train", "Split of --source; for tfds also a slice, such as train[:10%].")
RESOLUTION = flags.DEFINE_integer("resolution", None, "Side in pixels to which --source is cropped, as by ADM.", 1)
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TensorFlow Datasets download and prepare tfds:NAME.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images in a batch, over all devices.", lower_bound=1)
NUM_THREADS = flags.DEFINE_integer("num_threads", 16, "Threads that read images.", lower_bound=1)
flags.adopt_module_key_flags(process_flags)


def main() -> None:
    """Evaluates --samples, or writes the statistics of --source."""
    evaluating, writing = (SAMPLES.value, REFERENCE.value), (SOURCE.value, WRITE.value)
    if not ((all(evaluating) and not any(writing)) or (all(writing) and not any(evaluating))):
        raise UserError(
            "--samples=IMAGES and --reference=REF.npz are needed, or --source=SOURCE and --write_reference=REF.npz"
        )
    if unknown := set(CHOSEN.value) - set(METRICS):
        raise UserError(f"--metrics has {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}")
    process_flags.start_processes()
    mesh = sharding.make_mesh(ParallelConfig())
    if all(writing):
        _write_reference(mesh)
        return
    path, made = find_samples(SAMPLES.value)
    name = path.name if path.is_dir() else path.stem
    output = Path(OUTPUT.value or path.parent / f"{name}.evaluation.json").expanduser()
    check_output(output)
    images = open_image_set(path, NUM_THREADS.value)
    space = open_space(FEATURES.value, INCEPTION.value, mesh, BATCH_SIZE.value)
    reference = open_reference(REFERENCE.value, space, images.shape, BATCH_SIZE.value, CHOSEN.value or None)
    samples = measure_set(space, images, BATCH_SIZE.value, f"samples {path}", keep=True)
    record = full_record(path, made, samples, reference, space, evaluate(samples, reference, space))
    if jax.process_index() != 0:
        return
    for line in comparison_table(record):
        log.info("%s", line)
    with explained(output, UserError):
        write_json(output, record)
    log.info("written with all conditions: %s", output)


def _write_reference(mesh: jax.sharding.Mesh) -> None:
    images = _source_images()
    space = open_space(FEATURES.value, INCEPTION.value, mesh, BATCH_SIZE.value)
    record = {"source": SOURCE.value}
    if not SOURCE.value.startswith("npz:"):
        record |= {"split": SPLIT.value, "crop": "ADM's center crop"}
    count = write_reference(WRITE.value, space, images, record, BATCH_SIZE.value, KEEP.value)
    log.info("statistics of %s of %d images in %s", space.name, count, WRITE.value)


def _source_images() -> ImageSet:
    kind, _, path = SOURCE.value.partition(":")
    if kind == "npz":
        images = open_image_set(path, NUM_THREADS.value)
        if RESOLUTION.value not in (None, images.shape[1]):
            raise UserError(f"--resolution={RESOLUTION.value}, but {path} has {list(images.shape)}: leave it out")
        return images
    if kind == "latents":
        raise UserError(f"--source={SOURCE.value} has latents, not images; name the images that they were made from")
    resolution = RESOLUTION.value or (8 if kind == "digits" else 0)
    if not resolution:
        raise UserError(f"--source={SOURCE.value} needs --resolution=SIDE, such as 256")
    channels = 1 if kind == "digits" else 3
    source = open_source(
        SOURCE.value, split=SPLIT.value, image_size=resolution, channels=channels, download=DOWNLOAD.value
    )
    return source_image_set(source, NUM_THREADS.value)


if __name__ == "__main__":
    cli.run(main)

"""Evaluates images: python -m sddit_jax.evaluate --samples=DIR/samples.npz --reference=REF.npz --inception=FILE.

FID, sFID, Inception Score, precision, recall and KID, in a table, and in DIR/samples.evaluation.json with every
condition. --samples may be a folder of images, or one that `sample` wrote to; --reference is one of ADM's files
(VIRTUAL_imagenet256_labeled.npz), of images alone (arr_0), or what this command writes from images of any source:

    python -m sddit_jax.evaluate --source=folder:PATH --resolution=256 --inception=FILE --write_reference=REF.npz

--inception is pt_inception-2015-12-05-6726825d.pth of the releases of mseitzer/pytorch-fid on GitHub. --features=pixels
compares small images in pixels, and needs no weights.
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
from sddit_jax.evaluation.feature_spaces import FeatureSpace
from sddit_jax.evaluation.image_sets import ImageSet, open_image_set, source_image_set
from sddit_jax.evaluation.metric_table import METRICS
from sddit_jax.evaluation.reference import measure_set, open_reference, write_reference
from sddit_jax.evaluation.spaces import SPACES, open_space
from sddit_jax.files import check_output, explained, write_json
from sddit_jax.parallel import sharding

log = logging.getLogger("sddit_jax")

SAMPLES = flags.DEFINE_string("samples", None, "Images to evaluate: an npz file (arr_0) or a folder of image files.")
REFERENCE = flags.DEFINE_string("reference", None, "What they are compared with: an npz file of statistics or images.")
INCEPTION = flags.DEFINE_string("inception", "", "File of Inception's weights, for --features=inception.")
FEATURES = flags.DEFINE_enum("features", "inception", list(SPACES), "Of what images are compared in.")
CHOSEN = flags.DEFINE_list("metrics", [], f"Some of {','.join(METRICS)}. Left out: all that are possible.")
OUTPUT = flags.DEFINE_string("output", None, "File for the results. Left out: SAMPLES.evaluation.json.")
WRITE = flags.DEFINE_string("write_reference", None, "File for the statistics of --source; ends in .npz.")
SOURCE = flags.DEFINE_string("source", None, "Images: digits, folder:PATH, tfds:NAME or npz:PATH.")
KEEP = flags.DEFINE_integer(
    "keep_features", 10_000, "Images of --source, evenly chosen, whose features --write_reference keeps.", lower_bound=0
)
SPLIT = flags.DEFINE_string("split", "train", "Which of them; for tfds also a slice, such as train[:10%].")
RESOLUTION = flags.DEFINE_integer("resolution", None, "Side to which images of --source are cropped, as ADM does.", 1)
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TensorFlow Datasets prepare what is missing of tfds:NAME.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images computed at a time, by all devices.", lower_bound=1)
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
        images = _source()
        space = open_space(FEATURES.value, INCEPTION.value, mesh, BATCH_SIZE.value)
        _write_reference(images, space)
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
    log.info("with all conditions: %s", output)


def _source() -> ImageSet:
    kind, _, path = SOURCE.value.partition(":")
    if kind == "npz":
        images = open_image_set(path, NUM_THREADS.value)
        if RESOLUTION.value not in (None, images.shape[1]):
            raise UserError(f"--resolution={RESOLUTION.value}, but {path} has {list(images.shape)}; it is not cropped")
        return images
    if kind == "latents":
        raise UserError(f"--source={SOURCE.value} has latents, not images; name the images that they are of")
    resolution = RESOLUTION.value or (8 if kind == "digits" else 0)
    if not resolution:
        raise UserError(f"--source={SOURCE.value} needs --resolution=SIDE, such as 256")
    source = open_source(
        SOURCE.value,
        split=SPLIT.value,
        image_size=resolution,
        channels=1 if kind == "digits" else 3,
        download=DOWNLOAD.value,
    )
    return source_image_set(source, NUM_THREADS.value)


def _write_reference(images: ImageSet, space: FeatureSpace) -> None:
    record = {"source": SOURCE.value, "split": SPLIT.value, "crop": "ADM's center crop"}
    if SOURCE.value.startswith("npz:"):
        record = {"source": SOURCE.value}
    count = write_reference(WRITE.value, space, images, record, BATCH_SIZE.value, KEEP.value)
    log.info("statistics of %s of %d images in %s", space.name, count, WRITE.value)


if __name__ == "__main__":
    cli.run(main)

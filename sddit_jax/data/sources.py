"""The table of sources, which opens data by a name such as 'folder:PATH'."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from sddit_jax.data.image_sources import SPLIT_NAMES, DigitsSource, FolderSource, Source, TfdsSource, tfds_builder
from sddit_jax.data.latents import LatentsSource
from sddit_jax.errors import DataError


class Asked(NamedTuple):
    """A split, the shape (H, W, C) that the images or latents should have, and the options of `open_source`."""

    split: str
    image_shape: tuple[int, int, int]
    download: bool = False
    in_memory: bool = False
    verify: bool = False


class Kind(NamedTuple):
    """A row of the table.

    form: the name as people write it, such as 'folder:PATH' or 'digits'. `rest` below is the part after the colon.
    open(rest, asked): the source. splits(rest, own): names of splits without images of the split `own`; it may include
    `own`. takes(rest): whether a name with this `rest` is complete; by default `rest` must not be empty.
    """

    form: str
    open: Callable[[str, Asked], Source]
    splits: Callable[[str, str], Collection[str]] = lambda rest, own: ()
    takes: Callable[[str], bool] = bool


def _open_latents(rest: str, asked: Asked) -> LatentsSource:
    if not rest or "://" in rest:
        raise DataError(
            f"data source {f'latents:{rest}'!r}: expected latents:DIR with a local or mounted folder that `python -m "
            "sddit_jax.prepare` wrote; configs/imagenet256.py takes it as data=DIR"
        )
    return LatentsSource(
        Path(rest).expanduser(), asked.split, asked.image_shape, in_memory=asked.in_memory, verify=asked.verify
    )


def _folder_splits(rest: str, own: str) -> Collection[str]:
    path = Path(rest).expanduser()
    # Without a folder for the split `own`, that split has all images.
    return [name for name in SPLIT_NAMES if (path / name).is_dir()] if (path / own).is_dir() else ()


# Adding a source is one class and one row.
SOURCES: Mapping[str, Kind] = {
    "digits": Kind(
        "digits", lambda rest, asked: DigitsSource(asked.split, asked.image_shape), takes=lambda rest: not rest
    ),
    "folder": Kind(
        "folder:PATH",
        lambda rest, asked: FolderSource(Path(rest).expanduser(), asked.split, asked.image_shape),
        _folder_splits,
    ),
    "tfds": Kind(
        "tfds:NAME",
        lambda rest, asked: TfdsSource(rest, asked.split, asked.image_shape, download=asked.download),
        lambda rest, own: tfds_builder(rest, download=False).info.splits,
    ),
    "latents": Kind("latents:PATH", _open_latents, takes=lambda rest: True),
}


def open_source(
    spec: str,
    *,
    split: str,
    image_size: int,
    channels: int,
    download: bool = False,
    in_memory: bool = False,
    verify: bool = False,
) -> Source:
    """Opens a dataset by name.

        source = open_source("folder:photos", split="train", image_size=64, channels=3)
        batch = source.read(np.array([0, 5]), np.array([False, True]))    # record 5 mirrored

    Args:
      spec: one of
        `digits`: scikit-learn's 1,797 handwritten digits, 8x8 grey, all in split 'train';
        `folder:PATH`: PATH/CLASS/**/*.{png,jpg,jpeg,webp}, below PATH/SPLIT if that exists;
          images directly in PATH, without class folders, are a dataset without labels;
        `tfds:NAME`: a TensorFlow Datasets name, in array_record format below TFDS_DATA_DIR; or
          the directory of a prepared one, starting with '/', '.', '~' or 'gs://';
        `latents:PATH`: a folder that `python -m sddit_jax.prepare` has written.
      split: 'train', 'validation', ...; for tfds also slices such as 'train[:10%]'.
      image_size: side of the square images, or of their latents.
      channels: 1 (grey) or 3 (RGB), or the channels of the latents.
      download: lets tfds download and prepare a dataset that is missing.
      in_memory, verify: see `LatentsSource`; other sources ignore them.

    Raises DataError if the dataset cannot be read, or has another split, size or channels.
    """
    kind, _, rest = spec.partition(":")
    row = SOURCES.get(kind)
    if row is None or not row.takes(rest):
        *forms, last = (repr(row.form) for row in SOURCES.values())
        raise DataError(f"data source {spec!r}: expected {', '.join(forms)} or {last}")
    return row.open(rest, Asked(split, (image_size, image_size, channels), download, in_memory, verify))


def held_out_split(spec: str, split: str) -> str | None:
    """A split that has none of the images of `split`, validation before test; None if the dataset has none.

    spec, split: as `open_source` takes them. A folder of latents has one split.
    """
    kind, _, rest = spec.partition(":")
    own = split.partition("[")[0]
    found = SOURCES[kind].splits(rest, own)
    return next((name for name in ("validation", "valid", "val", "test") if name in found and name != own), None)

"""The table of sources: what opens the data that a name such as 'folder:PATH' stands for."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from sddit_jax.data.image_sources import SPLIT_NAMES, DigitsSource, FolderSource, Source, TfdsSource, tfds_builder
from sddit_jax.data.latents import LatentsSource
from sddit_jax.errors import DataError


class Asked(NamedTuple):
    """What is asked of a source: a split, the shape (H, W, C) of its images or latents, and options."""

    split: str
    image_shape: tuple[int, int, int]
    download: bool = False
    in_memory: bool = False
    verify: bool = False


class Kind(NamedTuple):
    """A row of the table.

    form: how its name is written, 'folder:PATH' or 'digits'. open(rest, asked): the source; `rest` stands behind the
    colon. splits(rest, own): the splits that have none of the images of the split `own`. takes(rest): whether the name
    is complete; by default something has to stand behind the colon.
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
    # Without a folder of the split's own, all images are in it.
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

    Args:
      spec: one of
        `digits`: scikit-learn's 1,797 handwritten digits, 8x8 grey, all in split 'train';
        `folder:PATH`: PATH/CLASS/**/*.{png,jpg,jpeg,webp}, below PATH/SPLIT if that exists;
          images directly in PATH, without class folders, are an unconditional dataset;
        `tfds:NAME`: a TensorFlow Datasets name, in array_record format below TFDS_DATA_DIR; or
          the directory of a prepared one, starting with '/', '.', '~' or 'gs://';
        `latents:PATH`: a folder that `python -m sddit_jax.prepare` has written.
      split: 'train', 'validation', ...; for tfds also slices such as 'train[:10%]'.
      image_size: side of the square images, or of their latents.
      channels: 1 (grey) or 3 (RGB), or those of the latents.
      download: lets tfds download and prepare what is missing.
      in_memory, verify: of latents, as `LatentsSource` takes them; other sources have no use for them.

    Raises:
      DataError: the dataset cannot be read as asked; the message says what would be right.
    """
    kind, _, rest = spec.partition(":")
    row = SOURCES.get(kind)
    if row is None or not row.takes(rest):
        *forms, last = (repr(row.form) for row in SOURCES.values())
        raise DataError(f"data source {spec!r}: expected {', '.join(forms)} or {last}")
    return row.open(rest, Asked(split, (image_size, image_size, channels), download, in_memory, verify))


def held_out_split(spec: str, split: str) -> str | None:
    """A split with labels that has none of `split`'s images, if the dataset comes with one: validation before test.

    spec, split: as `open_source` takes them; a folder's splits are its folders. Latents have one split in a folder.
    """
    kind, _, rest = spec.partition(":")
    own = split.partition("[")[0]
    found = SOURCES[kind].splits(rest, own)
    return next((name for name in ("validation", "valid", "val", "test") if name in found and name != own), None)

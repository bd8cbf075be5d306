"""The protocol of sources, which give records by number, and the sources of images."""

import io
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sddit_jax.data.images import BadImageError, read_image
from sddit_jax.errors import DataError

logger = logging.getLogger("sddit_jax")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}

Record = dict[str, Any]
Batch = dict[str, np.ndarray]

# All sources share one lock, since a source that has a lock cannot be pickled.
_bad_files_lock = threading.Lock()


class Source(Protocol):
    """The records that the loader reads. Record i is a pure function of i and the files.

    Attributes:
      name: the data and split, for messages.
      num_classes: 0 for data without labels, where every label is 0.
      class_names: one for each class, in the order of the labels.
      image_shape: (H, W, C) of every image, or (h, w, c) of every image's latents.
      bad_files: files that could not be read so far -> why. Grows while loader threads read.
      codec: the record of the autoencoder that made the latents; None for images.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bad_files: dict[str, str]
    codec: dict[str, Any] | None

    def __len__(self) -> int: ...

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> Batch:
        """The records `indices_b`, int64 [b], mirrored left to right where `mirrored_b`, bool [b], is true.

        Returns new arrays: {image: uint8 [b, H, W, C]; label: int32 [b]; index: int64 [b]}, or for latents, in place
        of image, moments: float16 [b, 2 (mean, std), h, w, c].
        """
        ...


class ImageSource(ABC):
    """A `Source` that replaces a bad image by the next good image in the order of the records.

    The record then has the label and the `index` of the replacement. So a record depends on the files alone, not on
    what was read before it.
    """

    def __init__(self, name: str, class_names: tuple[str, ...], image_shape: tuple[int, int, int]) -> None:
        size, _, channels = image_shape
        if size < 1 or channels not in (1, 3):
            raise DataError(f"image_size={size}, channels={channels}: expected a positive size and 1 or 3")
        self.name = name
        self.num_classes = len(class_names)
        self.class_names = class_names
        self.image_shape = image_shape
        self.bad_files: dict[str, str] = {}
        self.codec = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of records, bad images included."""

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Returns (image uint8 [H, W, C], label), or raises BadImageError."""

    def _locate(self, index: int) -> str:
        return f"{self.name} record {index}"

    def __getitem__(self, index: int) -> Record:
        """Returns {image: uint8 [H, W, C], label: int32 scalar, index: int64 scalar}.

        Raises IndexError for no such record, and DataError if no image of the dataset can be read.
        """
        first = range(len(self))[index]
        for offset in range(len(self)):
            actual = (first + offset) % len(self)
            try:
                image_HWC, label = self._read(actual)
            except BadImageError as error:
                self._report(self._locate(actual), str(error))
            else:
                return {"image": image_HWC, "label": np.int32(label), "index": np.int64(actual)}
        where = self._locate(first)
        raise DataError(f"{self.name}: not one of {len(self)} images can be read; {where}: {self.bad_files[where]}")

    def load(self, index: int) -> tuple[np.ndarray, int]:
        """Returns (image uint8 [H, W, C], label) of this record, without a replacement. Raises BadImageError."""
        return self._read(index)

    def locate(self, index: int) -> str:
        """A path or name by which a person finds the record."""
        return self._locate(index)

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> Batch:
        """See `Source.read`. Raises as `__getitem__`."""
        records = [self[index] for index in indices_b.tolist()]
        batch = {key: np.stack([record[key] for record in records]) for key in records[0]}
        batch["image"][mirrored_b] = batch["image"][mirrored_b, :, ::-1]
        return batch

    def _report(self, where: str, reason: str) -> None:
        with _bad_files_lock:
            known = where in self.bad_files
            self.bad_files[where] = reason
        if not known:
            logger.warning("skipping %s: %s", where, reason)


class DigitsSource(ImageSource):
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes."""

    def __init__(self, split: str, image_shape: tuple[int, int, int]) -> None:
        if split != "train":
            raise DataError(f"digits: no split {split!r}; all digits are in the split 'train'")
        if image_shape != (8, 8, 1):
            size, _, channels = image_shape
            raise DataError(f"digits: image_size={size}, channels={channels}; they should be image_size=8, channels=1")
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        super().__init__("digits[train]", tuple(map(str, digits.target_names)), image_shape)
        self._images_NHWC = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self._labels_N = digits.target

    def __len__(self) -> int:
        return len(self._labels_N)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        return self._images_NHWC[index], self._labels_N[index]


class FolderSource(ImageSource):
    """Image files in class folders. Classes and files are in sorted order, without hidden ones."""

    def __init__(self, path: Path, split: str, image_shape: tuple[int, int, int]) -> None:
        if "[" in split:
            raise DataError(f"folder {path}: no split {split!r}; only tfds has slices")
        try:
            root = path / split if (path / split).is_dir() else path
            if not root.is_dir():
                raise DataError(f"folder {path}: not a folder")
            class_names, self._files, self._labels_N = _list_folder(root)
        except OSError as error:
            raise DataError(f"folder {path}: cannot be listed: {error}") from error
        super().__init__(f"folder:{root}", class_names, image_shape)

    def __len__(self) -> int:
        return len(self._files)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        size, _, channels = self.image_shape
        return read_image(self._files[index], size=size, channels=channels), self._labels_N[index]

    def _locate(self, index: int) -> str:
        return self._files[index]


class TfdsSource(ImageSource):
    """A TensorFlow Datasets dataset, read without TensorFlow.

    Images are decoded here, since tfds decodes with OpenCV if it is installed and with Pillow otherwise: the pixels
    would depend on the machine.
    """

    def __init__(self, name: str, split: str, image_shape: tuple[int, int, int], *, download: bool) -> None:
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        builder = tfds_builder(name, download)
        features = dict(builder.info.features.items())
        image = features.get("image")
        if not isinstance(image, tfds.features.Image) or image.np_dtype == np.float32:
            raise DataError(f"tfds:{name}: no 'image' feature of integers; its features are {list(features)}")
        label = features.get("label")
        class_names = label.names if isinstance(label, tfds.features.ClassLabel) else []
        try:
            self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        # KeyError and ValueError mean no such split, NotImplementedError a dataset prepared as TFRecord.
        except (KeyError, ValueError, NotImplementedError) as error:
            if builder.info.splits:
                raise DataError(f"tfds:{name}, split {split!r}: {error}") from error
            raise DataError(
                f"tfds:{name} is not prepared in {builder.data_dir}: set TFDS_DATA_DIR to the folder that has it, or "
                "let it be downloaded (data.download, or --download of prepare), or prepare it with "
                f"tensorflow_datasets: tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
            ) from error
        super().__init__(f"tfds:{name}[{split}]", tuple(class_names), image_shape)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        try:
            record = self._records[index]
        except RuntimeError as error:  # A damaged or missing shard has many records, so none of them is replaced.
            raise DataError(f"{self._locate(index)}: {error}; prepare the data again") from error
        label = record["label"] if self.num_classes else 0
        if label < 0:  # tfds has the label -1 where labels are secret.
            raise DataError(f"{self._locate(index)} has no label: choose another split")
        size, _, channels = self.image_shape
        return read_image(io.BytesIO(record["image"]), size=size, channels=channels), label


def _list_folder(root: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """The class names of a folder, the paths of its N images, and their labels int32 [N]."""
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    classes = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    loose = any(entry.name.lower().endswith(SUFFIXES) and entry.is_file() for entry in visible)
    if classes and loose:
        raise DataError(f"folder {root}: images beside class folders {few(classes)}")
    if classes and SPLIT_NAMES.issuperset(classes):
        raise DataError(f"folder {root}: choose one of the splits {few(classes)}")
    files_of_class = [sorted(_walk_images(root / name)) for name in classes or ("",)]
    files = [file for files in files_of_class for file in files]
    if not files:
        raise DataError(f"folder {root}: no images ({', '.join(SUFFIXES)}) in it")
    counts = [len(files) for files in files_of_class]
    if 0 in counts:  # Keeping an empty class would waste a label, and dropping it would renumber the others.
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        raise DataError(f"folder {root}: no images in class folders {few(empty)}")
    return classes, files, np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _walk_images(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:  # By default os.walk skips unreadable folders.
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def few(items: Iterable[Any]) -> str:
    """The first five items, for a message."""
    names = [str(item) for item in items]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def tfds_builder(name: str, download: bool) -> Any:
    """The tfds.core.DatasetBuilder of a name or of a prepared directory. Raises DataError."""
    import tensorflow_datasets as tfds

    if name.startswith(("/", ".", "~")) or "://" in name:
        try:
            return tfds.builder_from_directory(os.path.expanduser(name))
        except OSError as error:
            raise DataError(f"tfds:{name}: not a prepared dataset: {error}") from error
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError) as error:  # The name, config or version is unknown.
        # After the first line tfds lists all datasets.
        raise DataError(f"tfds:{name}: {str(error).strip().splitlines()[0]}") from error
    if download:
        try:
            builder.download_and_prepare()
        except AssertionError as error:  # The user has to download the files, as for ImageNet.
            raise DataError(f"tfds:{name}: {error}") from error
    return builder

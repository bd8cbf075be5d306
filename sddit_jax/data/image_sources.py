"""What a source of images is, and those that read images: random access to (image, label) by record number."""

import io
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
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

# One lock for all sources: a lock inside a source could not be pickled.
_bad_files_lock = threading.Lock()


class Source(Protocol):
    """What the loader reads: record i is a pure function of i and the files.

    Attributes:
      name: the data and split, for logs.
      num_classes: 0 means unconditional; every label is then 0.
      class_names: one per class, in label order.
      image_shape: (H, W, C) of every image, or of its latents.
      bad_files: what could not be read so far -> why. Grows while loader threads read.
      codec: of latents, the record of the autoencoder; None of images.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bad_files: dict[str, str]
    codec: dict[str, Any] | None

    def __len__(self) -> int: ...

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> Batch:
        """The records of numbers int64 [b], those that bool [b] marks mirrored left to right.

        Returns arrays of the caller's own: {image: uint8 [b, H, W, C], or, of latents, moments: float16
        [b, 2, H, W, C], mean and standard deviation; label: int32 [b]; index: int64 [b]}.
        """
        ...


class ImageSource(ABC):
    """A `Source` in which a bad image is replaced by the next good one, in record order.

    The replacement's own number is the record's `index`, and its label goes with it. So a record
    depends on the files alone, not on what was read before or by whom.
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
        """Number of records, bad ones included."""

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Returns (image uint8 [H, W, C], label), or raises BadImageError."""

    @abstractmethod
    def _locate(self, index: int) -> str:
        """What a person would look for to find the record."""

    def __getitem__(self, index: int) -> Record:
        """Returns {image: uint8 [H, W, C], label: int32 scalar, index: int64 scalar}.

        Raises:
          IndexError: no such record.
          DataError: not one image of the dataset can be read.
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
        """Returns (image uint8 [H, W, C], label) of this record and no other. Raises BadImageError."""
        return self._read(index)

    def locate(self, index: int) -> str:
        """What a person would look for to find the record."""
        return self._locate(index)

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> Batch:
        """{image: uint8 [b, H, W, C], label: int32 [b], index: int64 [b]} of these records, mirrored where so marked.

        Raises as `__getitem__`.
        """
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
            raise DataError(f"digits: no split {split!r}; all of them are 'train'")
        if image_shape != (8, 8, 1):
            raise DataError(
                f"digits: image_size={image_shape[0]}, channels={image_shape[2]}; "
                "the images are image_size=8, channels=1"
            )
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        super().__init__("digits[train]", tuple(map(str, digits.target_names)), image_shape)
        self._images_NHWC = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self._labels_N = digits.target

    def __len__(self) -> int:
        return len(self._labels_N)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        return self._images_NHWC[index], self._labels_N[index]

    def _locate(self, index: int) -> str:
        return f"{self.name} record {index}"


class FolderSource(ImageSource):
    """Class folders of image files; classes and files in sorted order, hidden ones left out."""

    def __init__(self, path: Path, split: str, image_shape: tuple[int, int, int]) -> None:
        if "[" in split:
            raise DataError(f"folder {path}: no split {split!r}; slices are for tfds only")
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

    Its encoded images are decoded here like any file, because tfds decodes with OpenCV where that
    is installed and with Pillow where not: the pixels would depend on the machine.
    """

    def __init__(self, name: str, split: str, image_shape: tuple[int, int, int], *, download: bool) -> None:
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        builder = tfds_builder(name, download)
        features = dict(builder.info.features.items())
        image = features.get("image")
        if not isinstance(image, tfds.features.Image) or image.np_dtype == np.float32:
            raise DataError(f"tfds:{name}: no 'image' feature of integers, only {list(features)}")
        label = features.get("label")
        class_names = label.names if isinstance(label, tfds.features.ClassLabel) else []
        try:
            self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        # KeyError, ValueError: no such split; NotImplementedError: prepared as TFRecord.
        except (KeyError, ValueError, NotImplementedError) as error:
            if builder.info.splits:
                raise DataError(f"tfds:{name}, split {split!r}: {error}") from error
            raise DataError(
                f"tfds:{name} is not prepared in {builder.data_dir}: set TFDS_DATA_DIR to where "
                "it is, or let it be downloaded (data.download, or --download of prepare), or prepare it with "
                "tensorflow_datasets: "
                f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
            ) from error
        super().__init__(f"tfds:{name}[{split}]", tuple(class_names), image_shape)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        try:
            record = self._records[index]
        except RuntimeError as error:  # A damaged or missing shard is many records, not one image.
            raise DataError(f"{self._locate(index)}: {error}; prepare the data again") from error
        label = record["label"] if self.num_classes else 0
        if label < 0:  # How tfds marks the records of a split whose labels are secret.
            raise DataError(f"{self._locate(index)} has no label: choose another split")
        size, _, channels = self.image_shape
        return read_image(io.BytesIO(record["image"]), size=size, channels=channels), label

    def _locate(self, index: int) -> str:
        return f"{self.name} record {index}"


def _list_folder(root: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Returns class names, image paths and labels int32 [N] of a folder."""
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    classes = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    loose = any(entry.name.lower().endswith(SUFFIXES) and entry.is_file() for entry in visible)
    if classes and loose:
        raise DataError(f"folder {root}: images beside class folders {_few(classes)}")
    if classes and SPLIT_NAMES.issuperset(classes):
        raise DataError(f"folder {root}: choose one of the splits {_few(classes)}")
    files_of_class = [sorted(_walk_images(root / name)) for name in classes or ("",)]
    files = [file for files in files_of_class for file in files]
    if not files:
        raise DataError(f"folder {root}: no images ({', '.join(SUFFIXES)}) in it")
    counts = [len(files) for files in files_of_class]
    if 0 in counts:  # Keeping it would waste a class, dropping it would renumber the others.
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        raise DataError(f"folder {root}: no images in class folders {_few(empty)}")
    return classes, files, np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _walk_images(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:  # os.walk would pass over an unreadable folder in silence
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _few(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def tfds_builder(name: str, download: bool) -> Any:
    """Returns the tfds.core.DatasetBuilder of a name or of a prepared directory."""
    import tensorflow_datasets as tfds

    if name.startswith(("/", ".", "~")) or "://" in name:
        try:
            return tfds.builder_from_directory(os.path.expanduser(name))
        except OSError as error:
            raise DataError(f"tfds:{name}: not a prepared dataset: {error}") from error
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError) as error:  # Unknown names, configs and versions.
        # The first line says which; the rest lists every dataset that there is.
        raise DataError(f"tfds:{name}: {str(error).strip().splitlines()[0]}") from error
    if download:
        try:
            builder.download_and_prepare()
        except AssertionError as error:  # Files that tfds may not fetch by itself, as ImageNet's.
            raise DataError(f"tfds:{name}: {error}") from error
    return builder

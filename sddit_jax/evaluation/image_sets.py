"""Images to evaluate, batch by batch in a fixed order: of an npz file, of a folder, or of a source of training data."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sddit_jax.ahead import read_ahead
from sddit_jax.data.image_sources import FolderSource, ImageSource
from sddit_jax.data.images import FORMATS, BadImageError, read_image
from sddit_jax.errors import DataError
from sddit_jax.evaluation.reference_files import NpzImages, open_evaluation_file

log = logging.getLogger("sddit_jax")


class LoadedImages(NamedTuple):
    """Images that threads read ahead.

    shape: [N, H, W, C]; N also counts the images that are left out. load(i) -> image i, or None to leave it out.
    """

    shape: tuple[int, int, int, int]
    load: Callable[[int], np.ndarray | None]
    num_threads: int

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [size, H, W, C] in the order of i; the last batch may be smaller. Raises what `load` raises."""
        with ThreadPoolExecutor(self.num_threads) as pool:
            read = read_ahead(pool, self.load, range(self.shape[0]), ahead=2 * size)
            images = (image for image in read if image is not None)
            while batch := list(itertools.islice(images, size)):
                yield np.stack(batch)


ImageSet = NpzImages | LoadedImages


def open_image_set(path: str | os.PathLike[str], num_threads: int = 16) -> ImageSet:
    """The images of an npz file (arr_0), or of a folder of image files of one size.

    Raises DataError: there are no images, they cannot be read, or they have different sizes.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, num_threads)
    if not path.exists():
        raise DataError(f"{path} does not exist; it should be an npz file or a folder of images")
    images = open_evaluation_file(path, None).images
    if images is None:
        raise DataError(f"{path} has no images (arr_0)")
    return images


def source_image_set(source: ImageSource, num_threads: int = 16) -> LoadedImages:
    """All images of a source of training data. An image that cannot be read is left out with a warning."""

    def load(number: int) -> np.ndarray | None:
        try:
            return source.load(number)[0]
        except BadImageError as error:
            log.warning("an image is left out: %s: %s", source.locate(number), error)
            return None

    return LoadedImages((len(source), *source.image_shape), load, num_threads)


def _open_folder(path: Path, num_threads: int) -> LoadedImages:
    # The source only lists the files: its image shape crops nothing.
    files = FolderSource(path, "", (1, 1, 3))
    height, width, channels = _shape_of(files.locate(0))
    if height != width:
        raise DataError(f"{files.locate(0)} is {width}x{height}; images in a folder should be square")

    def load(number: int) -> np.ndarray:
        file = files.locate(number)
        shape = _shape_of(file)
        if shape != (height, width, channels):
            raise DataError(
                f"{file} is {list(shape)}, but {files.locate(0)} {[height, width, channels]} (height, width, "
                "channels); all images should have one shape"
            )
        try:
            return read_image(file, size=height, channels=channels)
        except BadImageError as error:
            raise DataError(f"{file}: {error}") from error

    return LoadedImages((len(files), height, width, channels), load, num_threads)


def _shape_of(file: str) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3), from the file's header."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            grey = image.mode in ("1", "L") or image.mode.startswith("I")
            return image.height, image.width, 1 if grey else 3
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error

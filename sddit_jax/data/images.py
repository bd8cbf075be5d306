"""One image file -> one square uint8 array, prepared as ADM does (Dhariwal and Nichol, 2021)."""

import struct
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Only these decoders ever see a file, whatever its suffix says: Pillow's others are larger targets.
FORMATS = ("PNG", "JPEG", "WEBP")

# The longer side grows with the shorter one, so a thin enough image is a decompression bomb.
MAX_ASPECT = 100

# Pillow has no error of its own for a damaged file: truncated and unreadable ones are OSError, a
# broken PNG chunk is SyntaxError, impossible headers are ValueError, damaged EXIF struct.error.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class BadImageError(Exception):
    """A file that is not a usable image; the message is the reason."""


def read_image(file: str | PathLike[str] | BinaryIO, *, size: int, channels: int) -> np.ndarray:
    """Decodes a PNG, JPEG or WebP file to uint8 [size, size, channels], upright and opaque.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey keeps its high byte
    (as Pillow itself does with 16-bit RGB), and everything becomes grey (1 channel) or RGB (3).

    Raises:
      BadImageError: not such a file, damaged, unreadable, a decompression bomb, or too thin.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            opaque = _opaque(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    except UnidentifiedImageError:
        raise BadImageError("not a PNG, JPEG or WebP image") from None
    except _DECODER_ERRORS as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    return np.array(center_crop(opaque, size)).reshape(size, size, channels)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` and keeps the central size x size square, as ADM does.

    Bicubic filtering alone would alias a large reduction, so the image is first halved with a box
    filter for as long as its shorter side stays at or above `size`.

    Raises:
      BadImageError: the longer side is more than `MAX_ASPECT` times the shorter one.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImageError(f"{image.width}x{image.height} is thinner than 1:{MAX_ASPECT}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)

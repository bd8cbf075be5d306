"""Reads an image file as a square uint8 array, cropped as ADM does (Dhariwal & Nichol 2021)."""

import struct
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Only these decoders see a file, whatever its suffix says: Pillow's other decoders are easier to attack.
FORMATS = ("PNG", "JPEG", "WEBP")

# Scaling the shorter side of a very thin image to `size` would make the longer side huge.
MAX_ASPECT = 100

# Pillow has no error of its own for a damaged file. It raises OSError for a truncated or unreadable one, SyntaxError
# for a broken PNG chunk, ValueError for an impossible header, and struct.error for damaged EXIF.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class BadImageError(Exception):
    """A file that is not a usable image. The message is the reason."""


def read_image(file: str | PathLike[str] | BinaryIO, *, size: int, channels: int) -> np.ndarray:
    """Decodes a PNG, JPEG or WebP file to uint8 [size, size, channels], grey (1 channel) or RGB (3).

    EXIF orientation is applied, transparent pixels are laid over white, and 16-bit grey keeps its high byte, as Pillow
    does with 16-bit RGB.

    Raises BadImageError: the file has another format, is damaged or unreadable, is a decompression bomb, or too thin.
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
    """Scales the shorter side to `size` and keeps the central square, as ADM does.

    A bicubic filter alone would alias a large reduction, so the image is first halved with a box filter while its
    shorter side stays at or above `size`.

    Raises BadImageError if the longer side is more than `MAX_ASPECT` times the shorter one.
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
    if image.mode.startswith("I"):  # Pillow's conversion of 16-bit grey would clip at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)

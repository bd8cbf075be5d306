"""Grids of images, and latents and features as colours. Pure functions of numpy arrays."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def grid(images_BHWC: np.ndarray, columns: int | None = None, scale: int = 1, gap: int = 1) -> np.ndarray:
    """uint8 images side by side on black, row by row, each pixel enlarged `scale` times: uint8 [H', W', C]."""
    batch, height, width, channels = images_BHWC.shape
    columns = columns or math.ceil(math.sqrt(batch))
    rows = math.ceil(batch / columns)
    cells = np.zeros((rows * columns, height * scale + gap, width * scale + gap, channels), np.uint8)
    cells[:batch, gap:, gap:] = images_BHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    bands = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    canvas = bands.reshape(rows * cells.shape[1], columns * cells.shape[2], channels)
    return np.pad(canvas, ((0, gap), (0, gap), (0, 0)))


def labelled_grid(
    images_RCHWC: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: str = "", scale: int = 1
) -> np.ndarray:
    """A `grid` with the names of its rows on the left and of its columns above, white on black: uint8 [H', W', C]."""
    height, width, channels = images_RCHWC.shape[2:]
    gap = 4
    cells = grid(images_RCHWC.reshape(-1, height, width, channels), len(columns), scale, gap)
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin, line = 4, 12
    left = math.ceil(max(draw.textlength(name) for name in (*rows, corner))) + 2 * margin
    top = line + 2 * margin
    words = Image.new("L", (left + cells.shape[1], top + cells.shape[0]))
    draw = ImageDraw.Draw(words)
    draw.text((left - margin, top / 2), corner, 255, anchor="rm")
    for number, name in enumerate(columns):
        draw.text((left + gap / 2 + (number + 0.5) * (width * scale + gap), top / 2), name, 255, anchor="mm")
    for number, name in enumerate(rows):
        draw.text((left - margin, top + gap / 2 + (number + 0.5) * (height * scale + gap)), name, 255, anchor="rm")
    canvas = np.repeat(np.asarray(words)[..., None], channels, axis=-1)
    canvas[top:, left:] = cells
    return canvas


def false_colours(images_BHWC: np.ndarray) -> np.ndarray:
    """Makes latents visible: their first three channels (one, if there are fewer), grey at 0: uint8 [B, H, W, 3 or 1].

    uint8 images are returned as they are.
    """
    if images_BHWC.dtype == np.uint8:
        return images_BHWC
    shown = images_BHWC[..., : 3 if images_BHWC.shape[-1] >= 3 else 1]
    largest = 3 * max(float(shown.std()), 1e-12)
    return np.clip(128 + 128 * shown / largest, 0, 255).astype(np.uint8)


def as_pictures(images_BHWC: np.ndarray) -> np.ndarray:
    """uint8 images, grey or in colour, or latents in false colours, as uint8 [B, H, W, 3]."""
    images_BHWC = false_colours(images_BHWC)
    return np.broadcast_to(images_BHWC, (*images_BHWC.shape[:-1], 3))


def principal_pictures(features_BND: np.ndarray, size: int) -> np.ndarray:
    """The first three principal components of patch features as red, green and blue: uint8 [B, size, size, 3].

    The N patches of an image are a square grid in raster order. The components are computed over the patches of all
    images together. Each is scaled from 0 at its lowest patch to 255 at its highest, with the sign that makes the patch
    furthest from the mean bright. At least 3 patches and 3 features are needed.
    """
    batch, patches, width = features_BND.shape
    x_TD = features_BND.reshape(-1, width).astype(np.float64)
    u_TK, s_K, _ = np.linalg.svd(x_TD - x_TD.mean(axis=0), full_matrices=False)
    score_T3 = u_TK[:, :3] * s_K[:3]
    furthest = np.abs(score_T3).argmax(axis=0)
    score_T3 = score_T3 * np.sign(score_T3[furthest, np.arange(3)])
    low, high = score_T3.min(axis=0), score_T3.max(axis=0)
    # A component of rounding errors stays dark.
    spread = np.maximum(high - low, max(1e-6 * (high - low).max(), 1e-30))
    colours_T3 = np.rint(255 * (score_T3 - low) / spread).astype(np.uint8)
    side = math.isqrt(patches)
    patch_of_pixel = np.arange(size) * side // size
    return colours_T3.reshape(batch, side, side, 3)[:, patch_of_pixel][:, :, patch_of_pixel]

"""Pictures of images."""

import math

import numpy as np


def grid(images_BHWC: np.ndarray, columns: int | None = None, scale: int = 1, gap: int = 1) -> np.ndarray:
    """uint8 images side by side on black, row by row, each pixel `scale` times enlarged: uint8 [H', W', C]."""
    batch, height, width, channels = images_BHWC.shape
    columns = columns or math.ceil(math.sqrt(batch))
    rows = math.ceil(batch / columns)
    large = images_BHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    canvas = np.zeros((rows * cell_h + gap, columns * cell_w + gap, channels), np.uint8)
    for i, image in enumerate(large):
        y, x = gap + (i // columns) * cell_h, gap + (i % columns) * cell_w
        canvas[y : y + height * scale, x : x + width * scale] = image
    return canvas


def false_colours(latents_BHWC: np.ndarray) -> np.ndarray:
    """Latents as pictures: their first three channels (one, if there are fewer), grey at 0: uint8 [B, H, W, 3 or 1]."""
    shown = latents_BHWC[..., : 3 if latents_BHWC.shape[-1] >= 3 else 1]
    largest = 3 * max(float(shown.std()), 1e-12)
    return np.clip(128 + 128 * shown / largest, 0, 255).astype(np.uint8)

import numpy as np

from sddit_jax.images import grid


def test_grid_by_hand():
    images = np.array([1, 2, 3], np.uint8).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(grid(images, gap=0)[..., 0], [[1, 2], [3, 0]])
    expected = [[0, 0, 0, 0, 0], [0, 1, 0, 2, 0], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(grid(images)[..., 0], expected)
    np.testing.assert_array_equal(grid(images, columns=3, scale=2, gap=0)[..., 0], [[1, 1, 2, 2, 3, 3]] * 2)


def test_grid_keeps_pixels_and_channels():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    canvas = grid(images, columns=3, gap=2)
    assert canvas.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert canvas.dtype == np.uint8
    np.testing.assert_array_equal(canvas[2:6, 10:16], images[1])
    np.testing.assert_array_equal(canvas[8:12, 2:8], images[3])
    assert canvas.sum() == images.sum()

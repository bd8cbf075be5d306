import numpy as np

from sddit_jax.images import grid, labelled_grid


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


def test_a_labelled_grid_is_the_grid_beside_its_names():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    canvas = labelled_grid(images, ["a", "long name"], ["0.5", "1", "2"], "sigma", scale=2)
    cells = grid(images.reshape(6, 16, 16, 3), columns=3, scale=2, gap=4)
    top, left = np.array(canvas.shape[:2]) - cells.shape[:2]
    np.testing.assert_array_equal(canvas[top:, left:], cells)
    for columns in np.split(canvas[:top, left + 4 :], 3, axis=1):
        assert columns.max() > 150
    for rows in np.split(canvas[top + 4 :, :left], 2):
        assert rows.max() > 150
    assert canvas[:top, :left].max() > 150
    assert not canvas[0].any()
    assert not canvas[:, 0].any()

import numpy as np

from sddit_jax.runs.pictures import as_pictures, grid, labelled_grid, principal_pictures


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


def components(seed=0, images=5, side=4, width=12):
    """Features whose components are known scores along orthogonal axes of falling spread, with a large mean."""
    rng = np.random.default_rng(seed)
    scores = np.linalg.qr(rng.normal(size=(images * side**2, 6)) - [10.0, 0, 0, 0, 0, 0])[0][:, 1:]
    scores -= scores.mean(axis=0)
    scores = np.linalg.qr(scores)[0] * [16.0, 8, 4, 0.1, 0.1]
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0][:5]
    return scores, (scores @ axes + rng.normal(size=width)).reshape(images, side**2, width)


def test_colours_are_the_principal_components():
    scores, features = components()
    expected = scores[:, :3] * np.sign(scores[np.abs(scores[:, :3]).argmax(axis=0), [0, 1, 2]])
    expected = 255 * (expected - expected.min(axis=0)) / np.ptp(expected, axis=0)
    colours = principal_pictures(features, 4)
    assert colours.dtype == np.uint8
    np.testing.assert_allclose(colours.reshape(-1, 3), expected, atol=0.51)


def test_colours_do_not_depend_on_the_basis_of_the_features():
    _, features = components()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    turned = principal_pictures(-3 * features @ rotation + 7, 4)
    np.testing.assert_allclose(turned, principal_pictures(features, 4).astype(int), atol=1)


def test_patches_are_enlarged_in_raster_order():
    _, features = components(images=2, side=2)
    small, large = (principal_pictures(features, size) for size in (2, 6))
    np.testing.assert_array_equal(large, small.repeat(3, axis=1).repeat(3, axis=2))
    # Features of rank 1 have one colour.
    line = np.arange(8.0).reshape(2, 4, 1) * np.ones(5)
    assert principal_pictures(line, 2)[..., 0].max() == 255
    assert not principal_pictures(line, 2)[..., 1:].any()


def test_pictures_have_three_channels():
    grey = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    np.testing.assert_array_equal(as_pictures(grey), grey.repeat(3, axis=3))
    assert as_pictures(np.zeros((1, 2, 2, 4), np.float32)).shape == (1, 2, 2, 3)

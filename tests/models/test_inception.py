import numpy as np
import pytest
import torch
from inceptions import import_torch_fidelity, random_state_dict

from sddit_jax.errors import DataError
from sddit_jax.models.inception import features, resize
from sddit_jax.weights.inception import load_inception

SIZES = [(32, 32), (64, 64), (256, 256), (299, 299), (512, 512), (40, 333)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-random.pth"
    torch.save(random_state_dict(), path)
    return path


@pytest.fixture(scope="module")
def params(saved):
    return load_inception(saved).params


@pytest.fixture(scope="module")
def peer(saved):
    """Images -> torch-fidelity's pool features, the sFID features, logits, and logits without the bias."""
    module = import_torch_fidelity()
    network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased", "logits"], str(saved))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))

    def compute(images_BHWC):
        pool, unbiased, logits = network(torch.from_numpy(images_BHWC.transpose(0, 3, 1, 2)))
        spatial_BHWC = spatial.pop().numpy().transpose(0, 2, 3, 1)[..., :7]
        return {
            "pool_BD": pool.numpy(),
            "spatial_BD": spatial_BHWC.reshape(len(images_BHWC), -1),
            "logits_BK": logits.numpy(),
            "unbiased_logits_BK": unbiased.numpy(),
        }

    return compute


def make_images(height, width):
    """Noise, a smooth picture, and two greys with an edge: resizing shows in each in another way."""
    rng = np.random.default_rng(height + width)
    noise = rng.integers(0, 256, (height, width, 3))
    smooth = 127.5 + 127.5 * np.sin(np.add.outer(np.linspace(0, 9, height), np.linspace(0, 4, width)))
    edge = np.where(np.arange(width)[None, :, None] > width // 3, 255, 0) * np.ones((height, 1, 3))
    return np.stack([noise, smooth[..., None] * np.array([1, 0.7, 0.3]), edge]).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_features_are_those_of_torch_fidelity(params, peer, height, width):
    images = make_images(height, width)
    expected = peer(images)
    found = features(params, images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        # Neither dead nor exploded, or nothing would be compared.
        assert 0.01 < np.abs(value).mean() < 100
        error = np.linalg.norm(found[name] - value, axis=1) / np.linalg.norm(value, axis=1)
        assert error.max() < 1e-5
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("size", [1, 2, 32, 150, 299, 512])
def test_resize_reads_pixel_i_at_i_times_the_ratio(size):
    ramp = np.arange(size, dtype=np.float32)
    position = np.minimum(np.arange(299) * size / 299, size - 1)
    images = np.stack([np.tile(ramp[:, None, None], (1, 7, 2)), np.tile(ramp[:, None, None], (1, 7, 2)) ** 2])
    ramps, squares = np.asarray(resize(images))
    np.testing.assert_allclose(ramps, np.broadcast_to(position[:, None, None], (299, 299, 2)), atol=1e-4)
    # Between two pixels there is a line, whatever lies further off.
    low = np.floor(position)
    chord = low**2 + (position - low) * (2 * low + 1)
    np.testing.assert_allclose(squares[:, 5, 0], chord, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(resize(images.swapaxes(1, 2)), np.stack([ramps, squares]).swapaxes(1, 2), rtol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.int32),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 0, 32, 3), np.uint8),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(DataError, match=r"images are .*Inception takes uint8 \[B, H, W, 3\]"):
        features({}, images)

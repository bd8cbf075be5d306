import jax
import numpy as np
import pytest

from sddit_jax.errors import DataError
from sddit_jax.method.codec import LatentCodec, PixelCodec, check_codec


@pytest.mark.parametrize(
    ("mean", "scale"),
    [
        ((0.0,), (1.0,)),
        ((0.0,), (0.5,)),
        ((-0.39,), (0.6631,)),
        ((0.1, -0.2, 0.3), (0.01, 1.0, 37.0)),
        ((0.9, -0.9, 0.0), (0.91,)),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_decode_inverts_encode_for_every_pixel_value(mean, scale, wrap):
    codec = PixelCodec(mean, scale)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    z = wrap(codec.encode)(pixels)
    x = pixels.astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(z, (x - np.array(mean)) * np.array(scale), rtol=1e-5, atol=1e-6 * max(scale))
    decoded = wrap(codec.as_stored)(z)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


def test_decode_rounds_and_clips():
    codec = PixelCodec((0.0,), (0.5,))
    z = np.array([-9.0, -0.5, 0.0, 0.49999, 0.5, 9.0], np.float32).reshape(1, 1, -1, 1)
    np.testing.assert_array_equal(codec.as_stored(z).ravel(), [0, 0, 128, 255, 255, 255])
    # Half a level more than a pixel's value is where the next one starts.
    for offset, level in [(0.499, 100), (0.501, 101), (-0.499, 100), (-0.501, 99)]:
        assert codec.as_stored(np.full((1, 1, 1, 1), ((100 + offset) / 127.5 - 1) / 2, np.float32)) == level


def test_record_says_what_the_codec_is():
    record = PixelCodec((0.0,), (0.5, 1.0)).record()
    assert record == {"name": "pixels", "mean": [0.0], "scale": [0.5, 1.0]}


def test_a_sample_of_the_moments_is_shifted_and_scaled():
    moments = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 2)).astype(np.float16)
    eps = np.random.default_rng(1).normal(size=(2, 3, 4, 2)).astype(np.float32)
    z = LatentCodec((0.1, 0.2), (2.0,)).encode_moments(moments, eps)
    assert z.dtype == np.float32
    sample = moments[:, 0].astype(np.float64) + moments[:, 1].astype(np.float64) * eps
    np.testing.assert_allclose(z, (sample - [0.1, 0.2]) * 2, rtol=1e-5, atol=1e-6)


def test_expected_is_the_mean_of_what_is_drawn():
    moments = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 2)).astype(np.float16)
    codec = LatentCodec((0.1, 0.2), (2.0,))
    z = codec.expected({"moments": moments})
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, (moments[:, 0].astype(np.float64) - [0.1, 0.2]) * 2, rtol=1e-5, atol=1e-6)
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)}
    pixels = PixelCodec((0.1,), (0.5,))
    np.testing.assert_array_equal(pixels.expected(batch), pixels.clean(batch, jax.random.key(0)))


@pytest.mark.parametrize("key", ["name", "weights", "factor", "channels", "pixel_range"])
def test_data_of_another_codec_are_refused_and_what_is_not_known_is_not_compared(key):
    learnt = {"name": "latents", "weights": "a", "factor": 8, "channels": 4, "pixel_range": [-1, 1], "scale": [0.2]}
    check_codec("the network", learnt, "the data", learnt | {"scale": [0.3]})
    check_codec("the network", learnt, "the data", learnt | {key: None})
    check_codec("the network", {k: v for k, v in learnt.items() if k != key}, "the data", learnt)
    with pytest.raises(DataError, match=f"the network was trained with codec {key} .*, but the data has other"):
        check_codec("the network", learnt, "the data", learnt | {key: "other"})

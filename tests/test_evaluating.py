import json

import jax
import numpy as np
import pytest
from PIL import Image

from sddit_jax import metrics, sharding
from sddit_jax.data.image_sets import open_image_set, source_image_set
from sddit_jax.data.sources import open_source
from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluating import evaluate, full_record, open_reference, table, write_reference
from sddit_jax.feature_spaces import Features, FeatureSpace, measure, on_devices, open_space, pixels_space
from sddit_jax.schema import Parallel

RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 200, (60, 6, 6, 3)).astype(np.uint8)
FAKE = RNG.integers(0, 256, (50, 6, 6, 3)).astype(np.uint8)
PROJECTION = RNG.normal(size=(108, 7)).astype(np.float32)


def vectors(images):
    return images.reshape(len(images), -1) / 255 - 0.5


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=REAL)
    return path


def batches(images, size):
    return (images[i : i + size] for i in range(0, len(images), size))


@pytest.mark.parametrize("size", [1, 16, 99])
def test_what_is_streamed_is_what_the_formulas_say(reference, size):
    space = pixels_space()
    samples = measure(space, batches(FAKE, size), keep=True)
    found = evaluate(samples, open_reference(reference, space, ("pr", "kid"), size), space)
    expected = metrics.frechet_distance(*metrics.moments(vectors(FAKE)), *metrics.moments(vectors(REAL)))
    assert found.results["fd_pixels"] == pytest.approx(expected, rel=1e-10)
    precision_recall = metrics.precision_recall(vectors(REAL), vectors(FAKE))
    assert (found.results["precision"], found.results["recall"]) == precision_recall
    kernel = metrics.kernel_distance_of_subsets(vectors(FAKE), vectors(REAL), 100, 50)
    assert (found.results["kd_pixels"], found.results["kd_pixels_std"]) == kernel
    assert found.settings == {"neighbours": 3, "kid_subsets": 100, "kid_subset_size": 50, "kid_seed": 0}
    assert [words.split(":")[0] for words in found.warnings] == ["samples", "reference"]


def test_features_are_computed_on_all_devices_in_batches_of_one_shape():
    shapes = []

    def function(projection, images):
        shapes.append(images.shape)
        x = images.reshape(len(images), -1).astype("float32")
        return Features(jax.numpy.matmul(x, projection, precision="highest"))

    mesh = sharding.make_mesh(Parallel())
    space = FeatureSpace("random", on_devices(function, PROJECTION, mesh, 12), {"name": "random"})
    samples = measure(space, batches(FAKE, 12), keep=True)
    assert shapes == [(16, 6, 6, 3)]
    expected = FAKE.reshape(50, -1).astype(np.float64) @ PROJECTION
    np.testing.assert_allclose(samples.pool_ND, expected, rtol=1e-5, atol=1e-2)
    assert samples.moments.mean_D.dtype == np.float64
    np.testing.assert_allclose(samples.moments.finalise()[1], np.cov(samples.pool_ND.T.astype(np.float64)), rtol=1e-10)


def test_moments_alone_are_kept_of_a_reference():
    measured = measure(pixels_space(), batches(REAL, 7), keep=False)
    assert (measured.count, measured.pool_ND, measured.logits_NK) == (60, None, None)
    np.testing.assert_allclose(measured.moments.mean_D, vectors(REAL).mean(axis=0), rtol=1e-12, atol=1e-15)


def test_metrics_of_inception(reference):
    """A small space of the same kind: each metric gets its own features."""

    def function(images):
        x = vectors(images)
        return Features(x[:, :5], x[:, 5:11], 9 * x[:, 20:24])

    space = FeatureSpace("inception", function, {"name": "inception", "published_weights": False})
    samples = measure(space, batches(FAKE, 20), keep=True)
    found = evaluate(samples, open_reference(reference, space, ("pr",), 20), space)
    for name, columns in (("fid", slice(5)), ("sfid", slice(5, 11))):
        of = [metrics.moments(vectors(images)[:, columns]) for images in (FAKE, REAL)]
        assert found.results[name] == pytest.approx(metrics.frechet_distance(*of[0], *of[1]), rel=1e-9)
    score = metrics.inception_score(9 * vectors(FAKE)[:, 20:24])
    assert (found.results["inception_score"], found.results["inception_score_std"]) == score
    assert list(found.results) == [
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std",
    ]  # fmt: skip
    assert "not the published" in found.warnings[0]
    assert set(evaluate(samples, open_reference(reference, space, ("is",), 20), space, ("is",)).results) == {
        "inception_score",
        "inception_score_std",
    }


def test_a_written_reference_is_as_good_as_its_images(reference, tmp_path):
    space = pixels_space()
    images = open_image_set(reference)
    assert write_reference(tmp_path / "statistics.npz", space, images, {"source": "x"}, 16) == 60
    samples = measure(space, batches(FAKE, 20), keep=True)
    written = open_reference(tmp_path / "statistics.npz", space, ("fid",), 16)
    assert written.record["record"]["source"] == "x"
    assert written.record["record"]["image_shape"] == [6, 6, 3]
    found = evaluate(samples, written, space)
    assert found.results == {
        "fd_pixels": evaluate(samples, open_reference(reference, space, (), 16), space).results["fd_pixels"]
    }
    assert set(found.skipped) == {"pr", "kid"}
    with pytest.raises(UserError, match=r"pr cannot be computed: .*statistics.npz has no images"):
        evaluate(samples, written, space, ("fid", "pr"))
    other = FeatureSpace("other", space.function, {"name": "other"})
    with pytest.raises(DataError, match="features of name pixels, but the samples' features have other"):
        open_reference(tmp_path / "statistics.npz", other, ("fid",), 16)
    with pytest.raises(DataError, match=r"NAME\.npz"):
        write_reference(tmp_path / "statistics", space, images, {}, 16)


def test_statistics_of_other_features_are_left_for_the_images(tmp_path):
    """As those of ADM's files, which are Inception's, where pixels are compared."""
    np.savez(tmp_path / "adm.npz", arr_0=REAL, mu=np.zeros(2048), sigma=np.eye(2048))
    space = pixels_space()
    found = open_reference(tmp_path / "adm.npz", space, ("fid",), 16)
    assert found.record["statistics_of"] == "its images"
    np.testing.assert_allclose(found.pool.mean_D, vectors(REAL).mean(axis=0), rtol=1e-12, atol=1e-15)


def test_images_of_another_resolution_are_refused(reference):
    space = pixels_space()
    samples = measure(space, batches(FAKE[:, :4, :4], 20), keep=True)
    with pytest.raises(DataError, match=r"the samples are 4x4, but the images of .* are 6x6"):
        evaluate(samples, open_reference(reference, space, (), 16), space)
    grey = measure(space, batches(FAKE[..., :1], 20), keep=True)
    with pytest.raises(DataError, match="108 features, but the samples have 36"):
        evaluate(grey, open_reference(reference, space, (), 16), space)


def test_features_that_cannot_be_compared_are_refused():
    broken = FeatureSpace("broken", lambda images: Features(np.full((len(images), 3), np.nan)), {})
    with pytest.raises(DataError, match="50 of 50 rows of features have values that are not finite"):
        measure(broken, batches(FAKE, 20), keep=False)
    with pytest.raises(DataError, match="1 images have no covariance"):
        measure(pixels_space(), batches(FAKE[:1], 20), keep=False)
    with pytest.raises(DataError, match="12,288 values"):
        measure(pixels_space(), iter([np.zeros((2, 64, 64, 3), np.uint8)]), keep=False)
    with pytest.raises(UserError, match="pt_inception"):
        open_space("inception", "", sharding.make_mesh(Parallel()), 8)


def write_folder(folder, images, mode=None):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{i:05}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_as_its_images(tmp_path, channels):
    images = FAKE[..., :channels]
    opened = open_image_set(write_folder(tmp_path / "images", images), num_threads=3)
    assert opened.shape == images.shape
    for size in (7, 50):
        np.testing.assert_array_equal(np.concatenate(list(opened.batches(size))), images)
    np.savez(tmp_path / "x.npz", arr_0=images)
    hashes = {
        measure(pixels_space(), open_image_set(path).batches(20), keep=False).pixels_sha256
        for path in (tmp_path / "images", tmp_path / "x.npz")
    }
    assert len(hashes) == 1


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    folder = write_folder(tmp_path / "images", FAKE[:9])
    Image.fromarray(FAKE[0][:4]).save(folder / "00004.png")
    with pytest.raises(DataError, match=r"00004.png is \[4, 6, 3\], but .*00000.png \[6, 6, 3\]"):
        list(open_image_set(folder).batches(2))
    (folder / "00004.png").write_bytes((folder / "00003.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"00004.png"):
        list(open_image_set(folder).batches(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_image_set(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        open_image_set(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="should be square"):
        open_image_set(write_folder(tmp_path / "wide", FAKE[:3, :4]))


def test_images_of_a_source_that_cannot_be_read_are_left_out(tmp_path, caplog):
    folder = write_folder(tmp_path / "images", FAKE[:9])
    (folder / "00004.png").write_bytes(b"nothing")
    source = open_source(f"folder:{folder}", split="train", image_size=6, channels=3)
    images = source_image_set(source, 2)
    assert write_reference(tmp_path / "x.npz", pixels_space(), images, {}, 4) == 8
    assert "left out" in caplog.text
    record = open_reference(tmp_path / "x.npz", pixels_space(), (), 4).record["record"]
    assert record["left_out"] == 1


def test_the_record_has_every_condition(reference, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=FAKE)
    made = {"count": 49, "checkpoint_step": 7, "sampler": {"name": "heun", "steps": 4}, "guidance": 1.5, "seed": 3}
    path.with_suffix(".json").write_text(json.dumps(made))
    space = pixels_space()
    samples = measure(space, open_image_set(path).batches(8), keep=True)
    opened = open_reference(reference, space, ("pr",), 8)
    record = json.loads(json.dumps(full_record(path, samples, opened, space, evaluate(samples, opened, space))))
    assert record["samples"]["record"] == made
    assert (record["checkpoint_step"], record["guidance"]) == (7, 1.5)
    assert record["sampler"] == {"name": "heun", "steps": 4}
    assert record["samples"]["count"] == 50
    assert record["features"] == {"name": "pixels", "dimension": 108}
    assert len(record["reference"]["sha256"]) == 64
    assert any("is of 49 images" in words for words in record["warnings"])
    lines = "\n".join(table(record))
    for words in ("step 7", "heun", "guidance 1.5", "fd_pixels", "precision", "recall", "+-", "warning: samples: 50"):
        assert words in lines
    path.with_suffix(".json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list"):
        full_record(path, samples, opened, space, evaluate(samples, opened, space, ("fid",)))

import json

import jax
import numpy as np
import pytest
from PIL import Image

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data.sources import open_source
from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.comparison import comparison_table, evaluate, find_samples, full_record
from sddit_jax.evaluation.feature_spaces import Features, FeatureSpace, device_space, measure, pixels_space
from sddit_jax.evaluation.image_sets import open_image_set, source_image_set
from sddit_jax.evaluation.reference import open_reference, write_reference
from sddit_jax.evaluation.spaces import open_space
from sddit_jax.parallel import sharding

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
    found = evaluate(samples, open_reference(reference, space, FAKE.shape, size), space)
    expected = metrics.frechet_distance(*metrics.moments(vectors(FAKE)), *metrics.moments(vectors(REAL)))
    assert found.results["fd_pixels"] == pytest.approx(expected, rel=1e-10)
    precision_recall = metrics.precision_recall(vectors(REAL), vectors(FAKE))
    assert (found.results["precision"], found.results["recall"]) == precision_recall
    kernel = metrics.kernel_distance_of_subsets(vectors(FAKE), vectors(REAL), 100, 50)
    assert (found.results["kd_pixels"], found.results["kd_pixels_std"]) == kernel
    assert found.settings == {"neighbours": 3, "kid_subsets": 100, "kid_subset_size": 50, "kid_seed": 0}
    assert [words.split(":")[0] for words in found.warnings] == ["fd_pixels, samples", "fd_pixels, reference"]


def test_features_are_computed_on_all_devices_in_batches_of_one_shape():
    shapes = []

    def function(projection, images):
        shapes.append(images.shape)
        x = images.reshape(len(images), -1).astype("float32")
        return Features(jax.numpy.matmul(x, projection, precision="highest"))

    mesh = sharding.make_mesh(ParallelConfig())
    space = device_space("random", function, PROJECTION, mesh, 12, {"name": "random"})
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
    found = evaluate(samples, open_reference(reference, space, FAKE.shape, 20), space)
    for name, columns in (("fid", slice(5)), ("sfid", slice(5, 11))):
        of = [metrics.moments(vectors(images)[:, columns]) for images in (FAKE, REAL)]
        assert found.results[name] == pytest.approx(metrics.frechet_distance(*of[0], *of[1]), rel=1e-9)
    score = metrics.inception_score(9 * vectors(FAKE)[:, 20:24])
    assert (found.results["inception_score"], found.results["inception_score_std"]) == score
    assert list(found.results) == [
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std",
    ]  # fmt: skip
    assert "not the published" in found.warnings[0]
    alone = evaluate(samples, open_reference(reference, space, FAKE.shape, 20, ["is"]), space)
    assert set(alone.results) == {"inception_score", "inception_score_std"}


def test_few_images_are_told_of_each_distance(tmp_path):
    """With the bias of its own features: here 20 samples are enough for FID, and not for sFID."""

    def function(images):
        x = vectors(images)
        return Features(x[:, :5], x[:, 5:55], x[:, 60:64])

    space = FeatureSpace("inception", function, {"name": "inception"})
    np.savez(tmp_path / "reference.npz", arr_0=REAL)
    samples = measure(space, batches(FAKE[:20], 20), keep=True)
    reference = open_reference(tmp_path / "reference.npz", space, (20, 6, 6, 3), 20, ("sfid",))
    (words,) = evaluate(samples, reference, space).warnings
    bias = metrics.frechet_bias(np.cov(vectors(FAKE[:20])[:, 5:55].T), 20)
    assert words.startswith("sFID, samples: 20 images give a singular covariance of 50 features")
    assert f"by about {bias:.3g}," in words


def test_a_written_reference_is_as_good_as_its_images(reference, tmp_path):
    space = pixels_space()
    images = open_image_set(reference)
    assert write_reference(tmp_path / "statistics.npz", space, images, {"source": "x"}, 16, 100) == 60
    samples = measure(space, batches(FAKE, 20), keep=True)
    written = open_reference(tmp_path / "statistics.npz", space, FAKE.shape, 16)
    assert written.record["record"]["source"] == "x"
    assert written.record["record"]["image_shape"] == [6, 6, 3]
    found = evaluate(samples, written, space)
    assert set(found.results) == {"fd_pixels", "precision", "recall", "kd_pixels", "kd_pixels_std"}
    assert found.results == evaluate(samples, open_reference(reference, space, FAKE.shape, 16), space).results
    other = FeatureSpace("other", space.function, {"name": "other"})
    with pytest.raises(DataError, match="features of name pixels, but the samples' features have other"):
        open_reference(tmp_path / "statistics.npz", other, FAKE.shape, 16)
    with pytest.raises(DataError, match=r"NAME\.npz"):
        write_reference(tmp_path / "statistics", space, images, {}, 16, 100)


@pytest.mark.parametrize("size", [7, 60])
def test_features_of_as_many_images_as_asked_are_kept_evenly(reference, tmp_path, size):
    space = pixels_space()
    path = tmp_path / "statistics.npz"
    write_reference(path, space, open_image_set(reference), {}, size, 25)
    opened = open_reference(path, space, FAKE.shape, 16)
    chosen = np.arange(25) * 60 // 25
    np.testing.assert_array_equal(opened.pool_ND, vectors(REAL)[chosen])
    np.testing.assert_allclose(opened.pool.mean_D, vectors(REAL).mean(axis=0), rtol=1e-12, atol=1e-15)
    assert (opened.count, opened.record["features_count"]) == (60, 25)
    write_reference(path, space, open_image_set(reference), {}, size, 0)
    assert set(open_reference(path, space, FAKE.shape, 16).skipped) >= {"pr", "kid"}


def test_statistics_of_other_features_are_left_for_the_images(tmp_path):
    """As those of ADM's files, which are Inception's, where pixels are compared."""
    np.savez(tmp_path / "adm.npz", arr_0=REAL, mu=np.zeros(2048), sigma=np.eye(2048))
    found = open_reference(tmp_path / "adm.npz", pixels_space(), FAKE.shape, 16, ("fid",))
    assert found.record["statistics_of"] == "its images"
    np.testing.assert_allclose(found.pool.mean_D, vectors(REAL).mean(axis=0), rtol=1e-12, atol=1e-15)


def statistics(dimension):
    return {"mu": np.zeros(dimension), "sigma": np.eye(dimension)}


IMAGES = {"arr_0": REAL}
PIXELS = statistics(108) | {"record": json.dumps({"image_shape": [6, 6, 3], "features": {"name": "pixels"}})}


class Untouched:
    """Counts images whose features are computed, the blank one that tells their dimension aside."""

    def __init__(self, name):
        self.count, self.space = 0, FeatureSpace(name, self.function, {"name": name})

    def function(self, images):
        self.count += len(images) if images.any() else 0
        width = 2048 if self.space.name == "inception" else images[0].size
        return Features(np.zeros((len(images), width)))


@pytest.mark.parametrize(
    ("name", "content", "shape", "wanted", "message"),
    [
        ("pixels", IMAGES, (50, 4, 4, 3), None, "samples are 4x4, but .* are 6x6"),
        ("pixels", PIXELS, (50, 4, 4, 3), None, "samples are 4x4, but .* are 6x6"),
        ("pixels", IMAGES, (50, 6, 6, 1), None, "108 features, but the samples have 36"),
        ("pixels", PIXELS, (50, 6, 6, 1), None, "108 features, but the samples have 36"),
        ("pixels", PIXELS, (50, 6, 6, 3), ("fid", "pr"), "pr .*: .* has neither images nor features"),
        ("pixels", PIXELS, (50, 6, 6, 3), ("kid",), "kid .*: .* has neither images nor features"),
        ("pixels", IMAGES, (50, 6, 6, 3), ("sfid",), "sfid cannot be computed: it is of features of Inception"),
        ("pixels", IMAGES, (3, 6, 6, 3), ("pr",), "pr .*: each side needs at least 4 images"),
        ("pixels", IMAGES, (1, 6, 6, 3), None, "1 sample has no covariance"),
        ("inception", statistics(2048), (50, 6, 6, 3), ("sfid",), "has no mu_s and sigma_s"),
        ("inception", statistics(64), (50, 6, 6, 3), None, r"mu is float64 of shape \[64\]"),
    ],
)
def test_what_cannot_be_compared_is_found_before_features_are_computed(tmp_path, name, content, shape, wanted, message):
    np.savez(tmp_path / "reference.npz", **content)
    untouched = Untouched(name)
    with pytest.raises(UserError, match=message):
        open_reference(tmp_path / "reference.npz", untouched.space, shape, 16, wanted)
    assert untouched.count == 0


def test_a_place_that_cannot_be_written_is_found_before_features_are_computed(reference, tmp_path):
    untouched = Untouched("pixels")
    with pytest.raises(UserError, match="absent is not a folder"):
        write_reference(tmp_path / "absent" / "x.npz", untouched.space, open_image_set(reference), {}, 16, 10)
    assert untouched.count == 0


def test_features_that_cannot_be_compared_are_refused():
    broken = FeatureSpace("broken", lambda images: Features(np.full((len(images), 3), np.nan)), {})
    with pytest.raises(DataError, match="50 of 50 rows of features have values that are not finite"):
        measure(broken, batches(FAKE, 20), keep=False)
    with pytest.raises(DataError, match="1 images have no covariance"):
        measure(pixels_space(), batches(FAKE[:1], 20), keep=False)
    with pytest.raises(DataError, match="12,288 values"):
        measure(pixels_space(), iter([np.zeros((2, 64, 64, 3), np.uint8)]), keep=False)
    with pytest.raises(UserError, match="pt_inception"):
        open_space("inception", "", sharding.make_mesh(ParallelConfig()), 8)


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
    assert write_reference(tmp_path / "x.npz", pixels_space(), images, {}, 4, 99) == 8
    assert "left out" in caplog.text
    record = open_reference(tmp_path / "x.npz", pixels_space(), FAKE.shape, 4).record
    assert record["record"]["left_out"] == 1
    assert record["count"] == record["features_count"] == 8


def test_the_record_has_every_condition(reference, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=FAKE)
    made = {"count": 49, "checkpoint_step": 7, "sampler": {"name": "heun", "steps": 4}, "guidance": 1.5, "seed": 3}
    path.with_suffix(".json").write_text(json.dumps(made))
    space = pixels_space()
    samples = measure(space, open_image_set(path).batches(8), keep=True)
    opened = open_reference(reference, space, FAKE.shape, 8)
    evaluation = evaluate(samples, opened, space)
    record = json.loads(json.dumps(full_record(*find_samples(path), samples, opened, space, evaluation)))
    assert record["samples"]["record"] == made
    assert (record["checkpoint_step"], record["guidance"]) == (7, 1.5)
    assert record["sampler"] == {"name": "heun", "steps": 4}
    assert record["samples"]["count"] == 50
    assert record["features"] == {"name": "pixels", "dimension": 108}
    assert len(record["reference"]["sha256"]) == 64
    assert any("is of 49 images" in words for words in record["warnings"])
    lines = "\n".join(comparison_table(record))
    for words in ("step 7", "heun", "guidance 1.5", "fd_pixels", "precision", "recall", "+-", "fd_pixels, samples: 50"):
        assert words in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "cannot be read as JSON: it holds a list"),
        ("null", "cannot be read as JSON: it holds a NoneType"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"sampler": "ddim"}', "sampler is 'ddim'; it should be an object"),
    ],
)
def test_an_odd_record_of_samples_is_explained(tmp_path, text, message):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(DataError, match=f"samples.json.* {message}"):
        find_samples(tmp_path / "samples.npz")


def test_samples_are_found_with_the_record_that_is_theirs(tmp_path, monkeypatch):
    png, npz, other = ({"format": name, "seed": 3} for name in ("png", "npz", "else"))
    for made in (png, npz, other):
        folder = tmp_path / made["format"]
        (folder / "images").mkdir(parents=True)
        (folder / "samples.json").write_text(json.dumps(made))
    images, file = tmp_path / "png" / "images", tmp_path / "npz" / "samples.npz"
    assert find_samples(tmp_path / "png") == find_samples(images) == (images, png)
    assert find_samples(tmp_path / "npz") == find_samples(file) == (file, npz)
    # Folders beside or above which another record lies.
    for folder in (tmp_path / "npz" / "images", tmp_path / "else" / "images", tmp_path / "else"):
        assert find_samples(folder) == (folder, {})
    (tmp_path / "png" / "real").mkdir()
    assert find_samples(tmp_path / "png" / "real") == (tmp_path / "png" / "real", {})
    monkeypatch.chdir(images)
    assert find_samples(".") == find_samples("..") == (images, png)

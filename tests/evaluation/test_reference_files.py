import io
import pickle
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sddit_jax.errors import DataError
from sddit_jax.evaluation.reference_files import Statistics, open_evaluation_file, write_statistics

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 4, 3)).astype(np.uint8)


def make_statistics(dimension, seed):
    """Mostly zeros, which are quick to compress."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(64, 64))
    covariance = np.diag(rng.uniform(0, 1, dimension))
    covariance[:64, :64] += factor @ factor.T
    return Statistics(rng.normal(size=dimension), covariance)


@pytest.fixture(scope="module")
def pool():
    return make_statistics(2048, 1)


@pytest.fixture(scope="module")
def spatial():
    return make_statistics(2023, 2)


@pytest.fixture(scope="module")
def adm(pool, spatial):
    """The arrays of a reference file of ADM's, whose mean is float32."""
    return {
        "arr_0": IMAGES,
        "mu": pool.mean_D.astype(np.float32),
        "sigma": pool.covariance_DD,
        "mu_s": spatial.mean_D.astype(np.float32),
        "sigma_s": spatial.covariance_DD,
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_adm(adm, tmp_path, save):
    save(tmp_path / "reference.npz", **adm, arr_1=np.arange(10))
    opened = open_evaluation_file(tmp_path / "reference.npz")
    assert opened.images.shape == IMAGES.shape
    for size in (1, 4, 10, 99):
        batches = list(opened.images.batches(size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    for found, mean, covariance in ((opened.pool, "mu", "sigma"), (opened.spatial, "mu_s", "sigma_s")):
        assert found.mean_D.dtype == found.covariance_DD.dtype == np.float64
        np.testing.assert_array_equal(found.mean_D, adm[mean])
        np.testing.assert_array_equal(found.covariance_DD, adm[covariance])
    assert (opened.count, opened.record) == (None, {})


def test_files_of_images_alone_and_of_fid_alone(adm, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES, arr_1=np.arange(10, dtype=np.int32))
    opened = open_evaluation_file(tmp_path / "samples.npz")
    assert (opened.pool, opened.spatial) == (None, None)
    np.savez(tmp_path / "fid.npz", mu=adm["mu"], sigma=adm["sigma"].astype(np.float32).T)
    opened = open_evaluation_file(str(tmp_path / "fid.npz"))
    assert (opened.images, opened.spatial) == (None, None)
    np.testing.assert_allclose(opened.pool.covariance_DD, adm["sigma"], rtol=1e-6)


def test_what_is_written_is_read(pool, spatial, tmp_path):
    path = tmp_path / "statistics.npz"
    record = {"inception": "6726825d", "images": "a folder, cropped", "ü": [1, None]}
    features = np.random.default_rng(3).normal(size=(5, 2048)).astype(np.float32)
    write_statistics(path, pool, spatial, features, 1_281_167, record)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    opened = open_evaluation_file(path)
    assert (opened.count, opened.record, opened.images) == (1_281_167, record, None)
    for found, expected in ((opened.pool, pool), (opened.spatial, spatial)):
        np.testing.assert_array_equal(found.mean_D, expected.mean_D)
        np.testing.assert_array_equal(found.covariance_DD, expected.covariance_DD)
    assert opened.features_KD.dtype == np.float32
    np.testing.assert_array_equal(opened.features_KD, features)
    # By ADM's names.
    with np.load(path) as file:
        np.testing.assert_array_equal(file["sigma_s"], spatial.covariance_DD)
    with pytest.raises(DataError, match="could not be written"):
        write_statistics(tmp_path / "no folder" / "x.npz", pool, spatial, None, 5, {})


class Runs:
    def __reduce__(self):
        return print, ("executed",)


def asymmetric(matrix):
    matrix = matrix.copy()
    matrix[3, 5] += 1e-3 * np.abs(matrix).max()
    return matrix


def with_nan(values):
    values = values.copy()
    values.flat[:2] = np.nan, np.inf
    return values


def with_features(arrays, features):
    return {"mu": arrays["mu"], "sigma": arrays["sigma"], "features": features}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"arr_0": np.array([Runs()], object)}, "arr_0 holds pickled objects"),
        (lambda a: {"mu": np.array([Runs()] * 2048, object), "sigma": a["sigma"]}, "mu holds pickled objects"),
        (
            lambda a: {"arr_0": IMAGES.astype(np.float32)},
            r"arr_0 is float32 of shape \[10, 6, 4, 3\]; it should be uint8",
        ),
        (lambda a: {"arr_0": IMAGES[..., :2]}, r"shape \[10, 6, 4, 2\]"),
        (lambda a: {"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"shape \[10, 3, 6, 4\]"),
        (lambda a: {"arr_0": IMAGES[:0]}, r"shape \[0, 6, 4, 3\]"),
        (lambda a: {"arr_0": np.asfortranarray(IMAGES)}, "Fortran"),
        (lambda a: {"mu": a["mu"]}, "mu alone; mu and sigma belong together"),
        (lambda a: {"arr_0": IMAGES, "sigma_s": a["sigma_s"]}, "sigma_s alone; mu_s and sigma_s belong together"),
        (lambda a: {"mu": a["mu"].astype(np.float16), "sigma": a["sigma"]}, "mu is float16"),
        (lambda a: {"mu": a["mu"][:-1], "sigma": a["sigma"]}, r"mu is float32 of shape \[2047\]; .* \[2048\]"),
        (lambda a: {"arr_0": IMAGES, "mu_s": a["mu_s"], "sigma_s": a["sigma"]}, r"sigma_s .* shape \[2048, 2048\]"),
        (lambda a: {"mu": a["mu"], "sigma": a["sigma"].astype(complex)}, "sigma is complex128"),
        (lambda a: {"mu": with_nan(a["mu"]), "sigma": a["sigma"]}, "mu has 2 values that are not finite"),
        (lambda a: {"mu": a["mu"], "sigma": with_nan(a["sigma"])}, "sigma has 2 values that are not finite"),
        (lambda a: {"mu": a["mu"], "sigma": asymmetric(a["sigma"])}, "sigma is no covariance"),
        (lambda a: {"mu": a["mu"], "sigma": -a["sigma"]}, "sigma is no covariance"),
        (lambda a: {"arr_0": IMAGES, "count": 1}, "count is 1; a covariance is of at least 2 images"),
        (lambda a: {"arr_0": IMAGES, "count": 2.5}, "count is float64"),
        (lambda a: {"arr_0": IMAGES, "count": np.array([5])}, r"count is int64 of shape \[1\]"),
        (lambda a: {"arr_0": IMAGES, "features": np.ones((5, 2048))}, "features without mu and sigma"),
        (lambda a: with_features(a, np.ones((5, 2047))), r"features is float64 of shape \[5, 2047\]; .* \[K, 2048\]"),
        (lambda a: with_features(a, np.ones((0, 2048))), r"features is float64 of shape \[0, 2048\]"),
        (lambda a: with_features(a, np.ones((5, 2048), int)), "features is int64"),
        (lambda a: with_features(a, np.array([Runs()], object)), "features holds pickled objects"),
        (lambda a: with_features(a, with_nan(np.ones((5, 2048)))), "features has 2 values that are not finite"),
        (lambda a: {"arr_0": IMAGES, "record": "[1]"}, "record holds a list"),
        (lambda a: {"arr_0": IMAGES, "record": "null"}, "record holds a NoneType"),
        (lambda a: {"arr_0": IMAGES, "record": '{"features": 7}'}, "features of record is 7; it should be an object"),
        (lambda a: {"arr_0": IMAGES, "record": '{"features": null}'}, "features of record is None"),
        (lambda a: {"arr_0": IMAGES, "record": '{"image_shape": [8, "8", 3]}'}, "image_shape of record is .*it should"),
        (lambda a: {"arr_0": IMAGES, "record": '{"image_shape": 8}'}, "image_shape of record is 8"),
        (lambda a: {"arr_0": IMAGES, "record": "{"}, "is not an intact npz file: JSONDecodeError"),
        (lambda a: {"arr_0": IMAGES, "record": 7}, "record is int64"),
        (lambda a: {"pool": np.ones(3)}, r"neither arr_0 .* nor mu and sigma; it has \['pool'\]"),
        (lambda a: {}, "it has nothing"),
    ],
)
def test_what_is_wrong_is_named(adm, tmp_path, capsys, change, message):
    path = tmp_path / "x.npz"
    np.savez(path, **change(adm))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}"):
        open_evaluation_file(path)
    assert capsys.readouterr().out == ""


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "an.npy", IMAGES)
    (tmp_path / "text.npz").write_text("not a zip file")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Runs()))
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"not an array")
    for path in [*tmp_path.iterdir(), tmp_path, tmp_path / "absent.npz"]:
        with pytest.raises(DataError, match=re.escape(str(path))):
            open_evaluation_file(path)


def test_images_that_end_early_or_late_are_refused(tmp_path):
    content = io.BytesIO()
    np.save(content, IMAGES)
    for name, array in (("cut", content.getvalue()[:-100]), ("long", content.getvalue() + b"x")):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", array)
        with pytest.raises(DataError, match=re.escape(str(path))):
            list(open_evaluation_file(path).images.batches(4))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "x.npz"
    np.savez_compressed(path, arr_0=IMAGES, count=10, record='{"a": 1}')
    return path, path.read_bytes()


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_reads_as_it_was(small, data):
    path, content = small
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    path.with_name("damaged.npz").write_bytes(content)
    try:
        opened = open_evaluation_file(path.with_name("damaged.npz"))
        images = np.concatenate(list(opened.images.batches(3)))
    except DataError:
        return
    np.testing.assert_array_equal(images, IMAGES)
    assert (opened.count, opened.record) == (10, {"a": 1})

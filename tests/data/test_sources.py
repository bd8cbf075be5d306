import io
import logging
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from sddit_jax.data.images import BadImageError, center_crop, read_image
from sddit_jax.data.sources import open_source
from sddit_jax.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def grey(value, size=8):
    return Image.new("L", (size, size), value)


def read(image, channels=3, size=8, fmt="PNG", **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    file.seek(0)
    return read_image(file, size=size, channels=channels)


def open_folder(path, *, split="train", channels=3):
    return open_source(f"folder:{path}", split=split, image_size=8, channels=channels)


@pytest.fixture
def folder(tmp_path):
    """Two classes, four good images of values 10, 20, 30, 40, in this order."""
    for name, value in [("ant/b/x.PNG", 20), ("ant/a.png", 10), ("bee/1.WebP", 30)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(value).save(path, lossless=True)
    grey(40).save(tmp_path / "bee/2.jpeg", quality=100)
    return tmp_path


class TestCenterCrop:
    def test_halves_with_a_box_filter(self):
        pixels = np.array([[10, 20, 0, 0], [30, 40, 0, 0]], np.uint8)
        assert np.asarray(center_crop(Image.fromarray(pixels), 1)).tolist() == [[25]]

    def test_keeps_the_centre(self):
        pixels = np.arange(15, dtype=np.uint8).reshape(3, 5)
        cropped = np.asarray(center_crop(Image.fromarray(pixels), 3))
        np.testing.assert_array_equal(cropped, pixels[:, 1:4])

    def test_reduces_101_by_67_to_16_as_adm_does(self):
        # By hand: 101x67 -> 50x33 -> 25x16 (halves, rounded down), scale 1, columns 4..19.
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (67, 101), np.uint8))
        half = image.resize((50, 33), Image.Resampling.BOX).resize((25, 16), Image.Resampling.BOX)
        np.testing.assert_array_equal(center_crop(image, 16), half.crop((4, 0, 20, 16)))

    @given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
    def test_is_square_for_any_shape(self, width, height, size):
        image = Image.new("L", (width, height), 77)
        if max(width, height) > 100 * min(width, height):
            with pytest.raises(BadImageError, match="thinner"):
                center_crop(image, size)
        else:
            cropped = np.asarray(center_crop(image, size))
            assert cropped.shape == (size, size)
            assert (cropped == 77).all()


class TestReadImage:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (Image.new("RGB", (8, 8), RED), RED),
            (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
            (Image.new("RGBA", (8, 8), (*RED, 255)), RED),
            (Image.new("LA", (8, 8), (9, 0)), (255, 255, 255)),
            (Image.new("RGB", (8, 8), RED).quantize(4), RED),
            (Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), (0x80,) * 3),
            (Image.new("1", (8, 8), 1), (255, 255, 255)),
        ],
        ids=lambda value: getattr(value, "mode", ""),
    )
    def test_modes_become_opaque_rgb(self, image, expected):
        pixels = read(image)
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (8, 8, 3)))

    def test_a_transparent_palette_colour_becomes_white(self):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, *RED])
        assert (read(image, transparency=1) == 255).all()
        assert (read(image, transparency=0) == RED).all()

    def test_cmyk_becomes_rgb(self):
        pixels = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), fmt="JPEG").astype(int)
        assert np.abs(pixels - RED).max() < 8

    def test_grey_is_the_luma_of_itu_601(self):
        pixels = read(Image.new("RGB", (8, 8), RED), channels=1)
        np.testing.assert_array_equal(pixels, np.full((8, 8, 1), round(0.299 * 255)))

    @pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
    def test_exif_orientation_is_applied(self, fmt):
        image = Image.new("RGB", (16, 8), RED)
        image.paste(BLUE, (8, 0, 16, 8))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise: left becomes top
        pixels = read(image, fmt=fmt, exif=exif, lossless=True)
        assert (pixels[:4] == RED).all()
        assert (pixels[4:] == BLUE).all()

    def test_what_is_not_an_image_is_named_so(self):
        for data in (b"", b"text", png(grey(1))[:10], b"GIF89a" + bytes(40)):
            with pytest.raises(BadImageError, match="not a PNG, JPEG or WebP"):
                read_image(io.BytesIO(data), size=8, channels=3)

    @given(st.data())
    def test_damage_is_read_or_refused_but_never_crashes(self, data):
        fmt = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
        file = io.BytesIO()
        Image.linear_gradient("L").resize((20, 12)).save(file, fmt, exif=Image.Exif())
        damaged = bytearray(file.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] = data.draw(st.integers(0, 255))
        try:
            pixels = read_image(io.BytesIO(damaged), size=8, channels=1)
        except BadImageError:
            return
        assert pixels.shape == (8, 8, 1)

    def test_decompression_bombs_are_refused(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
        with pytest.raises(BadImageError, match="DecompressionBombError"):
            read(grey(1))


class TestDigits:
    def test_are_the_real_ones(self):
        source, digits = (
            open_source("digits", split="train", image_size=8, channels=1),
            load_digits(),
        )
        assert len(source) == 1797
        assert source.num_classes == 10
        assert source.class_names == tuple("0123456789")
        assert source.image_shape == (8, 8, 1)
        images = np.stack([source[i]["image"] for i in range(1797)])
        np.testing.assert_array_equal(images[..., 0], np.round(digits.images * 255 / 16))
        assert [source[i]["label"] for i in range(1797)] == digits.target.tolist()

    def test_records_have_the_promised_types(self):
        record = open_source("digits", split="train", image_size=8, channels=1)[5]
        types = {key: (value.shape, value.dtype) for key, value in record.items()}
        assert types == {
            "image": ((8, 8, 1), np.uint8),
            "label": ((), np.int32),
            "index": ((), np.int64),
        }
        assert record["index"] == 5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 32}, "image_size=32.*image_size=8"),
            ({"channels": 3}, "channels=3.*channels=1"),
            ({"split": "test"}, "'test'.*'train'"),
        ],
    )
    def test_are_not_bent(self, options, message):
        with pytest.raises(DataError, match=message):
            open_source("digits", **{"split": "train", "image_size": 8, "channels": 1, **options})


class TestFolder:
    def test_reads_classes_and_files_in_sorted_order(self, folder):
        source = open_folder(folder)
        assert source.class_names == ("ant", "bee")
        assert source.num_classes == 2
        records = [source[i] for i in range(len(source))]
        assert [int(r["image"][0, 0, 0]) for r in records] == [10, 20, 30, 40]
        assert [int(r["label"]) for r in records] == [0, 0, 1, 1]
        assert [int(r["index"]) for r in records] == [0, 1, 2, 3]
        assert {r["image"].shape for r in records} == {(8, 8, 3)}
        assert source.bad_files == {}
        with pytest.raises(IndexError):
            source[4]

    def test_hidden_files_and_other_suffixes_are_left_out(self, folder):
        for name in (".git/a.png", "ant/.x/a.png", "ant/._a.png", "ant/notes.txt", "README.md"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        assert len(open_folder(folder)) == 4
        assert open_folder(folder).num_classes == 2

    def test_images_without_class_folders_are_unconditional(self, tmp_path):
        for value in (3, 1, 2):
            grey(value).save(tmp_path / f"{value}.png")
        source = open_folder(tmp_path, channels=1)
        assert source.num_classes == 0
        assert source.class_names == ()
        assert [int(source[i]["image"][0, 0, 0]) for i in range(3)] == [1, 2, 3]
        assert [int(source[i]["label"]) for i in range(3)] == [0, 0, 0]

    def test_a_split_is_a_folder_where_there_is_one(self, folder, tmp_path_factory):
        root = tmp_path_factory.mktemp("root")
        shutil.copytree(folder, root / "train")
        shutil.copytree(folder / "ant", root / "val/ant")
        assert len(open_folder(root)) == 4
        assert len(open_folder(root, split="val")) == 2
        with pytest.raises(DataError, match="choose one of the splits train, val"):
            open_folder(root, split="validation")

    def test_bad_files_are_named_counted_and_replaced(self, folder, caplog):
        (folder / "ant/b/x.PNG").write_bytes(png(grey(9, 64))[:-40])
        (folder / "bee/0.jpg").touch()
        (folder / "bee/1.WebP").write_text("not an image")
        (folder / "bee/3.png").symlink_to(folder / "missing.png")
        source = open_folder(folder)  # ant: good bad; bee: bad bad good bad
        with caplog.at_level(logging.WARNING, "sddit_jax"):
            for _ in range(2):
                indices = [int(source[i]["index"]) for i in range(6)]
        assert indices == [0, 4, 4, 4, 4, 0]
        assert [int(source[i]["label"]) for i in range(6)] == [0, 1, 1, 1, 1, 0]
        names = ["ant/b/x.PNG", "bee/0.jpg", "bee/1.WebP", "bee/3.png"]
        assert source.bad_files.keys() == {str(folder / name) for name in names}
        assert len(caplog.records) == 4
        for name in names:
            assert caplog.text.count(str(folder / name) + ": ") == 1
        assert "truncated" in source.bad_files[str(folder / names[0])]
        assert "FileNotFoundError" in source.bad_files[str(folder / names[3])]

    def test_threads_and_copies_read_the_same(self, folder, caplog):
        (folder / "ant/a.png").write_text("bad")
        source = pickle.loads(pickle.dumps(open_folder(folder)))
        with ThreadPoolExecutor(8) as pool:
            indices = [int(r["index"]) for r in pool.map(source.__getitem__, [0, 1, 2, 3] * 20)]
        assert indices == [1, 1, 2, 3] * 20
        assert len(caplog.records) == 1

    def test_only_bad_files_are_an_error(self, tmp_path):
        for name in ("a.png", "b.png"):
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=r"not one of 2 images.*b\.png: not a PNG"):
            open_folder(tmp_path)[1]

    def test_a_useless_folder_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="missing: not a folder"):
            open_folder(tmp_path / "missing")
        with pytest.raises(DataError, match="no images"):
            open_folder(tmp_path)
        (tmp_path / "file.png").touch()
        with pytest.raises(DataError, match="not a folder"):
            open_folder(tmp_path / "file.png")

    def test_an_ambiguous_folder_is_an_error(self, folder):
        (folder / "cow").mkdir()
        with pytest.raises(DataError, match="no images in class folders cow"):
            open_folder(folder)
        (folder / "cow").rmdir()
        with pytest.raises(DataError, match="slices"):
            open_folder(folder, split="train[:10%]")
        (folder / "loose.png").touch()
        with pytest.raises(DataError, match="images beside class folders ant, bee"):
            open_folder(folder)

    @pytest.mark.parametrize("closed", ["", "ant", "ant/b"])
    def test_an_unreadable_folder_is_an_error(self, folder, closed, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if os.fspath(path) == str(folder / closed):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"cannot be listed.*Permission denied"):
            open_folder(folder)


BUILDERS = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(value):
    file = io.BytesIO()
    Image.new("L", (12, 9), value).save(file, "PNG")
    return file.getvalue()


class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples([10, 20, None, 40], [0, 1, 0, 1]),
            "test": self._generate_examples([10], [-1]),
        }

    def _generate_examples(self, values, labels):
        for i, (value, label) in enumerate(zip(values, labels)):
            yield i, {"image": png(value) if value else b"broken", "label": label}


class TinyUnlabelled(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": png(50)}


class TinyVectors(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"vector": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"vector": np.zeros(2, np.float32)}
"""


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(scope="module")
def tiny(tfds, tmp_path_factory):
    """The directory of a prepared dataset, by name of its builder class."""
    package = tmp_path_factory.mktemp("modules") / "tiny_datasets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "builders.py").write_text(BUILDERS)
    data = tmp_path_factory.mktemp("tfds")
    sys.path.insert(0, str(package.parent))
    try:
        from tiny_datasets import builders
    finally:
        sys.path.remove(str(package.parent))

    def prepare(name):
        builder = getattr(builders, name)(data_dir=data, file_format="array_record")
        builder.download_and_prepare()
        return builder.data_dir

    return prepare


def open_tfds(name, *, split="train", **options):
    return open_source(f"tfds:{name}", split=split, image_size=8, channels=1, **options)


class TestTfds:
    def test_reads_a_prepared_directory(self, tiny, caplog):
        source = pickle.loads(pickle.dumps(open_tfds(tiny("TinyImages"))))
        assert len(source) == 4
        assert source.class_names == ("cat", "dog")
        seen = {}
        for i in range(4):  # tfds shuffles the records when it writes them
            record = source[i]
            assert record["image"].shape == (8, 8, 1)
            seen[int(record["image"][0, 0, 0])] = int(record["label"])
        assert seen == {10: 0, 20: 1, 40: 1}
        assert list(source.bad_files.values()) == ["not a PNG, JPEG or WebP image"]
        assert len([r for r in caplog.records if r.name == "sddit_jax"]) == 1

    def test_without_labels_is_unconditional(self, tiny):
        source = open_tfds(tiny("TinyUnlabelled"))
        assert source.num_classes == 0
        assert source[0]["label"] == 0
        assert (source[0]["image"] == 50).all()

    def test_reads_by_name_with_the_class_names_of_the_builder(self, tfds):
        def records(builder, split, decoders):
            assert (builder.name, split) == ("cifar10", "train")
            return [{"image": png(Image.new("RGB", (32, 32), RED)), "label": 7}]

        with tfds.testing.mock_data(as_data_source_fn=records):
            source = open_source("tfds:cifar10", split="train", image_size=16, channels=3)
        assert source.num_classes == 10
        assert (source[0]["image"] == RED).all()
        assert source[0]["label"] == 7

    def test_slices_are_splits(self, tiny):
        assert len(open_tfds(tiny("TinyImages"), split="train[:50%]")) == 2

    def test_secret_labels_are_an_error(self, tiny):
        with pytest.raises(DataError, match="no label"):
            open_tfds(tiny("TinyImages"), split="test")[0]

    def test_unknown_splits_are_an_error(self, tiny):
        for split in ("validation", "train[:0]", "train[:"):
            with pytest.raises(DataError, match="split"):
                open_tfds(tiny("TinyImages"), split=split)

    def test_unknown_names_and_directories_are_an_error(self, tmp_path, tfds):
        with pytest.raises(DataError, match="no_such_dataset not found"):
            open_tfds("no_such_dataset")
        with pytest.raises(DataError, match="not a prepared dataset"):
            open_tfds(tmp_path)

    def test_a_dataset_without_images_is_an_error(self, tiny):
        with pytest.raises(DataError, match=r"no 'image' feature.*vector"):
            open_tfds(tiny("TinyVectors"))

    def test_what_is_not_prepared_is_an_error_that_says_how(self, tiny):
        tiny("TinyImages")  # known by name from here on, but prepared elsewhere
        with pytest.raises(DataError, match=r"not prepared in.*TFDS_DATA_DIR.*array_record"):
            open_tfds("tiny_images")

    def test_tfrecord_is_an_error(self, tiny, tmp_path):
        copy = tmp_path / "tiny_images/1.0.0"
        shutil.copytree(tiny("TinyImages"), copy)
        info = copy / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(DataError, match="tfrecord"):
            open_tfds(copy)

    def test_a_missing_shard_is_an_error(self, tiny, tmp_path):
        copy = tmp_path / "tiny_images/1.0.0"
        shutil.copytree(tiny("TinyImages"), copy)
        next(copy.glob("*-train.array_record*")).unlink()
        with pytest.raises(DataError, match="prepare the data again"):
            open_tfds(copy)[0]


@pytest.mark.parametrize("spec", ["", "digit", "digits:8", "folder", "folder:", "tfds:", "http://x"])
def test_unknown_specs_are_refused(spec):
    with pytest.raises(DataError, match="expected 'digits', 'folder:PATH', 'tfds:NAME' or 'latents:PATH'"):
        open_source(spec, split="train", image_size=8, channels=1)


@pytest.mark.parametrize("spec", ["latents:", "latents", "latents:gs://bucket/latents"])
def test_latents_are_in_a_folder(spec):
    with pytest.raises(DataError, match="expected latents:DIR with a local or mounted folder"):
        open_source(spec, split="train", image_size=32, channels=4)


@pytest.mark.parametrize(("image_size", "channels"), [(0, 3), (8, 2)])
def test_impossible_shapes_are_refused(tmp_path, image_size, channels):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match="expected a positive size"):
        open_source(f"folder:{tmp_path}", split="train", image_size=image_size, channels=channels)

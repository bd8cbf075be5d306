import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latents import SHAPE, batches, make_plan, values, write_latents

from sddit_jax.data import shards
from sddit_jax.data.latents import LatentsSource
from sddit_jax.data.loader import make_loader
from sddit_jax.data.sources import open_source
from sddit_jax.errors import DataError

# Images 5 to 9 are a whole shard.
BAD = (2, 5, 6, 7, 8, 9, 22)
GOOD = [i for i in range(23) if i not in BAD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of which 16 are good, in five shards, one of them empty."""
    path = tmp_path_factory.mktemp("latents")
    write_latents(path, make_plan(), BAD)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def open_latents(path, *, split="train", size=None, **options):
    return LatentsSource(path, split, size or SHAPE, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["streamed", "in memory"])
def source(folder, request):
    return open_latents(folder, in_memory=request.param)


def tfds_records(path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    return builder.info, builder.as_data_source("train")


class TestFormat:
    def test_tfds_opens_the_folder(self, folder):
        info, records = tfds_records(folder)
        assert info.features["label"].names == ["ant", "bee", "cow"]
        assert len(records) == len(GOOD)
        for record, number in zip(records, GOOD, strict=True):
            assert record["moments"].dtype == np.float16
            np.testing.assert_array_equal(record["moments"], values(make_plan())[number])
            assert (record["label"], record["index"]) == (number % 3, number)

    def test_tfds_opens_a_folder_without_classes(self, tmp_path):
        write_latents(tmp_path, make_plan(class_names=()))
        _, records = tfds_records(tmp_path)
        assert [(record["label"], record["index"]) for record in records] == [(0, i) for i in range(23)]
        assert open_latents(tmp_path).num_classes == 0

    @given(st.integers(0, 2**31 - 1), st.integers(0, 2**35 - 1), st.integers(1, 200))
    def test_a_record_is_an_example_at_any_size(self, label, index, width):
        import tensorflow_datasets as tfds

        shape = (1, width, 3)
        moments = np.random.default_rng(width).normal(size=(2, 2, *shape)).astype(np.float16)
        layout = shards.RecordLayout(shape)
        record = layout.pack(moments, label, index)
        layout.check(record)
        features = tfds.features.FeaturesDict(
            {
                "moments": tfds.features.Tensor(shape=moments.shape, dtype=np.float16, encoding="bytes"),
                "label": tfds.features.Scalar(np.int64),
                "index": tfds.features.Scalar(np.int64),
            }
        )
        parsed = features.deserialize_example_np(record)
        np.testing.assert_array_equal(parsed["moments"], moments)
        assert (parsed["label"], parsed["index"]) == (label, index)
        for mirrored in (False, True):
            half = np.frombuffer(layout.half(record, mirrored), "<f2")
            np.testing.assert_array_equal(half, moments[int(mirrored)].ravel())
        assert [a.tolist() for a in layout.labels([record[-layout.end_bytes :]] * 2)] == [[label] * 2, [index] * 2]

    def test_what_is_left_out_is_listed(self, folder):
        assert json.loads((folder / "bad_files.json").read_text()) == {f"{i}.png": "not an image" for i in BAD}

    def test_statistics_are_those_of_scaled_samples(self, folder):
        moments = values(make_plan())[GOOD].astype(np.float64)
        eps = np.random.default_rng(1).normal(size=(2000, *moments[:, :, 0].shape))
        z = (moments[:, :, 0] + moments[:, :, 1] * eps - 0.25) * 0.5
        statistics = open_latents(folder).statistics
        np.testing.assert_allclose(statistics["mean"], z.mean((0, 1, 2, 3, 4)), atol=0.01)
        np.testing.assert_allclose(statistics["std"], z.std((0, 1, 2, 3, 4)), rtol=0.01)


class TestWriting:
    def test_twice_gives_the_same_bytes(self, folder, tmp_path):
        write_latents(tmp_path, make_plan(), BAD)
        for path in folder.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path

    def test_finished_shards_are_kept_and_others_written_again(self, copy):
        assert shards.unfinished(copy, make_plan()) == []
        shard = copy / make_plan().shard_name(3)
        content = shard.read_bytes()
        shard.write_bytes(content[:-1])
        (copy / make_plan().shard_name(0)).unlink()
        (copy / "progress" / "00001.json").unlink()
        assert shards.unfinished(copy, make_plan()) == [0, 1, 3]
        write_latents(copy, make_plan(), BAD)
        assert shard.read_bytes() == content
        assert len(open_latents(copy, verify=True)) == len(GOOD)

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        plan = make_plan()
        (tmp_path / f".{plan.shard_name(1)}.0badf00d").touch()
        write_latents(tmp_path, plan)
        assert not list(tmp_path.glob(".*"))

    def test_a_shard_that_fails_leaves_nothing(self, tmp_path):
        def failing():
            yield from batches(make_plan(), 0)
            raise KeyboardInterrupt

        shards.begin(tmp_path, make_plan())
        with pytest.raises(KeyboardInterrupt):
            shards.write_shard(tmp_path, make_plan(), 0, failing(), {})
        assert [path.name for path in tmp_path.iterdir()] == ["progress"]
        assert shards.unfinished(tmp_path, make_plan()) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"source": "folder:/other"}, "source 'folder:/images' instead of 'folder:/other'"),
            ({"source_files": "0"}, "source_files"),
            ({"latent_shape": (8, 8, 3)}, r"latent_shape \[4, 6, 3\] instead of \[8, 8, 3\]"),
            ({"codec": make_plan().codec | {"weights": "0"}}, "codec.weights 'fedcba9876543210' instead of '0'"),
            ({"records_per_shard": 6}, "records_per_shard 5 instead of 6"),
            ({"class_names": ("ant", "bee")}, "class_names"),
        ],
    )
    def test_another_plan_is_refused(self, copy, changes, message):
        with pytest.raises(DataError, match=rf"holds other latents: {message}.*another folder"):
            shards.begin(copy, make_plan(**changes))

    def test_values_that_are_not_finite_are_refused(self, tmp_path):
        moments = np.full((1, 2, 2, *SHAPE), np.inf, np.float16)
        shards.begin(tmp_path, make_plan())
        with pytest.raises(DataError, match="images 3 to 3 are not finite"):
            shards.write_shard(tmp_path, make_plan(), 0, iter([(moments, [0], [3])]), {})

    def test_only_bad_images_are_an_error(self, tmp_path):
        with pytest.raises(DataError, match=r"not one of 23 images can be read.*not an image"):
            write_latents(tmp_path, make_plan(), range(23))

    def test_a_folder_that_cannot_be_made_is_an_error(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="file could not be written"):
            shards.begin(tmp_path / "file", make_plan())


class TestSource:
    def test_says_what_it_is(self, folder, source):
        assert source.name == f"latents:{folder}[train]"
        assert (source.num_classes, source.class_names) == (3, ("ant", "bee", "cow"))
        assert source.image_shape == SHAPE
        assert source.bad_files == {}
        assert source.codec == make_plan().codec
        assert len(source) == len(GOOD)

    @given(data=st.data())
    def test_reads_what_was_written(self, source, data):
        rows = data.draw(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.booleans()), min_size=1, max_size=40))
        indices, mirrored = (np.array(column) for column in zip(*rows, strict=True))
        batch = source.read(indices, mirrored)
        numbers = np.array(GOOD)[indices]
        assert {key: value.dtype for key, value in batch.items()} == {
            "moments": np.float16,
            "label": np.int32,
            "index": np.int64,
        }
        np.testing.assert_array_equal(batch["index"], numbers)
        np.testing.assert_array_equal(batch["label"], numbers % 3)
        np.testing.assert_array_equal(batch["moments"], values(make_plan())[numbers, mirrored.astype(int)])

    def test_batches_are_the_callers_own(self, source):
        arguments = np.array([3, 4]), np.array([True, False])
        batch = source.read(*arguments)
        for value in batch.values():
            value[...] = 0
        assert source.read(*arguments)["moments"].any()

    def test_opens_by_name(self, tmp_path):
        write_latents(tmp_path, make_plan(latent_shape=(4, 4, 16), source_split="validation[:50%]"))
        options = {"image_size": 4, "channels": 16}
        source = open_source(f"latents:{tmp_path}", split="validation", **options, in_memory=True, verify=True)
        assert source.read(np.array([0]), np.array([False]))["moments"].shape == (1, 2, 4, 4, 16)
        with pytest.raises(DataError, match="no split 'train'; these are of 'validation'"):
            open_source(f"latents:{tmp_path}", split="train", **options)
        with pytest.raises(DataError, match=r"image_size=4, channels=4; the latents are image_size=4, channels=16"):
            open_source(f"latents:{tmp_path}", split="validation", image_size=4, channels=4)

    def test_what_is_not_finished_is_an_error(self, copy, tmp_path):
        (copy / "latents.json").unlink()
        for path in (copy, tmp_path / "none"):
            with pytest.raises(DataError, match=r"latents\.json is missing"):
                open_latents(path)

    def test_a_missing_shard_is_an_error(self, copy):
        shard = copy / make_plan().shard_name(2)
        shard.unlink()
        with pytest.raises(DataError, match=rf"{shard.name} cannot be read.*No such file"):
            open_latents(copy)

    def test_a_truncated_shard_is_an_error(self, copy):
        shard = copy / make_plan().shard_name(0)
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(DataError, match=f"{shard.name} has .* bytes instead of 4 and"):
            open_latents(copy)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_flipped_bit_is_found_when_it_is_read(self, copy, in_memory):
        shard = copy / make_plan().shard_name(3)
        content = bytearray(shard.read_bytes())
        content[content.index(values(make_plan())[16].tobytes()[:20])] ^= 1
        shard.write_bytes(content)
        with pytest.raises(DataError, match=f"{shard.name} is damaged"):
            open_latents(copy, in_memory=in_memory).read(np.array([GOOD.index(16)]), np.array([True]))
        with pytest.raises(DataError, match=f"{shard.name} is not what was written"):
            open_latents(copy, verify=True)

    def test_an_exchanged_shard_is_found_by_its_checksum(self, copy, tmp_path):
        plan, other = make_plan(), tmp_path / "other"
        shards.begin(other, plan)
        shards.write_shard(other, plan, 3, ((-moments, *rest) for moments, *rest in batches(plan, 3)), {})
        shutil.copy(other / plan.shard_name(3), copy)
        open_latents(copy)
        with pytest.raises(DataError, match=f"{plan.shard_name(3)} is not what was written"):
            open_latents(copy, verify=True)

    def test_records_of_another_shape_are_an_error(self, copy):
        index = json.loads((copy / "latents.json").read_text())
        index["latent_shape"] = [6, 4, 2]
        (copy / "latents.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="record 0 has 640 bytes instead of 448"):
            open_latents(copy, size=(6, 4, 2))

    def test_records_that_are_laid_out_differently_are_an_error(self, folder, monkeypatch):
        feature = shards._feature
        monkeypatch.setattr(shards, "_feature", lambda name, *rest: feature(name[::-1], *rest))
        with pytest.raises(DataError, match=r"does not fit latents\.json: its records are not moments"):
            open_latents(folder)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("}", ""),
            ('"format": 1', '"format": 2'),
            ('"latent_shape": [', '"latent_shape": ["a",'),
            ('"records": 4', '"records": "four"'),
            ('"shards": [', '"shards": [3,'),
            ('"class_names"', '"classes"'),
            ('"sha256"', '"sha"'),
        ],
    )
    def test_a_damaged_description_is_an_error(self, copy, old, new):
        path = copy / "latents.json"
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(DataError, match=r"latents\.json (is damaged|cannot be read as JSON)|has the format 2"):
            open_latents(copy)

    def test_a_description_that_is_no_object_is_an_error(self, copy):
        (copy / "latents.json").write_text("[1]")
        with pytest.raises(DataError, match="holds a list"):
            open_latents(copy)


def loader(source, *, rows=range(8), step=0, threads=0):
    return make_loader(
        source, batch_size=8, rows=rows, seed=3, start_step=step, flip=True, num_threads=threads, prefetch=threads
    )


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


class TestLoader:
    def test_processes_load_the_rows_of_the_global_batch_even_if_their_number_changes(self, source):
        whole = loader(source)
        for step in range(12):
            processes = (1, 2, 4, 8)[step // 3]
            parts = [next(loader(source, rows=rows, step=step)) for rows in np.arange(8).reshape(processes, -1)]
            assert_equal({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, next(whole))

    def test_a_late_start_reads_one_batch_and_no_more(self, source, monkeypatch):
        read, asked = source.read, []
        monkeypatch.setattr(source, "read", lambda *arguments: asked.append(arguments) or read(*arguments))
        epoch = np.concatenate([next(loader(source, step=10**6 + i))["index"] for i in range(2)])
        assert [len(indices) for indices, _ in asked] == [8, 8]
        assert sorted(epoch.tolist()) == GOOD

    def test_memory_and_threads_change_nothing(self, folder, source):
        threaded = loader(source, threads=3)
        for _, a, b in zip(range(10), threaded, loader(open_latents(folder)), strict=False):
            assert_equal(a, b)
        threaded.close()

    def test_both_mirror_images_are_used(self, source):
        batches = loader(source)
        seen = set()
        for _ in range(20):
            batch = next(batches)
            for moments, number in zip(batch["moments"], batch["index"], strict=True):
                both = values(make_plan())[number]
                seen.add((int(number), int(np.array_equal(moments, both[1]))))
        assert len(seen) == 2 * len(GOOD)

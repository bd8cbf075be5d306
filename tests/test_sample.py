"""Sampling at scale: in this process, and as a user runs the command, ended by errors, signals and kills."""

import dataclasses
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import environment
from configs.tiny import get_config
from helpers import random_params, tiny_config
from PIL import Image

from sddit_jax.config.border import resolve, to_dict
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import ParallelConfig, SamplingConfig
from sddit_jax.errors import UserError
from sddit_jax.evaluation.reference_files import open_evaluation_file
from sddit_jax.generation import drawing
from sddit_jax.generation.decoding import AS_IT_IS
from sddit_jax.generation.drawing import Generator, draw_class_grid, draw_samples, draw_strip, make_generate
from sddit_jax.generation.sample_folder import SampleFolder
from sddit_jax.parallel.sharding import make_mesh, replicated
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.pictures import grid
from sddit_jax.runs.versions import versions
from sddit_jax.sampling.labels import labels_of
from sddit_jax.sampling.sampler import make_sample, schedule

ROOT = Path(__file__).parents[1]
RECORD = {"workdir": "/run", "seed": 3, "labels": "random", "codec": {"name": "pixels"}}
SAMPLING = SamplingConfig(steps=3, guidance=1.5)


class TestLabels:
    def test_a_label_is_a_function_of_its_index(self):
        for spec in ("balanced", "random", "3,1,4"):
            whole = labels_of(spec, range(1000), 7, 5)
            assert whole.dtype == np.int32
            for part in (range(0, 1), range(13, 40), range(500, 1000)):
                np.testing.assert_array_equal(labels_of(spec, part, 7, 5), whole[part.start : part.stop])
        assert labels_of("3,1,4", range(2, 7), 7, 0).tolist() == [4, 3, 1, 4, 3]
        assert labels_of("balanced", range(5, 9), 7, 0).tolist() == [5, 6, 0, 1]
        for spec in ("balanced", "random"):
            assert not labels_of(spec, range(3), 0, 0).any()

    def test_random_labels_are_uniform_and_of_the_seed(self):
        counts = np.bincount(labels_of("random", range(100_000), 10, 0), minlength=10)
        # Chi-square with 9 degrees of freedom exceeds 27.9 once in 1,000.
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
        pairs = labels_of("random", range(100_000), 10, 0).reshape(-1, 2) @ [10, 1]
        # 99 degrees of freedom: 149 once in 1,000.
        assert ((np.bincount(pairs, minlength=100) - 500) ** 2 / 500).sum() < 149
        assert (labels_of("random", range(1000), 10, 1) == labels_of("random", range(1000), 10, 0)).mean() < 0.2

    @pytest.mark.parametrize(
        ("spec", "classes", "message"),
        [("1,7", 7, "7, but the model's labels are 0 to 6"), ("a", 7, "not balanced"), ("1", 0, "without labels")],
    )
    def test_wrong_labels_are_explained(self, spec, classes, message):
        with pytest.raises(UserError, match=message):
            labels_of(spec, range(3), classes, 0)


def make_model(
    devices: int = 1, sampling: SamplingConfig = SAMPLING, dtype: str = "float32", labels: str = "random"
) -> Generator:
    parts = make_parts(tiny_config(changes={"model.dtype": dtype}))
    mesh = make_mesh(ParallelConfig(), jax.devices()[:devices])
    return Generator(
        lambda levels=None: make_sample(parts.network, parts.diffusion, parts.codec, sampling, levels=levels),
        schedule(parts.diffusion, sampling),
        AS_IT_IS,
        mesh,
        jax.device_put(random_params(parts.network.init), replicated(mesh)),
        3,
        lambda indices: labels_of("random", indices, parts.network.model.num_classes, 3),
    )


@pytest.fixture(scope="module")
def model() -> Generator:
    """On one device; all who draw from it share its compiled sampler."""
    model = make_model()
    sample = jax.jit(model.sample())
    return dataclasses.replace(model, sample=lambda levels=None: sample if levels is None else model.sample(levels))


def folder_of(path: Path, indices: range = range(20), batch_size: int = 8, record: dict = RECORD, **more):
    return SampleFolder(path, record, "1 x cpu", indices, batch_size, **more)


def images_of(path: Path) -> np.ndarray:
    return np.load(path / "samples.npz", allow_pickle=False)["arr_0"].astype(int)


def digests(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run: images 0 to 19."""
    path = tmp_path_factory.mktemp("whole")
    draw_samples(model, folder_of(path))
    return path


class TestDrawing:
    def test_what_others_read(self, model, whole):
        assert sorted(digests(whole)) == ["grid.png", "samples.json", "samples.npz"]
        with np.load(whole / "samples.npz", allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
        assert (images.dtype, images.shape) == (np.uint8, (20, 8, 8, 3))
        assert images.std() > 30
        np.testing.assert_array_equal(labels, model.labels(range(20)))
        opened = open_evaluation_file(whole / "samples.npz")
        np.testing.assert_array_equal(np.concatenate(list(opened.images.batches(7))), images)
        assert json.loads((whole / "samples.json").read_text()) == RECORD | {"environments": ["1 x cpu"]}

    def test_slices_have_the_bits_of_the_whole(self, model, whole, tmp_path):
        for number, indices in enumerate([range(0, 5), range(5, 17), range(17, 20)]):
            draw_samples(model, folder_of(tmp_path / str(number), indices))
        parts = [np.load(tmp_path / str(number) / "samples.npz") for number in range(3)]
        for name in ("arr_0", "arr_1"):
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, np.load(whole / "samples.npz")[name])

    @pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (2, 6), (8, 8)])
    def test_devices_and_batch_sizes_change_two_levels_at_most(self, whole, tmp_path, devices, batch_size):
        draw_samples(make_model(devices), folder_of(tmp_path, batch_size=batch_size))
        assert np.abs(images_of(tmp_path) - images_of(whole)).max() <= 2

    def test_ended_after_each_batch_and_while_it_completes_it_ends_with_the_same_bytes(
        self, model, whole, tmp_path, monkeypatch
    ):
        write = SampleFolder.write

        def once(self, start, images):
            """The second batch of a process is not written whole."""
            if self.written:
                (self.path / "parts" / f".{start:010d}.npy.0badf00d").write_bytes(b"half")
                raise MemoryError
            self.written = True
            write(self, start, images)

        monkeypatch.setattr(SampleFolder, "write", once)
        monkeypatch.setattr(SampleFolder, "written", False, raising=False)
        for done in (1, 2):
            with pytest.raises(MemoryError):
                draw_samples(model, folder_of(tmp_path))
            assert len(list(tmp_path.glob("parts/*.npy"))) == done

        monkeypatch.setattr(SampleFolder, "write", write)

        def fail(*args, **kwargs):
            raise MemoryError

        for place in (
            "sddit_jax.generation.sample_folder._write_array",
            "sddit_jax.generation.sample_folder.save_grid",
            "shutil.rmtree",
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, fail)
                with pytest.raises(MemoryError):
                    draw_samples(model, folder_of(tmp_path))
        draw_samples(model, folder_of(tmp_path))
        assert digests(tmp_path) == digests(whole)

    def test_a_damaged_batch_is_computed_again(self, model, whole, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(SampleFolder, "finish", lambda *args: None)
            draw_samples(model, folder_of(tmp_path))
        part = tmp_path / "parts" / "0000000008.npy"
        part.write_bytes(part.read_bytes()[:-1])
        folder = folder_of(tmp_path)
        assert folder.begin() == [8]
        folder._lock.close()
        draw_samples(model, folder_of(tmp_path))
        assert digests(tmp_path) == digests(whole)

    def test_a_finished_folder_is_left_as_it_is(self, model, whole, monkeypatch):
        monkeypatch.setattr(drawing, "gather_rows", None)
        times = [path.stat().st_mtime_ns for path in sorted(whole.iterdir())]
        draw_samples(model, folder_of(whole, record=RECORD | {"workdir": "/moved"}))
        assert times == [path.stat().st_mtime_ns for path in sorted(whole.iterdir())]

    def test_pictures_have_the_pixels_of_the_npz(self, model, whole, tmp_path):
        indices = range(5, 20)
        folder = folder_of(tmp_path, indices, png=True)
        assert folder.begin() == [0, 8, 16]
        folder._lock.close()
        draw_samples(model, folder_of(tmp_path, indices, png=True))
        images, labels = np.load(whole / "samples.npz").values()
        lines = (tmp_path / "labels.txt").read_text().splitlines()
        assert lines == [f"{i:010d}.png {labels[i]}" for i in indices]
        assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [line.split()[0] for line in lines]
        for i in indices:
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / f"{i:010d}.png")), images[i])
        (tmp_path / "samples.json").unlink()
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "plan.json").write_text(json.dumps(RECORD))
        (tmp_path / "images" / "0000000009.png").unlink()
        folder = folder_of(tmp_path, indices, png=True)
        assert folder.begin() == [8]

    def test_begun_on_one_device_it_goes_on_on_four_with_a_warning(self, whole, tmp_path, monkeypatch, caplog):
        write = SampleFolder.write

        def twice(self, start, images):
            if start == 12:
                raise MemoryError
            write(self, start, images)

        with monkeypatch.context() as patch:
            patch.setattr(SampleFolder, "write", twice)
            with pytest.raises(MemoryError):
                draw_samples(make_model(1), folder_of(tmp_path, batch_size=6))
        assert not caplog.messages
        draw_samples(make_model(4), SampleFolder(tmp_path, RECORD, "4 x cpu", range(20), 6))
        assert any("was begun on 1 x cpu and is continued on 4 x cpu" in message for message in caplog.messages)
        assert any("batches of 6 take as long as batches of 8" in message for message in caplog.messages)
        assert np.abs(images_of(tmp_path) - images_of(whole)).max() <= 2
        record = json.loads((tmp_path / "samples.json").read_text())
        assert record == RECORD | {"environments": ["1 x cpu", "4 x cpu"]}


class TestFolder:
    def test_samples_of_another_record_are_refused(self, whole, tmp_path):
        with pytest.raises(UserError, match=r"seed 3 instead of 4; use another --output"):
            folder_of(whole, record=RECORD | {"seed": 4}).begin()
        folder_of(tmp_path).begin()
        with pytest.raises(UserError, match=r"codec/name 'pixels' instead of 'latents'"):
            folder_of(tmp_path, record=RECORD | {"codec": {"name": "latents"}}, kind="latents").begin()

    def test_older_latents_or_samples_are_not_left_beside_others(self, tmp_path):
        (tmp_path / "latents.json").write_text(json.dumps(RECORD | {"autoencoder_weights": ""}))
        with pytest.raises(UserError, match="autoencoder_weights '' instead of 'a'"):
            folder_of(tmp_path, record=RECORD | {"autoencoder_weights": "a"}).begin()
        (tmp_path / "latents.json").rename(tmp_path / "latents.npz")
        with pytest.raises(UserError, match=r"latents.npz without a record"):
            folder_of(tmp_path).begin()

    def test_a_damaged_picture_is_computed_again(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)

        def missing() -> list[int]:
            folder = folder_of(tmp_path, range(2), 1, png=True)
            found = folder.begin()
            folder._lock.close()
            return found

        folder = folder_of(tmp_path, range(2), 1, png=True)
        for start in folder.begin():
            folder.write(start, images[start : start + 1])
        folder._lock.close()
        assert missing() == []
        picture = tmp_path / "images" / "0000000001.png"
        content = picture.read_bytes()
        for length in range(len(content)):
            picture.write_bytes(content[:length])
            assert missing() == [1], length
        for place in range(8, len(content)):
            picture.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert missing() == [1], place

    def test_names_of_pictures_are_in_order(self, tmp_path):
        indices = range(999_998, 1_000_003)
        folder = folder_of(tmp_path, indices, 4, png=True)
        for start in folder.begin():
            values = np.arange(start, start + 4) % 256
            folder.write(start, np.tile(values.astype(np.uint8)[:, None, None, None], (1, 8, 8, 1)))
        folder.finish(np.arange(5, dtype=np.int32), lambda: None)
        values = [np.asarray(Image.open(path))[0, 0] for path in sorted((tmp_path / "images").iterdir())]
        assert values == [index % 256 for index in indices]

    def test_two_processes_do_not_write_to_one_folder(self, tmp_path):
        first = folder_of(tmp_path)
        first.begin()
        with pytest.raises(UserError, match="another process"):
            folder_of(tmp_path).begin()

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=rf"--output={tmp_path}/file could not be written"):
            folder_of(tmp_path / "file").begin()

    def test_all_devices_that_computed_are_recorded(self, tmp_path):
        folder = folder_of(tmp_path)
        folder.begin()
        folder._lock.close()
        folder = SampleFolder(tmp_path, RECORD, "8 x tpu", range(20), 8)
        assert folder.begin() == [0, 8, 16]
        for start in folder.starts:
            folder.write(start, np.zeros((8, 4, 4, 3), np.uint8))
        folder.finish(np.zeros(20, np.int32), lambda: None)
        assert json.loads((tmp_path / "samples.json").read_text())["environments"] == ["1 x cpu", "8 x tpu"]

    def test_images_are_never_all_in_memory_and_the_bytes_have_no_time(self, tmp_path):
        image_BHWC = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
        digest = []
        for name in "ab":
            folder = folder_of(tmp_path / name, range(64 * 32), 64)
            tracemalloc.start()
            for start in folder.begin():
                folder.write(start, image_BHWC + np.uint8(start // 64))
            folder.finish(np.arange(64 * 32, dtype=np.int32), lambda: None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 * image_BHWC.nbytes
            digest.append(digests(tmp_path / name))
            time.sleep(2 if name == "a" else 0)  # The time of a file in a zip has steps of two seconds.
        assert digest[0] == digest[1]
        with zipfile.ZipFile(tmp_path / "a" / "samples.npz") as archive:
            assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
            assert archive.testzip() is None
        images = np.load(tmp_path / "a" / "samples.npz", mmap_mode="r")["arr_0"]
        for start in (0, 64, 64 * 31):
            np.testing.assert_array_equal(images[start : start + 64], image_BHWC + np.uint8(start // 64))


class TestPictures:
    def test_a_strip_goes_from_noise_to_the_image(self, tmp_path, monkeypatch):
        model = make_model(sampling=SamplingConfig(steps=3))
        shown = []
        monkeypatch.setattr(drawing, "save_labelled_grid", lambda *args: shown.append(args))
        draw_strip(model, 2, tmp_path / "strip.png", RECORD)
        ((images, rows, columns, corner, _, _),) = shown
        assert images.shape == (4, 3, 8, 8, 3)
        assert rows == [str(label) for label in model.labels(range(2, 6))]
        assert (columns[0], columns[-1], corner) == ("80", "0.002", "sigma")
        generate = make_generate(model.sample(), model.mesh, 4)
        expected = generate(model.params, model.seed, model.labels(range(2, 6)), np.arange(2, 6))
        np.testing.assert_array_equal(images[:, -1], expected)
        # One step goes from the highest noise level to 0, which is where the denoised image lies.
        at_first = make_generate(make_model(sampling=SamplingConfig(steps=1)).sample(), model.mesh, 4)
        expected = at_first(model.params, model.seed, model.labels(range(2, 6)), np.arange(2, 6))
        np.testing.assert_array_equal(images[:, 0], expected)
        assert np.abs(images[:, 1].astype(int) - images[:, 0]).max() > 10

    def test_a_class_grid_has_the_same_noise_in_a_column(self, model, tmp_path):
        draw_class_grid(model, [2, 0], 5, tmp_path / "grid.png", RECORD)
        picture = Image.open(tmp_path / "grid.png")
        assert json.loads(picture.text["record"]) == RECORD
        generate = make_generate(model.sample(), model.mesh, 8)
        rows = [generate(model.params, 3, np.full(8, label), np.arange(5, 13)) for label in (2, 0)]
        cells = grid(np.concatenate(rows), columns=8, scale=8, gap=4)
        np.testing.assert_array_equal(np.asarray(picture)[-cells.shape[0] :, -cells.shape[1] :], cells)
        assert np.abs(rows[0].astype(int) - rows[1]).max() > 10


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a run as training leaves it, with random weights."""
    path = tmp_path_factory.mktemp("run")
    config = resolve(get_config())
    parts = make_parts(config)
    params = random_params(lambda key: parts.init_state(key)["params"])
    state = jax.device_put(parts.state_from(params))
    checkpointer = Checkpointer(path / "checkpoints")
    checkpointer.save(60, state, {"config": to_dict(config), "codec": parts.codec.record()})
    checkpointer.wait()
    checkpointer.close()
    return path


@pytest.fixture(scope="session")
def start(run):
    """start(*arguments) -> a process that samples on one device."""

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "sddit_jax.sample", f"--workdir={run}", "--steps=3", *map(str, arguments)],
            env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def sample(run, command):
    """sample(*arguments) -> what the command said on one device."""

    def sample(*arguments: str, code: int = 0) -> str:
        done = command("sample", f"--workdir={run}", "--steps=3", *arguments)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return sample


MANY = ("--num_samples=600", "--batch_size=1", "--labels=random")


@pytest.fixture(scope="session")
def many(sample, tmp_path_factory) -> Path:
    """The output of an uninterrupted command with many batches."""
    path = tmp_path_factory.mktemp("many")
    sample(f"--output={path}", *MANY)
    return path


def parts(output: Path) -> int:
    return len(list(output.glob("parts/*.npy")))


def wait_for(condition, process: subprocess.Popen) -> bool:
    """Whether it came true before the process ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if condition():
            return process.poll() is None
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    raise TimeoutError


class TestCommand:
    def test_writes_images_and_how_they_were_made(self, sample, tmp_path):
        arguments = ("--num_samples=6", "--labels=3,1", "--solver=euler", "--strip", "--class_grid")
        assert "6 images of step 60" in sample(*arguments, f"--output={tmp_path}/a")
        images, labels = np.load(tmp_path / "a" / "samples.npz", allow_pickle=False).values()
        assert (images.dtype, images.shape) == (np.uint8, (6, 8, 8, 1))
        assert labels.tolist() == [3, 1, 3, 1, 3, 1]
        record = json.loads((tmp_path / "a" / "samples.json").read_text())
        assert (record["checkpoint_step"], record["first_index"], record["count"], record["seed"]) == (60, 0, 6, 0)
        assert (record["sampler"]["name"], record["guidance"], record["batch_size"]) == ("euler", 1.0, 64)
        assert record["noise_levels"] == pytest.approx([80, 2.515218, 0.002, 0])
        assert all(key.startswith("ema/default/") for key in record["checkpoint_digests"])
        (environment,) = record["environments"]
        assert all(f"{name} {version}, " in environment for name, version in versions().items())
        names = ["class_grid.png", "grid.png", "samples.json", "samples.npz", "strip.png"]
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
        with Image.open(tmp_path / "a" / "class_grid.png") as picture:
            assert picture.size[1] > 2 * 65
        arguments = ("--num_samples=3", "--first=3", "--labels=3,1", "--solver=euler", "--format=png")
        sample(*arguments, f"--output={tmp_path}/b")
        for i in (3, 4, 5):
            with Image.open(tmp_path / "b" / "images" / f"{i:010d}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), images[i, :, :, 0])
        error = sample(*arguments, f"--output={tmp_path}/a", code=2)
        assert f"error: {tmp_path}/a holds other samples: count 6 instead of 3" in error

    @pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_a_signal_ends_it_and_the_same_command_goes_on(self, start, sample, many, tmp_path, number):
        process = start(f"--output={tmp_path}", *MANY)
        assert wait_for(lambda: parts(tmp_path) > 3, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 75, stderr
        assert f"error: {number.name}: {parts(tmp_path)} of 600 images are in {tmp_path}; the same command" in stderr
        assert re.search(r"image \d+/600, .* images/s", stderr)
        sample(f"--output={tmp_path}", *MANY)
        assert digests(tmp_path) == digests(many)

    @pytest.mark.slow
    def test_killed_ten_times_it_ends_as_if_never_killed(self, start, sample, many, tmp_path):
        rng = random.Random(0)
        for kill in range(10):
            process, before = start(f"--output={tmp_path}", *MANY), parts(tmp_path)
            if kill < 8:
                wanted = before + rng.randint(1, 60)
                assert wait_for(lambda wanted=wanted: parts(tmp_path) >= wanted, process)
                time.sleep(rng.uniform(0, 0.005))
            else:
                assert wait_for(lambda: list(tmp_path.glob("parts/.samples.npz.*")), process)
            process.kill()
            process.communicate()
        assert not (tmp_path / "samples.json").exists()
        sample(f"--output={tmp_path}", *MANY)
        assert digests(tmp_path) == digests(many)

    def test_wrong_arguments_are_explained(self, sample, tmp_path):
        assert "--num_samples=0 is for" in sample("--num_samples=0", f"--output={tmp_path}/a", code=2)
        assert "indices end" in sample("--first=2147483640", f"--output={tmp_path}/a", code=2)
        assert not (tmp_path / "a").exists()

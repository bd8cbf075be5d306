"""Latents from images: in this process, and as a user runs the command, ended by errors, signals and kills."""

import hashlib
import importlib.util
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from autoencoders import make_kl
from commands import environment
from latents import imagenet_of_tfds
from PIL import Image

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data import preparation
from sddit_jax.data.images import read_image
from sddit_jax.data.latents import LatentsSource
from sddit_jax.data.sources import open_source
from sddit_jax.errors import ConfigError, DataError
from sddit_jax.files import weights_hash
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.parallel import sharding
from sddit_jax.weights.autoencoder import load_autoencoder

ROOT = Path(__file__).parents[1]
SIZE = 32
SHAPE = (4, 4, 4)
WIDTHS = (8, 8, 16, 16)


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A folder of diffusers with a small random autoencoder."""
    path = tmp_path_factory.mktemp("vae")
    make_kl(block_out_channels=WIDTHS).save_pretrained(path)
    return path


def photo(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    """A smooth image that is not its own mirror image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """120 good images of two classes."""
    path = tmp_path_factory.mktemp("images")
    for i in range(120):
        file = path / ("ant", "bee")[i >= 35] / f"{i:03}.jpg"
        file.parent.mkdir(exist_ok=True)
        photo(i).save(file, quality=90)
    return path


def run(spec: str, vae: Path, output: Path, *, split: str = "train", batch_size: int = 8, records_per_shard: int = 25):
    """The command, in this process; returns the source, the autoencoder and its parameters."""
    config, params = load_autoencoder(vae)
    source = open_source(spec, split=split, image_size=SIZE, channels=3)
    autoencoder = Autoencoder(config)
    plan = preparation.make_plan(
        source, split, autoencoder, params, batch_size=batch_size, records_per_shard=records_per_shard
    )
    encode = preparation.make_encode(autoencoder, params, sharding.make_mesh(ParallelConfig()), batch_size)
    preparation.prepare(source, plan, encode, output, num_threads=2)
    return source, autoencoder, params


def assert_encoded(latents: LatentsSource, source, autoencoder, params) -> None:
    """Every record holds what the autoencoder makes of its image and of its mirror image."""
    everything = np.arange(len(latents))
    encode = jax.jit(autoencoder.encode)
    for mirrored in (False, True):
        batch = latents.read(everything, np.full(len(latents), mirrored))
        for moments, label, index in zip(batch["moments"], batch["label"], batch["index"], strict=True):
            image_HWC, expected_label = source.load(int(index))
            assert label == expected_label
            image_HWC = image_HWC[:, ::-1] if mirrored else image_HWC
            expected = np.concatenate(encode(params, image_HWC[None].astype(np.float32) / 127.5 - 1))
            np.testing.assert_allclose(moments, expected, rtol=2e-3, atol=2e-4)


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a folder of latents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestLatents:
    def test_are_those_of_the_images_and_of_their_mirror_images(self, images, vae, tmp_path):
        source, autoencoder, params = run(f"folder:{images}", vae, tmp_path)
        latents = LatentsSource(tmp_path, "train", SHAPE, verify=True)
        assert len(latents) == 120
        assert latents.class_names == ("ant", "bee")
        assert_encoded(latents, source, autoencoder, params)
        assert latents.codec == {
            "name": "latents",
            "weights": weights_hash(params["encoder"]),
            "channels": 4,
            "factor": 8,
            "scaling_factor": 0.18215,
            "shift_factor": 0.0,
            "resolution": SIZE,
            "pixel_range": [-1, 1],
        }

    def test_are_read_by_tfds(self, images, vae, tmp_path):
        import tensorflow_datasets as tfds

        run(f"folder:{images}", vae, tmp_path)
        records = tfds.builder_from_directory(tmp_path).as_data_source("train")
        latents = LatentsSource(tmp_path, "train", SHAPE)
        assert len(records) == 120
        for i in (0, 24, 25, 119):
            for mirrored in (False, True):
                batch = latents.read(np.array([i]), np.array([mirrored]))
                np.testing.assert_array_equal(records[i]["moments"][int(mirrored)], batch["moments"][0])
            assert (records[i]["label"], records[i]["index"]) == (int(i >= 35), i)

    def test_of_images_that_are_not_plain(self, vae, tmp_path):
        folder = tmp_path / "images"
        folder.mkdir()
        bent = Image.Exif()
        bent[0x0112] = 6
        good = {
            "cmyk.jpg": (photo(1).convert("CMYK"), {}),
            "exif.jpg": (photo(2), {"exif": bent}),
            "grey16.png": (Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32), {}),
            "palette.png": (photo(3).quantize(16), {}),
            "transparent.png": (photo(4).convert("RGBA"), {}),
            "webp.webp": (photo(5), {}),
            "huge.jpg": (photo(6, 900, 600), {}),
            "small.png": (photo(7, 9, 12), {}),
        }
        for name, (image, options) in good.items():
            image.save(folder / name, **options)
        Image.new("1", (20000, 20000)).save(folder / "bomb.png")
        (folder / "empty.jpg").touch()
        (folder / "gone.jpg").symlink_to(folder / "nothing.jpg")
        (folder / "text.png").write_text("no image")
        (folder / "truncated.jpg").write_bytes((folder / "huge.jpg").read_bytes()[:2000])
        photo(8, 2000, 10).save(folder / "thin.png")
        output = tmp_path / "out"
        source, autoencoder, params = run(f"folder:{folder}", vae, output, records_per_shard=5)
        latents = LatentsSource(output, "train", SHAPE)
        batch = latents.read(np.arange(len(latents)), np.zeros(len(latents), bool))
        assert [Path(source.locate(i)).name for i in batch["index"]] == sorted(good)
        assert_encoded(latents, source, autoencoder, params)
        listed = json.loads((output / "bad_files.json").read_text())
        reasons = {Path(path).name: reason for path, reason in listed.items()}
        expected = {"bomb.png": "DecompressionBombError", "empty.jpg": "not a PNG", "gone.jpg": "FileNotFoundError",
                    "text.png": "not a PNG", "truncated.jpg": "truncated", "thin.png": "thinner"}  # fmt: skip
        assert reasons.keys() == expected.keys()
        for name, reason in expected.items():
            assert reason in reasons[name]

    def test_of_imagenet_as_tfds_gives_it(self, vae, tmp_path):
        with imagenet_of_tfds(12, photo):
            source, autoencoder, params = run("tfds:imagenet2012", vae, tmp_path, split="validation[:12]")
        latents = LatentsSource(tmp_path, "validation", SHAPE)
        assert latents.num_classes == 1000
        assert latents.class_names[0] == "n01440764"
        assert latents.read(np.arange(12), np.zeros(12, bool))["label"].tolist() == [83 * i for i in range(12)]
        assert_encoded(latents, source, autoencoder, params)

    def test_of_real_photographs(self, vae, tmp_path):
        spec = importlib.util.find_spec("foolbox")  # finds it without importing it
        assert spec is not None, "ImageNet photographs come with foolbox: pip install -e '.[test]'"
        photographs = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
        assert len(photographs) == 20
        for path in photographs:
            label = path.stem.split("_")[-1]
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / label / path.name).symlink_to(path)
        source, autoencoder, params = run(f"folder:{tmp_path}/images", vae, tmp_path / "out")
        latents = LatentsSource(tmp_path / "out", "train", SHAPE)
        assert len(latents) == 20
        assert len(latents.class_names) == 19
        assert_encoded(latents, source, autoencoder, params)
        first = source.load(0)[0]
        np.testing.assert_array_equal(first, read_image(source.locate(0), size=SIZE, channels=3))

    def test_of_a_size_that_the_autoencoder_does_not_take_are_refused(self, images, vae):
        config, params = load_autoencoder(vae)
        source = open_source(f"folder:{images}", split="train", image_size=36, channels=3)
        with pytest.raises(ConfigError, match="36 x 36 pixels; this autoencoder needs multiples of 8"):
            preparation.make_plan(source, "train", Autoencoder(config), params, batch_size=8, records_per_shard=8)

    def test_go_on_only_with_what_they_were_begun_with(self, images, vae, tmp_path):
        run(f"folder:{images}", vae, tmp_path)
        with pytest.raises(DataError, match=r"holds other latents: batch_size 8 instead of 16"):
            run(f"folder:{images}", vae, tmp_path, batch_size=16)
        with pytest.raises(DataError, match=r"source_records 120 instead of 35"):
            run(f"folder:{images}/ant", vae, tmp_path)


@pytest.fixture(scope="session")
def flags(images, vae) -> list[str]:
    """All that the command needs but --output."""
    return [f"--source=folder:{images}", f"--vae={vae}", f"--resolution={SIZE}",
            "--batch_size=2", "--records_per_shard=3", "--num_threads=2"]  # fmt: skip


@pytest.fixture
def start(flags):
    """Starts the command; arguments change its flags."""

    def begin(output: Path, *arguments: str, code: tuple[str, ...] = ("-m", "sddit_jax.prepare")) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *code, *flags, f"--output={output}", *arguments],
            env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return begin


@pytest.fixture(scope="session")
def prepare(command, flags):
    """Runs it to its end: exit code and what it said."""

    def complete(output: Path, *arguments: str) -> tuple[int, str]:
        done = command("prepare", *flags, f"--output={output}", *arguments)
        return done.returncode, done.stderr

    return complete


@pytest.fixture(scope="session")
def finished(prepare, tmp_path_factory):
    """The files of an uninterrupted run of the command."""
    output = tmp_path_factory.mktemp("finished")
    code, stderr = prepare(output)
    assert code == 0, stderr
    assert "image 120/120" in stderr
    assert "images/s" in stderr
    assert f"latents of 120 images are in {output}" in stderr
    return output


def wait_for_shards(output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list((output / "progress").glob("0*.json"))) >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(f"no {count} shards in {output}")


def kill_at_random(process: subprocess.Popen, output: Path, rng: random.Random) -> bool:
    """Kills it while it writes one of the next few shards; False if it was done before."""
    done = set(output.glob("progress/0*"))
    wanted = rng.randint(1, 2)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(set(output.glob("progress/0*")) - done) >= wanted:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    killed = process.poll() is None
    process.kill()
    process.communicate()
    return killed


class TestCommand:
    def test_done_twice_changes_nothing(self, prepare, finished):
        before = digests(finished)
        code, stderr = prepare(finished)
        assert code == 0, stderr
        assert digests(finished) == before

    @pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_a_signal_ends_it_and_the_same_command_goes_on(self, start, prepare, finished, tmp_path, number):
        process = start(tmp_path)
        wait_for_shards(tmp_path, 1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 75, stderr
        assert re.search(rf"error: {number.name}: finished shards are kept in {tmp_path}; the same command", stderr)
        assert not list(tmp_path.glob(".*"))
        assert prepare(tmp_path)[0] == 0
        assert digests(tmp_path) == digests(finished)

    def test_killed_once_it_ends_as_if_never_killed(self, start, prepare, finished, tmp_path):
        assert kill_at_random(start(tmp_path), tmp_path, random.Random(0))
        assert prepare(tmp_path)[0] == 0
        assert digests(tmp_path) == digests(finished)

    @pytest.mark.slow
    def test_killed_ten_times_it_ends_as_if_never_killed(self, start, prepare, finished, tmp_path):
        rng = random.Random(1)
        killed = [kill_at_random(start(tmp_path), tmp_path, rng) for _ in range(10)]
        assert sum(killed) == 10
        assert prepare(tmp_path)[0] == 0
        assert digests(tmp_path) == digests(finished)

    def test_a_damaged_shard_that_was_deleted_is_written_again(self, prepare, finished, tmp_path):
        assert prepare(tmp_path)[0] == 0
        next(tmp_path.glob("*00003-of*")).unlink()
        assert prepare(tmp_path)[0] == 0
        assert digests(tmp_path) == digests(finished)

    @pytest.mark.slow
    def test_two_processes_share_the_work(self, start, finished, tmp_path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            code = (
                f"import jax; jax.distributed.initialize('localhost:{port}', 2, {rank});"
                "from sddit_jax import cli, prepare; cli.run(prepare.main)"
            )
            processes.append(start(tmp_path, code=("-c", code)))
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        assert digests(tmp_path) == digests(finished)

    def test_processes_that_do_not_know_each_other_share_the_work(self, start, finished, tmp_path):
        processes = [start(tmp_path, f"--process_index={i}", "--process_count=3") for i in range(3)]
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        assert digests(tmp_path) == digests(finished)

    def test_the_same_work_done_twice_at_a_time_mixes_nothing(self, start, finished, tmp_path):
        processes = [start(tmp_path) for _ in range(2)]
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        assert digests(tmp_path) == digests(finished)

    def test_other_arguments_are_refused(self, prepare, finished, vae, tmp_path):
        before = digests(finished)
        other = tmp_path / "other"
        make_kl(block_out_channels=WIDTHS, latent_channels=8).save_pretrained(other)
        for flag, reason in [
            (f"--vae={other}", "codec.weights"),
            ("--resolution=40", "codec.resolution 32 instead of 40"),
            ("--scaling_factor=0.5", "codec.scaling_factor 0.18215 instead of 0.5"),
        ]:
            code, stderr = prepare(finished, flag)
            assert code == 2, stderr
            assert re.search(rf"error: {finished} holds other latents: .*{reason}", stderr)
        assert digests(finished) == before

    def test_wrong_arguments_are_explained(self, prepare, tmp_path):
        for flags, reason in [
            (["--source=digits"], "--source=digits: it should be folder:PATH or tfds:NAME"),
            ([f"--source=folder:{tmp_path}/none"], "none: not a folder"),
            ([f"--vae={tmp_path}"], "has no config.json"),
            (["--resolution=30"], "30 x 30 pixels; this autoencoder needs multiples of 8"),
            (["--dtype=float16"], "dtype"),
            (["--output="], "--output=DIR are needed"),
        ]:
            code, stderr = prepare(tmp_path / "out", *flags)
            assert code == 2, stderr
            assert "Traceback" not in stderr
            assert reason in next(line for line in stderr.splitlines() if line.startswith("error: "))
        assert not (tmp_path / "out").exists()

    def test_a_full_disk_is_named(self, start, tmp_path):
        """The size limit of a process stands for a disk with no room."""
        script = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "from sddit_jax import cli, prepare; import jax; jax.config.update('jax_enable_compilation_cache', False);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); cli.run(prepare.main)"
        )
        process = start(tmp_path, code=("-c", script))
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 2, stderr
        assert re.search(rf"error: {tmp_path}/latents-train\S+ could not be written: .*File too large", stderr)
        assert not list(tmp_path.glob("*latents*"))

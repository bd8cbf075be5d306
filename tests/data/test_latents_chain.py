"""From photographs to samples as a user does it: prepare, train, sample, decode."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from autoencoders import make_kl, make_tiny
from helpers import tiny_config
from latents import imagenet_of_tfds
from PIL import Image

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import default_config, imagenet
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data.preparation import make_encode, make_plan, prepare
from sddit_jax.data.sources import open_source
from sddit_jax.errors import ConfigError, WeightsError
from sddit_jax.generation.decoding import load_decode
from sddit_jax.method.codec import LatentCodec
from sddit_jax.method.train_step import clean, draw, step_key
from sddit_jax.models.autoencoder import Autoencoder
from sddit_jax.parallel.sharding import batch_sharding, make_mesh
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.weights.autoencoder import load_autoencoder

ROOT = Path(__file__).parents[2]
WIDTHS = (8, 8, 16, 16)


@pytest.fixture(scope="module")
def command(command):
    """With the exit code that is expected."""

    def run(name, *arguments, code=0):
        done = command(name, *arguments)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    make_kl(block_out_channels=WIDTHS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """ImageNet photographs by their class, from a package that ships some."""
    package = importlib.util.find_spec("foolbox")
    assert package is not None, "pip install -e '.[test]' installs foolbox, whose photographs this test reads"
    path = tmp_path_factory.mktemp("photographs")
    for file in sorted(Path(package.origin).parent.glob("data/imagenet_*.jpg")):
        folder = path / file.stem.rpartition("_")[2]
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    assert sum(1 for _ in path.rglob("*.jpg")) == 20
    return path


@pytest.fixture(scope="module")
def latents(command, photographs, vae, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents")
    command("prepare", f"--source=folder:{photographs}", f"--vae={vae}", "--resolution=64", f"--output={output}",
            "--batch_size=8", "--records_per_shard=8")  # fmt: skip
    return output


def config_of(latents):
    return f"--config={ROOT}/tests/configs/latents.py:{latents}"


@pytest.mark.slow
def test_photographs_become_samples(command, latents, vae, tmp_path):
    workdir, classes = tmp_path / "run", json.loads((latents / "latents.json").read_text())["class_names"]
    flags = [f"--config.model.num_classes={len(classes)}", f"--config.codec.autoencoder={vae}"]
    # Large enough for a step to take its time, beside which the wait for a batch is nothing.
    flags += ["--config.model.width=192", "--config.model.heads=6", "--config.model.depth=6"]
    command("main", config_of(latents), f"--workdir={workdir}", *flags)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    assert 0 < rows[-1]["train/loss"] < 10
    assert rows[-1]["perf/data_wait_seconds"] < 0.05 * rows[-1]["perf/step_seconds"]
    with Image.open(workdir / "samples" / "20.png") as grid:
        assert grid.mode == "RGB"
        assert min(grid.size) > 2 * 64

    command("sample", f"--workdir={workdir}", f"--output={tmp_path}/out", "--num_samples=5", "--labels=0,1")
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((5, 64, 64, 3), np.uint8)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["codec"]["factor"] == 8
    assert record["autoencoder"] == str(vae)

    command("sample", f"--workdir={workdir}", f"--output={tmp_path}/raw", "--num_samples=5", "--labels=0,1", "--vae=")
    raw = np.load(tmp_path / "raw" / "latents.npz")["arr_0"]
    config, params = load_autoencoder(vae)
    decoded = jax.jit(Autoencoder(config).decode)(params, raw)
    expected = np.clip(127.5 * np.asarray(decoded) + 128, 0, 255).astype(np.uint8)
    assert np.abs(images.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_imagenet_of_tfds_becomes_samples(command, vae, tmp_path):
    """Prepared in this process, where the dataset is mocked; the rest by commands."""
    output, workdir = tmp_path / "latents", tmp_path / "run"
    config, params = load_autoencoder(vae)
    autoencoder = Autoencoder(config)
    with imagenet_of_tfds(
        12, lambda i: Image.fromarray(np.random.default_rng(i).integers(0, 256, (70, 90, 3), np.uint8))
    ):
        source = open_source("tfds:imagenet2012", split="validation[:12]", image_size=64, channels=3)
        plan = make_plan(source, "validation[:12]", autoencoder, params, batch_size=8, records_per_shard=8)
        prepare(source, plan, make_encode(autoencoder, params, make_mesh(ParallelConfig()), 8), output, num_threads=2)
    flags = ("--config.data.split=validation", "--config.model.num_classes=1000", "--config.data.in_memory=true")
    command("main", config_of(output), f"--workdir={workdir}", *flags)
    command("sample", f"--workdir={workdir}", f"--output={tmp_path}/out", "--num_samples=4", f"--vae={vae}")
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (4, 64, 64, 3)
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.mode == "RGB"


def test_a_tiny_autoencoder_decodes_what_diffusion_sees(tmp_path):
    tiny = make_tiny()
    tiny.save_pretrained(tmp_path / "taesd")
    codec = {"name": "latents", "channels": 4, "weights": "of another encoder", "mean": [0.1], "scale": [0.5]}
    decode = load_decode(str(tmp_path / "taesd"), codec, make_mesh(ParallelConfig()))
    latents = np.random.default_rng(0).normal(size=(8, 4, 4, 4)).astype(np.float32)
    z = torch.tensor(((latents - 0.1) * 0.5).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = (127.5 * tiny.decode(z).sample + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.abs(np.asarray(decode(latents), int) - expected.numpy()).max() <= 1
    with pytest.raises(WeightsError, match="has 4 latent channels, but the network learnt 16"):
        load_decode(str(tmp_path / "taesd"), codec | {"channels": 16}, make_mesh(ParallelConfig()))


@pytest.mark.slow
def test_a_run_on_latents_is_continued_bit_for_bit(command, latents, tmp_path):
    classes = json.loads((latents / "latents.json").read_text())["class_names"]
    flags = (config_of(latents), f"--config.model.num_classes={len(classes)}")
    command("main", *flags, f"--workdir={tmp_path}/whole", "--config.checkpoint.keep_last=2")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "20")
    more = ("--config.data.in_memory=true", "--config.data.verify=true")
    assert "from step 10 to 20" in command("main", *flags, f"--workdir={tmp_path}/parts", *more).stderr
    whole, parts = (
        Checkpointer(tmp_path / name / "checkpoints", read_only=True).read_meta(20)["digests"]
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_what_does_not_fit_stops_before_the_first_step(command, latents, vae, tmp_path):
    other = tmp_path / "other_vae"
    make_kl(block_out_channels=WIDTHS, seed=5).save_pretrained(other)
    classes = json.loads((latents / "latents.json").read_text())["class_names"]
    flags = (config_of(latents), f"--workdir={tmp_path}/run", f"--config.model.num_classes={len(classes)}")
    for more, message in (
        (f"--config.codec.autoencoder={other}", "but the latents were made with"),
        ("--config.codec.scale=(0.5,)", "codec.scale is (0.5,), but the autoencoder of latents:"),
        ("--config.codec.name=pixels", "codec.name is 'pixels', but data.source is 'latents:"),
        ("--config.model.num_classes=3", f"has {len(classes)} classes; set model.num_classes"),
        ("--config.model.image_size=16", "image_size=16, channels=4; the latents are image_size=8"),
    ):
        assert message in command("main", *flags, more, code=2).stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def flags_of(latents):
    classes = json.loads((latents / "latents.json").read_text())["class_names"]
    return config_of(latents), f"--config.model.num_classes={len(classes)}"


@pytest.mark.slow
def test_latents_of_another_autoencoder_are_not_trained_on(command, latents, photographs, tmp_path):
    make_kl(block_out_channels=WIDTHS, seed=5).save_pretrained(tmp_path / "vae")
    command("prepare", f"--source=folder:{photographs}", f"--vae={tmp_path}/vae", "--resolution=64",
            f"--output={tmp_path}/latents", "--batch_size=8")  # fmt: skip
    command("main", *flags_of(latents), f"--workdir={tmp_path}/run", "--config.steps=2")
    message = "was trained with codec weights"
    other = flags_of(tmp_path / "latents")
    assert message in command("main", *other, f"--workdir={tmp_path}/run", "--config.steps=4", code=2).stderr
    new = (f"--workdir={tmp_path}/new", f"--config.init_from={tmp_path}/run")
    assert message in command("main", *other, *new, code=2).stderr
    command("main", *flags_of(latents), *new, "--config.steps=2")


@pytest.mark.slow
def test_a_record_damaged_during_a_run_costs_no_step(command, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    shard = sorted((tmp_path / "latents").glob("latents-train.array_record-*"))[1]
    content = bytearray(shard.read_bytes())
    content[4000] ^= 1
    shard.write_bytes(content)
    flags = (*flags_of(tmp_path / "latents"), f"--workdir={tmp_path}/run", "--config.batch_size=2")
    # Read ahead of nothing, so that the first steps are done when the damage is met.
    done = command("main", *flags, "--config.data.prefetch=1", code=2)
    assert f"{shard} is damaged" in done.stderr
    saved = int(re.search(r"step (\d+) is saved in", done.stderr)[1])
    assert Checkpointer(tmp_path / "run" / "checkpoints", read_only=True).all_steps()[-1] == saved
    shutil.copy(latents / shard.name, shard)
    assert f"from step {saved} to 20" in command("main", *flags).stderr


def test_each_step_draws_samples_of_its_own():
    """Their noise is new at each step, and not that of the diffusion."""
    changes = {"codec.name": "latents", "codec.scale": (1.0,), "data.source": "latents:x", "batch_size": 4}
    parts = make_parts(tiny_config("dit", changes))
    moments = np.stack([np.zeros((4, 8, 8, 3)), np.ones((4, 8, 8, 3))], axis=1).astype(np.float16)
    batch = {"moments": moments, "label": np.zeros(4, np.int32)}
    x0 = jax.jit(lambda step: clean(parts, batch, step))
    first, again, second = (np.asarray(x0(step)) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    for step, eps in ((0, first), (1, second)):
        drawn = draw(step_key(parts, step), parts, eps, batch)
        for other in (drawn.eps_BHWC, second if step == 0 else first, eps[::-1]):
            assert abs(np.corrcoef(eps.ravel(), np.ravel(other))[0, 1]) < 0.15  # of 768 values: 0.036 expected
    sharded = jax.device_put(batch, batch_sharding(make_mesh(ParallelConfig(data=4), jax.devices()[:4])))
    np.testing.assert_array_equal(jax.jit(lambda b: clean(parts, b, 0))(sharded), first)


def test_the_imagenet_config_without_data_says_what_it_needs(command, tmp_path):
    done = command("main", "--config=configs/imagenet256.py", f"--workdir={tmp_path}/run", code=2)
    assert "expected latents:DIR" in done.stderr
    assert "configs/imagenet256.py takes it as data=DIR" in done.stderr


def test_the_samples_of_a_gaussian_have_its_mean_and_deviation():
    rng = np.random.default_rng(0)
    moments = np.stack([rng.normal(size=(8, 8, 4)), rng.uniform(0.1, 2, size=(8, 8, 4))]).astype(np.float16)
    codec = LatentCodec((0.1,), (0.5,))
    many = {"moments": np.broadcast_to(moments, (20_000, *moments.shape))}
    z = np.asarray(jax.jit(codec.clean)(many, jax.random.key(0)), np.float64)
    np.testing.assert_allclose(z.mean(axis=0), (moments[0].astype(float) - 0.1) * 0.5, atol=0.04)
    np.testing.assert_allclose(z.std(axis=0), moments[1].astype(float) * 0.5, rtol=0.03)
    again = np.asarray(jax.jit(codec.clean)(many, jax.random.key(1)))
    assert np.abs(again - z).mean() > 0.1


@pytest.mark.parametrize("resolution", [256, 512])
def test_the_imagenet_configs_and_their_arguments(resolution):
    for text, width, batch_size in (("", 1152, 256), ("size=B/2,method=maskdit,data=/d", 768, 1024)):
        config = resolve(imagenet(resolution, text))
        assert (config.model.width, config.batch_size) == (width, batch_size)
        assert (config.model.image_size, config.model.channels, config.model.num_classes) == (resolution // 8, 4, 1000)
        assert config.data.source == ("latents:/d" if "data" in text else "latents:")
    assert resolve(imagenet(resolution, "")).objectives == resolve(default_config("sd_dit")).objectives
    maskdit = resolve(imagenet(resolution, "method=maskdit"))
    assert maskdit.objectives.reconstruction.weight == 0.1
    assert maskdit.steps == (2_000_000 if resolution == 256 else 1_000_000)
    for text, message in (
        ("sise=B/2", r"'sise=B/2' does not begin with a known name: it takes data=...,size=...,method=..."),
        ("B/2", r"'B/2' does not begin with a known name"),
        ("method=dino", r"method 'dino' is not one of sd_dit"),
        ("size=Q/2", r"'Q/2' is not one of S, B"),
    ):
        with pytest.raises(ConfigError, match=message):
            imagenet(resolution, text)

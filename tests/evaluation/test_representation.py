"""What the encoder knows: its features, the splits that probe them, and the command."""

import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latents import make_plan, values, write_latents
from PIL import Image
from tiny import assert_same_bits, jit, noised_state, smallest_config, tiny_parts

from sddit_jax.config.border import to_dict
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.data.sources import held_out_split
from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation import representation
from sddit_jax.evaluation.representation import (
    FeatureExtractor,
    LabelledImages,
    chance,
    load_encoders,
    load_images,
    untrained_encoder,
)
from sddit_jax.parallel.sharding import make_constrain, make_mesh, shardings
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import CHECKPOINTS, write_config

PIXELS = {"name": "pixels"}


def make_images(parts, count=21, stream=0):
    m, rng = parts.network.model, np.random.default_rng(0)
    image = rng.integers(0, 256, (count, m.image_size, m.image_size, m.channels), np.uint8)
    return LabelledImages({"image": image}, rng.integers(0, m.num_classes, count), np.arange(count) * 3, stream)


def on_mesh(devices, changes=None, batch_size=2, seed=0):
    """Parts, the encoder of a state in which nothing is 0, and `FeatureExtractor`, on so many devices."""
    mesh = make_mesh(ParallelConfig(data=1, fsdp=-1), jax.devices()[:devices])
    parts = tiny_parts("sd_dit", changes, make_constrain(mesh))
    encoder = noised_state(parts)["ema"]["default"]["encoder"]
    encoder = jax.device_put(encoder, shardings(mesh, encoder))
    return parts, encoder, FeatureExtractor(parts, mesh, seed, batch_size)


@pytest.mark.parametrize("cls_token", [True, False])
def test_features_are_what_the_encoder_gives_for_the_null_label(cls_token):
    parts, encoder, features = on_mesh(1, {"model.cls_token": cls_token}, batch_size=8)
    images = make_images(parts)
    found = features.pooled(encoder, images, 0.7, [1, 2])
    key = jax.random.fold_in(jax.random.key(0), 0)
    eps = np.stack([jax.random.normal(jax.random.fold_in(key, i), (8, 8, 3)) for i in images.index_n])
    x = parts.codec.encode(images.batch["image"]) + np.float32(0.7) * eps
    inputs = parts.diffusion.network_input(x, jnp.full(21, 0.7))
    null = np.full(21, parts.network.null_label, np.int32)
    tapped = parts.network.encode({"encoder": encoder}, *inputs, null, taps=(1, 2)).tapped
    hidden = np.stack([tapped[1], tapped[2]])
    expected = hidden[:, :, cls_token:].mean(axis=2).swapaxes(0, 1)
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        features.patches(encoder, images, 0.7, 1), hidden[0, :, cls_token:], rtol=1e-5, atol=1e-5
    )
    assert set(found) == ({"cls", "mean"} if cls_token else {"mean"})
    if cls_token:
        np.testing.assert_allclose(found["cls"], hidden[:, :, 0].swapaxes(0, 1), rtol=1e-5, atol=1e-5)
    # The last block alone is another program.
    for kind, x in features.pooled(encoder, images, 0.7, [2]).items():
        np.testing.assert_allclose(x[:, 0], found[kind][:, 1], rtol=1e-5, atol=1e-5)


def test_features_depend_on_image_seed_and_number_alone():
    parts, encoder, features = on_mesh(1, batch_size=8)
    images = make_images(parts)
    expected = features.pooled(encoder, images, 0.7, [2])
    _, split, many = on_mesh(8, batch_size=2)
    other_labels = LabelledImages(images.batch, (images.label_n + 1) % 4, images.index_n, 0)
    some = images.keep(np.array([20, 3, 11]))
    for kind, x in expected.items():
        np.testing.assert_allclose(many.pooled(split, images, 0.7, [2])[kind], x, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(features.pooled(encoder, other_labels, 0.7, [2])[kind], x)
        np.testing.assert_allclose(features.pooled(encoder, some, 0.7, [2])[kind], x[[20, 3, 11]], rtol=1e-5, atol=1e-5)
    same_image = LabelledImages({"image": images.batch["image"][[0, 0, 0]]}, images.label_n[:3], np.array([0, 0, 1]), 0)
    x = features.pooled(encoder, same_image, 0.7, [2])["mean"]
    np.testing.assert_allclose(x[0], x[1], rtol=1e-6)
    assert np.abs(x[2] - x[0]).max() > 1e-2
    for changed in (FeatureExtractor(parts, features.mesh, 1, 8), features):
        stream = 0 if changed is not features else 1
        others = dataclasses.replace(images, stream=stream)
        moved = changed.pooled(encoder, others, 0.7, [2])["mean"]
        assert np.abs(moved - expected["mean"]).max() > 1e-2


def test_an_untrained_network_tells_no_image_from_another_by_cls_and_its_blocks_do_nothing():
    parts, _, features = on_mesh(8)
    encoder = untrained_encoder(parts, make_mesh(ParallelConfig(data=1, fsdp=-1)))
    found = features.pooled(encoder, make_images(parts), 0.7, [1, 2])
    assert np.ptp(found["cls"], axis=0).max() == 0
    np.testing.assert_array_equal(found["mean"][:, 0], found["mean"][:, 1])
    fresh = jit(tiny_parts("sd_dit").network.init)(jax.random.key(parts.seed))["encoder"]
    np.testing.assert_allclose(encoder["patch"]["kernel"], fresh["patch"]["kernel"], rtol=1e-5)


def test_blocks_are_computed_in_as_many_passes_as_memory_asks_for(monkeypatch):
    parts, encoder, features = on_mesh(1, batch_size=32)
    train, test = make_images(parts, 60), make_images(parts, 30, stream=1)
    together = representation.probe(features, {"ema": encoder}, encoder, train, test, [0.1], [1, 2])
    assert [(row["block"], row["feature"]) for row in together] == [(1, "cls"), (1, "mean"), (2, "cls"), (2, "mean")]
    monkeypatch.setattr(representation, "FEATURE_BYTES", 1)
    assert representation.probe(features, {"ema": encoder}, encoder, train, test, [0.1], [1, 2]) == together


def save_run(workdir, config, state, codec=PIXELS):
    write_config(workdir, config)
    with closing(Checkpointer(workdir / CHECKPOINTS)) as checkpointer:
        checkpointer.save(0, state, {"config": to_dict(config), "codec": codec})


def test_each_encoder_of_a_run_is_found(tmp_path):
    parts = tiny_parts("sd_dit")
    state = noised_state(parts)
    save_run(tmp_path, smallest_config("sd_dit"), state)
    mesh = make_mesh(ParallelConfig(data=1, fsdp=-1))
    _, found, _ = load_encoders(tmp_path, mesh, ["params", "teacher", "ema"])
    assert_same_bits(found["params"], state["params"]["network"]["encoder"])
    assert_same_bits(found["ema"], state["ema"]["default"]["encoder"])
    assert_same_bits(found["teacher"], state["aux"]["discrimination"]["teacher"]["encoder"])
    assert list(load_encoders(tmp_path, mesh)[1]) == ["ema", "teacher"]
    # The EMA needs nothing else.
    shutil.rmtree(tmp_path / CHECKPOINTS / "0" / "train")
    assert_same_bits(load_encoders(tmp_path, mesh, ["ema"])[1]["ema"], found["ema"])


@pytest.mark.parametrize(
    ("method", "changes"), [("dit_decoder", {}), ("sd_dit", {"objectives.discrimination.teacher": "ema"})]
)
def test_a_run_without_a_teacher_of_its_own_says_so(tmp_path, method, changes):
    config = smallest_config(method, changes)
    save_run(tmp_path, config, noised_state(make_parts(config)))
    mesh = make_mesh(ParallelConfig(data=1, fsdp=-1))
    assert list(load_encoders(tmp_path, mesh)[1]) == ["ema"]
    with pytest.raises(UserError, match="no teacher of its own"):
        load_encoders(tmp_path, mesh, ["teacher"])


def digits_config(**changes):
    return smallest_config("sd_dit", {"model.channels": 1, "model.num_classes": 10, "data.source": "digits",
                                 "data.num_threads": 2, **changes})  # fmt: skip


def test_a_source_without_a_test_split_is_split_by_index():
    config = digits_config()
    train, test, record = load_images(config, PIXELS)
    assert (len(train.index_n), len(test.index_n)) == (1438, 359)
    assert sorted([*train.index_n, *test.index_n]) == list(range(1797))
    assert (record["train"]["count"], record["test"]["count"], record["seed"]) == (1438, 359, 0)
    again, _, same = load_images(config, PIXELS)
    np.testing.assert_array_equal(again.batch["image"], train.batch["image"])
    assert same == record
    few, _, _ = load_images(config, PIXELS, num_train=100, num_test=7)
    np.testing.assert_array_equal(few.index_n, train.index_n[:100])
    assert load_images(config, PIXELS, seed=1)[2]["test"] != record["test"]
    assert 0.05 < chance(train, test) < 0.15


def write_folder(path, **counts):
    for split, count in counts.items():
        for name in ("ant", "bee"):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(path / split / name / f"{i}.png")


def test_a_source_with_a_test_split_is_tested_on_it(tmp_path):
    write_folder(tmp_path, train=3, test=2, val=1)
    spec = f"folder:{tmp_path}"
    assert held_out_split(spec, "train") == "val"
    assert held_out_split(spec, "val") == "test"
    assert held_out_split(f"folder:{tmp_path / 'train'}", "train") is None
    assert held_out_split("digits", "train") is None
    config = digits_config()
    train, test, record = load_images(config, PIXELS, source=spec)
    assert (len(train.index_n), len(test.index_n), train.stream, test.stream) == (6, 2, 0, 1)
    assert record["test"]["source"].endswith("/val")
    assert len(load_images(config, PIXELS, source=spec, test_split="test")[1].index_n) == 4
    with pytest.raises(DataError, match="to fit a probe and to test it"):
        load_images(config, PIXELS, source=spec, test_split="train")
    with pytest.raises(DataError, match="different classes"):
        load_images(config, PIXELS, test_source=spec)


def test_an_image_in_place_of_a_bad_one_is_not_used_twice(tmp_path):
    write_folder(tmp_path, all=10)
    (tmp_path / "all" / "ant" / "3.png").write_bytes(b"")
    train, test, _ = load_images(digits_config(), PIXELS, source=f"folder:{tmp_path / 'all'}")
    assert len(train.index_n) + len(test.index_n) == 19


LATENTS = {"model.image_size": 4, "model.num_classes": 3, "codec.name": "latents", "codec.mean": (0.25,),
           "codec.scale": (0.5,)}  # fmt: skip
LATENT_CODEC = {"name": "latents", "weights": "fedcba9876543210"}


def test_latents_are_the_means_of_their_moments(tmp_path):
    plan = make_plan(latent_shape=(4, 4, 3), records=23)
    write_latents(tmp_path, plan)
    parts = tiny_parts("sd_dit", LATENTS)
    train, _, _ = load_images(smallest_config("sd_dit", LATENTS), LATENT_CODEC, source=f"latents:{tmp_path}")
    expected = (values(plan)[train.index_n, 0, 0].astype(np.float32) - 0.25) * 0.5
    np.testing.assert_allclose(parts.codec.expected(train.batch), expected, rtol=1e-6)
    for other in (PIXELS, LATENT_CODEC | {"weights": "0"}):
        with pytest.raises(DataError, match="the network was trained with codec"):
            load_images(smallest_config("sd_dit", LATENTS), other, source=f"latents:{tmp_path}")


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """The workdir of a run on the digits, and a function that probes it, or another."""
    workdir = tmp_path_factory.mktemp("run")
    config = digits_config()
    save_run(workdir, config, noised_state(make_parts(config)))

    def probed(*arguments, workdir=workdir, code=0):
        done = command("probe", f"--workdir={workdir}", *arguments)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return workdir, probed


def test_the_command_writes_a_table_its_conditions_and_a_picture(run):
    workdir, probed = run
    done = probed("--sigmas=0.01,1", "--weights=ema,params,teacher", "--num_train=300", "--num_test=100")
    record = json.loads((workdir / "probe" / "probe.json").read_text())
    assert record["checkpoint_step"] == 0
    prefixes = {path.split("/encoder/")[0] for path in record["checkpoint_digests"]}
    assert prefixes == {"ema/default", "params/network", "aux/discrimination/teacher"}
    assert [(row["weights"], row["sigma"], row["feature"]) for row in record["rows"]] == [
        (weights, sigma, kind) for weights in ("ema", "params", "teacher") for sigma in (0.01, 1)
        for kind in ("cls", "mean")
    ]  # fmt: skip
    assert record["data"]["test"]["count"] == 100
    assert record["label"] == "null"
    # [CLS] of an untrained network is the same for all images: within four standard deviations of a tenth in 100.
    untrained = [row[key] for row in record["rows"] if row["feature"] == "cls"
                 for key in ("knn_untrained", "linear_untrained")]  # fmt: skip
    assert np.abs(np.array(untrained) - 0.1).max() < 0.12
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(record["rows"])
    assert f"{record['rows'][0]['linear']:.1%}" in lines[2]
    # 1 + 2 x 3 rows of 8 pictures of 64 pixels.
    assert Image.open(workdir / "probe" / "pca.png").size == (8 * 65 + 1, 7 * 65 + 1)


def test_by_default_the_ema_and_the_teacher_are_probed(run, tmp_path):
    _, probed = run
    probed("--num_train=100", "--num_test=20", "--sigmas=0.5", "--blocks=all", f"--output={tmp_path}/new/one")
    record = json.loads((tmp_path / "new" / "one" / "probe.json").read_text())
    assert {(row["weights"], row["block"]) for row in record["rows"]} == {
        (name, block) for name in ("ema", "teacher") for block in (1, 2)
    }


def test_a_run_on_latents_is_probed(run, tmp_path):
    _, probed = run
    write_latents(tmp_path / "latents", make_plan(latent_shape=(4, 4, 3), records=60))
    config = smallest_config("sd_dit", LATENTS | {"data.source": f"latents:{tmp_path}/latents"})
    save_run(tmp_path, config, noised_state(make_parts(config)), LATENT_CODEC)
    probed("--sigmas=0.5", "--weights=ema", workdir=tmp_path)
    record = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert record["latents"] == "means of the moments"
    assert [record["data"][part]["count"] for part in ("train", "test")] == [48, 12]
    assert Image.open(tmp_path / "probe" / "pca.png").size == (8 * 65 + 1, 2 * 65 + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights=student"], "'student'; there are ema, params, teacher"),
        (["--sigmas=0.5,high"], "is not numbers"),
        (["--sigmas=0"], "noise levels are 0.002 to 80"),
        (["--blocks=2,3"], "--blocks has 3, but the encoder's blocks are 1 to 2"),
        (["--blocks=first"], "is not last, all or numbers"),
        (["--source=folder:/does/not/exist"], "not a folder"),
        (["--checkpoint_step=7"], "no checkpoint of step 7"),
    ],
)
def test_the_user_is_told_what_would_be_right(run, arguments, words):
    _, probed = run
    assert words in probed(*arguments, code=2).stderr

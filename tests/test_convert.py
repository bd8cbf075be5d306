"""Weights taken out and in by the command, and what a run makes of them."""

import argparse
import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import make_config, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sddit_jax.config.border import resolve, to_dict
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import METHODS, default_config
from sddit_jax.config.sizes import parse_size
from sddit_jax.errors import CheckpointError, UserError, WeightsError
from sddit_jax.interop.layouts import DIT, MASKDIT, OWN
from sddit_jax.interop.transfer import export, import_
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import open_checkpoints, read_config, write_config

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT}/tests/configs/tiny.py"
DIT_CHANGES = {"model.learn_sigma": True, "model.null_label": "row", "diffusion.name": "ddpm"}


def make_run(workdir, config, step=7):
    """A run that was saved at a step, with different parameters and EMA, all their elements random."""
    parts, rng = make_parts(config), np.random.default_rng(0)

    def random(tree):
        return jax.tree.map(lambda leaf: jax.numpy.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), tree)

    shapes = jax.eval_shape(parts.network.init, jax.random.key(0))
    own = jax.eval_shape(parts.init_params, jax.random.key(0))
    params = {name: random(shapes if name == "network" else tree) for name, tree in sorted(own.items(), reverse=True)}
    state = parts.state_from(params, random(shapes)) | {"step": jax.numpy.asarray(step)}
    workdir.mkdir()
    write_config(workdir, config)
    checkpointer = Checkpointer(workdir / "checkpoints")
    checkpointer.save(step, state, {"config": to_dict(config), "codec": parts.codec.record()})
    checkpointer.close()
    return workdir, state


def read_run(workdir):
    """The configuration of a run, {"params", "ema"} of its network, and all its parameters."""
    config = read_config(workdir)
    abstract = jax.eval_shape(make_parts(config).init_state, jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract)
    state, meta = Checkpointer(workdir / "checkpoints", read_only=True).restore(abstract)
    assert meta["imported"]["sha256"]
    assert int(state["step"]) == 0
    return config, {"params": state["params"]["network"], "ema": state["ema"]["default"]}, state["params"]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def config_dict(config):
    """The ConfigDict of a Config."""
    made = default_config()
    with made.unlocked():
        made.update(to_dict(config))
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["ema", "params"])
def test_to_torch_and_back_is_the_same_bits(tmp_path, method, weights):
    config = tiny_config(method)
    run, state = make_run(tmp_path / "run", config)
    export(OWN, run, tmp_path / "model.safetensors", weights)
    import_(OWN, tmp_path / "model.safetensors", tmp_path / "new")
    config_after, trees, _ = read_run(tmp_path / "new")
    assert not config_after.ema.warmup
    assert dataclasses.replace(config_after, ema=config.ema) == config
    expected = state["params"]["network"] if weights == "params" else state["ema"]["default"]
    assert_same(trees, {"params": expected, "ema": expected})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert resolve(json.loads(metadata["config"])) == config
    assert (metadata["format"], metadata["step"], metadata["weights"]) == ("pt", "7", weights)
    assert json.loads(metadata["codec"])["name"] == "pixels"


@pytest.mark.parametrize("fill", ["mask_token", "zeros"])
def test_to_maskdit_and_back_is_the_same_bits(tmp_path, fill):
    config = tiny_config("maskdit", {"masking.fill": fill})
    run, state = make_run(tmp_path / "run", config)
    export(MASKDIT, run, tmp_path / "0000007.pt", None)
    content = torch.load(tmp_path / "0000007.pt", weights_only=True)
    assert content.keys() == {"model", "ema"}
    assert ("model.mask_token" in content["ema"]) == (fill == "mask_token")
    table = content["model"]["model.y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(table.T, state["params"]["network"]["encoder"]["label"]["table"])
    import_(MASKDIT, tmp_path / "0000007.pt", tmp_path / "new", config_dict(config))
    assert_same(read_run(tmp_path / "new")[1], {"params": state["params"]["network"], "ema": state["ema"]["default"]})


def test_to_dit_and_back_is_the_same_bits(tmp_path):
    config = tiny_config("dit", DIT_CHANGES)
    run, state = make_run(tmp_path / "run", config)
    export(DIT, run, tmp_path / "dit.pt", None)
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert content["y_embedder.embedding_table.weight"].shape == (5, 32)
    import_(DIT, tmp_path / "dit.pt", tmp_path / "new", config_dict(config))
    ema = state["ema"]["default"]
    assert_same(read_run(tmp_path / "new")[1], {"params": ema, "ema": ema})


def test_to_dit_gives_a_null_label_of_zeros_its_row(tmp_path):
    run, state = make_run(tmp_path / "run", tiny_config("dit"))
    export(DIT, run, tmp_path / "dit.pt", "both")
    table = torch.load(tmp_path / "dit.pt", weights_only=True)["model"]["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(table[:4], state["params"]["network"]["encoder"]["label"]["table"])
    assert not table[4].any()


def maskdit_file(tmp_path, **changes):
    """The config of a tiny MaskDiT and a checkpoint of it, as its training saves one."""
    config = tiny_config("maskdit")
    run, state = make_run(tmp_path / "source", config)
    export(MASKDIT, run, tmp_path / "source.pt", None)
    content = torch.load(tmp_path / "source.pt", weights_only=True)
    content |= {"opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": argparse.Namespace(config="a.yaml")}
    torch.save(content | changes, tmp_path / "0000007.pt")
    return config_dict(config), tmp_path / "0000007.pt", state, content


def test_a_training_checkpoint_of_maskdit(tmp_path, caplog):
    config, file, state, _ = maskdit_file(tmp_path)
    with caplog.at_level("INFO", logger="sddit_jax"):
        import_(MASKDIT, file, tmp_path / "new", config)
    said = "0000007.pt has model (48 tensors), ema (48 tensors); skipped: opt (dict), args (argparse.Namespace, "
    assert f"{said}not executed)" in caplog.text
    assert_same(read_run(tmp_path / "new")[1], {"params": state["params"]["network"], "ema": state["ema"]["default"]})


@pytest.mark.parametrize("group", ["ema", "model"])
def test_one_set_of_weights_serves_for_both(tmp_path, group):
    config, file, _, content = maskdit_file(tmp_path)
    torch.save({group: content[group]}, file)
    import_(MASKDIT, file, tmp_path / "a", config)
    torch.save(content[group], file)
    import_(MASKDIT, file, tmp_path / "b", config)
    (_, a, _), (_, b, _) = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    assert_same(a, b)
    assert_same(a["params"], a["ema"])


def test_a_file_that_does_not_fit_leaves_no_workdir(tmp_path):
    config, file, _, content = maskdit_file(tmp_path)
    del content["ema"]["model.mask_token"]
    torch.save(content, file)
    with pytest.raises(
        WeightsError, match=r"0000007\.pt, ema does not fit this network:\n  model\.mask_token is missing"
    ):
        import_(MASKDIT, file, tmp_path / "new", config)
    with pytest.raises(WeightsError, match="2 blocks of width 32: no published model, so --config"):
        import_(MASKDIT, file, tmp_path / "new")
    torch.save({"other": content["model"]}, file)
    with pytest.raises(WeightsError, match="under other, but none under model or ema"):
        import_(MASKDIT, file, tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


def test_partial_loads_what_fits_and_starts_the_rest_afresh(tmp_path, caplog):
    """SD-DiT from MaskDiT's weights: [CLS] and the head are fresh, the mask token is left out."""
    _, file, state, _ = maskdit_file(tmp_path)
    target = tiny_config("sd_dit")
    import_(MASKDIT, file, tmp_path / "new", config_dict(target), partial=True)
    _, trees, params = read_run(tmp_path / "new")
    fresh = jax.jit(make_parts(target).init_params)(jax.random.key(0))
    network, theirs = trees["params"], state["params"]["network"]
    assert_same(params["discrimination"], fresh["discrimination"])
    assert_same(network["encoder"]["cls"], fresh["network"]["encoder"]["cls"])
    assert_same(network["encoder"]["stack"], theirs["encoder"]["stack"])
    assert_same(trees["ema"]["decoder"]["final"], state["ema"]["default"]["decoder"]["final"])
    assert "model.mask_token is surplus" in caplog.text
    assert "1 of the network's 46 tensors are fresh" in caplog.text


def test_partial_is_no_excuse_for_a_file_of_something_else(tmp_path):
    torch.save({"a.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"a\.weight is surplus"):
        import_(MASKDIT, tmp_path / "other.pt", tmp_path / "new", config_dict(tiny_config("maskdit")), partial=True)
    assert not (tmp_path / "new").exists()


def test_a_workdir_that_is_not_empty_is_left_alone(tmp_path):
    config, file, _, _ = maskdit_file(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        import_(MASKDIT, file, tmp_path / "run", config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path):
    run, _ = make_run(tmp_path / "run", tiny_config("sd_dit"))
    output = tmp_path / "model.pt"
    output.write_text("mine")
    with pytest.raises(WeightsError, match=r"no place for encoder\.cls"):
        export(MASKDIT, run, output, None)
    assert output.read_text() == "mine"
    with pytest.raises(UserError, match="could not be written"):
        export(OWN, run, output / "model.safetensors", "ema")
    with pytest.raises(UserError, match="one set of weights"):
        export(OWN, run, tmp_path / "model.safetensors", "both")
    with pytest.raises(UserError, match=r"model\.pt should end in \.safetensors"):
        export(OWN, run, output, "ema")
    with pytest.raises(UserError, match=r"model\.safetensors should end in \.pth or"):
        export(DIT, run, tmp_path / "model.safetensors", "ema")
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        export(OWN, tmp_path / "nothing", tmp_path / "model.safetensors", "ema")


@pytest.mark.parametrize(("layout", "name"), [(OWN, "model.safetensors"), (DIT, "model.pt")])
def test_a_full_disk_leaves_what_was_there(tmp_path, layout, name):
    run, _ = make_run(tmp_path / "run", tiny_config("dit", DIT_CHANGES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match="could not be written"):
            export(layout, run, tmp_path / "out" / name, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(name, "mine")]


def test_a_full_disk_leaves_no_half_imported_run(tmp_path):
    config, file, _, _ = maskdit_file(tmp_path)
    before = set(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(CheckpointError, match="new could not be written"):
            import_(MASKDIT, file, tmp_path / "new", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert set(tmp_path.iterdir()) == before
    import_(MASKDIT, file, tmp_path / "new", config)


@pytest.mark.parametrize(("weights", "keys"), [("ema", ["ema"]), ("params", ["model"]), (None, ["model", "ema"])])
def test_each_choice_of_weights_can_be_read_again(tmp_path, weights, keys):
    config = tiny_config("maskdit")
    run, state = make_run(tmp_path / "run", config)
    export(MASKDIT, run, tmp_path / "a.pt", weights)
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == keys
    import_(MASKDIT, tmp_path / "a.pt", tmp_path / "new", config_dict(config))
    expected = {"model": state["params"]["network"], "ema": state["ema"]["default"]}
    assert_same(read_run(tmp_path / "new")[1], {"params": expected[keys[0]], "ema": expected[keys[-1]]})


@pytest.mark.slow
def test_what_a_public_code_would_compute_otherwise_is_said(tmp_path, caplog):
    changes = {f"model.{key}": value for key, value in parse_size("S/8").items()} | {"codec.name": "latents"}
    for heads, sigma_data, scale in ((12, 1.0, 0.5), (6, 0.5, 0.18215)):
        caplog.clear()
        more = {"model.heads": heads, "diffusion.edm.sigma_data": sigma_data, "codec.scale": (scale,)}
        run, _ = make_run(tmp_path / f"run{heads}", make_config("maskdit", changes | more))
        export(MASKDIT, run, tmp_path / "a.pt", "ema")
        said = [line for line in caplog.text.splitlines() if "MaskDiT's code will compute something else" in line]
        assert len(said) == (3 if heads == 12 else 0)
        assert heads == 6 or "model.heads: 12 -> 6" in caplog.text


def test_a_safetensors_file_without_configuration_is_refused(tmp_path):
    run, _ = make_run(tmp_path / "run", tiny_config("dit"))
    export(OWN, run, tmp_path / "model.safetensors", "ema")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    for name, config in (("broken", "{"), ("list", "[]"), ("unknown", '{"modle": {}}')):
        save_file(tensors, tmp_path / f"{name}.safetensors", {"config": config})
    with pytest.raises(WeightsError, match="no configuration in its metadata; --config"):
        import_(OWN, tmp_path / "bare.safetensors", tmp_path / "new")
    for name, message in (
        ("broken", "no JSON"),
        ("list", "holds a list instead of"),
        ("unknown", "key modle"),
    ):
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors: the configuration in its metadata .*{message}"):
            import_(OWN, tmp_path / f"{name}.safetensors", tmp_path / "new")
    import_(OWN, tmp_path / "bare.safetensors", tmp_path / "new", config_dict(tiny_config("dit")))


@pytest.mark.slow
def test_an_imported_maskdit_is_sampled_from_and_trained_further(command, tmp_path):
    """As a user does it, all by commands; fine-tuning without a mask, as MaskDiT ends its training."""
    tiny = f"{TINY}:maskdit"
    first, file, imported, tuned = (tmp_path / name for name in ("first", "0000060.pt", "imported", "tuned"))
    finetune = ("main", f"--config=configs/finetune.py:{imported}", f"--workdir={tuned}")
    for arguments in (
        ("main", tiny, f"--workdir={first}", "--config.steps=4"),
        ("convert", "to-maskdit", f"--workdir={first}", f"--output={file}"),
        ("convert", "from-maskdit", file, tiny, f"--workdir={imported}"),
        ("sample", f"--workdir={imported}", f"--output={tmp_path}/out", "--num_samples=4", "--steps=3"),
        (*finetune, "--config.steps=6", "--config.masking.ratio=0.0", "--config.objectives.reconstruction.weight=0.0"),
    ):
        done = command(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
    assert f"starting from the weights of {imported} at step 0" in done.stderr
    # The EMA of six steps is still nearly what was imported; with a warm-up it would be nearly all new.
    before = open_checkpoints(imported).restore_ema()[0]["default"]
    after = open_checkpoints(tuned).restore_ema()[0]["default"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 6 * 6e-4 * 1e-3
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert np.isfinite(rows[-1]["train/loss"])

    other = command("main", f"{TINY}:dit", f"--config.init_from={imported}", f"--workdir={tmp_path}/other")
    assert other.returncode == 2
    assert "holds another model: model.decoder_depth: 1 -> 0" in other.stderr


def test_an_imported_dit_samples_by_its_own_ddpm(command, tmp_path):
    config = tiny_config("dit", DIT_CHANGES | {"model.channels": 4, "codec.name": "latents", "codec.scale": (0.18215,)})
    run, _ = make_run(tmp_path / "run", config)
    export(DIT, run, tmp_path / "dit.pt", None)
    import_(DIT, tmp_path / "dit.pt", tmp_path / "new", config_dict(config))
    for solver in ("ddpm", "ddim", "heun"):
        settings = (f"--solver={solver}", "--steps=5", "--guidance=1.5", "--guidance_channels=3", "--num_samples=3")
        done = command("sample", f"--workdir={tmp_path}/new", f"--output={tmp_path}/{solver}", *settings)
        assert done.returncode == 0, done.stderr
        latents = np.load(tmp_path / solver / "latents.npz")["arr_0"]
        assert (latents.shape, latents.dtype) == ((3, 8, 8, 4), np.float32)
        assert np.isfinite(latents).all()
        record = json.loads((tmp_path / solver / "latents.json").read_text())
        assert record["sampler"] == {"name": solver, "steps": 5, "rho": 7.0, "guidance_channels": 3}
        assert (tmp_path / solver / "grid.png").exists()


def test_pytorch_alone_loads_and_samples_what_was_exported(tmp_path):
    """No part of JAX can be imported there."""
    run, _ = make_run(tmp_path / "run", tiny_config("sd_dit"))
    export(OWN, run, tmp_path / "model.safetensors", "ema")
    program = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "ml_collections"):
    sys.modules[name] = None
from sddit_jax.interop.pytorch import load, sample
network = load(sys.argv[1])
images = sample(network, labels=[3, 1, 0], guidance=1.5, steps=4)
assert images.shape == (3, 8, 8, 3) and str(images.dtype) == "torch.uint8"
again = sample(load(sys.argv[1]), labels=[3, 1, 0], guidance=1.5, steps=4)
assert (images == again).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model.safetensors"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "'' is not one of to-torch, to-maskdit, to-dit, from-torch, from-maskdit, from-dit"),
        (("to-pytorch",), "'to-pytorch' is not one of"),
        (("to-torch",), "--workdir=DIR is needed"),
        (("to-torch", "--workdir=a"), "to-torch is written to-torch --workdir=RUN --output=FILE"),
        (("to-torch", "--workdir=a", "--output=a.safetensors", "--partial"), "to-torch is written to-torch"),
        (("from-dit", "--workdir=a"), "from-dit is written from-dit FILE --workdir=NEW"),
        (("from-dit", "a.pt", "--workdir=a", "--weights=ema"), "from-dit is written from-dit FILE --workdir=NEW"),
        (("from-dit", "a.pt", "b.pt", "--workdir=a"), "unexpected arguments b.pt"),
        (("from-dit", "nowhere.pt", "--workdir=a"), "nowhere.pt"),
        (("to-torch", "--workdir=nowhere", "--output=a.safetensors"), "nowhere has no checkpoints"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(command, tmp_path, arguments, message):
    done = command("convert", *(a.replace("=a", f"={tmp_path}/a") for a in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()

"""Runs of earlier formats: a run that an earlier version wrote is sampled, exported and continued."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import assert_same_bits, noised_state, tiny_parts

from sddit_jax.config.presets import METHODS
from sddit_jax.interop.layouts import OWN
from sddit_jax.interop.transfer import export
from sddit_jax.parallel.sharding import path_name
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.formats import FORMAT_VERSION, READABLE, as_format_2, from_format_2, path_from_format_2

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
# A run of each format that is read: RUN.tar.gz, and what the version that wrote it went on to, sampled and exported.
RUNS = {version: DATA / f"run_format_{version}" for version in READABLE}


@pytest.fixture(scope="module", params=RUNS)
def saved(request, tmp_path_factory):
    """A folder with the run of a format, and what is expected of it."""
    folder, path = tmp_path_factory.mktemp("run"), RUNS[request.param]
    with tarfile.open(f"{path}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run", json.loads(Path(f"{path}.json").read_text())


def command(name, *flags):
    # The runs were computed on one device.
    environment = os.environ | {"XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-m", f"sddit_jax.{name}", *flags], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result


def test_there_is_a_run_of_the_present_format():
    assert max(READABLE) == FORMAT_VERSION
    assert all(Path(f"{path}.tar.gz").is_file() for path in RUNS.values())


def test_it_is_exported_to_the_bit(saved, tmp_path):
    run, expected = saved
    export(OWN, run, tmp_path / "model.safetensors", None)
    hashed = hashlib.sha256()
    for name, tensor in sorted(load_file(tmp_path / "model.safetensors").items()):
        hashed.update(name.encode())
        hashed.update(tensor.tobytes())
    assert hashed.hexdigest() == expected["export_sha256"]


def test_it_is_sampled_to_the_grey_level(saved, tmp_path):
    run, expected = saved
    command("sample", f"--workdir={run}", f"--output={tmp_path}", "--num_samples=4", "--batch_size=4")
    with np.load(tmp_path / "samples.npz") as samples:
        np.testing.assert_array_equal(samples["arr_1"], expected["labels"])
        assert np.abs(samples["arr_0"].squeeze(-1).astype(int) - expected["samples"]).max() <= 1


def test_it_is_probed_and_its_digests_are_named(saved, tmp_path):
    run, _ = saved
    command("probe", f"--workdir={run}", "--weights=params,teacher", f"--output={tmp_path}", "--num_train=40",
            "--num_test=20", "--sigmas=0.5")  # fmt: skip
    digests = json.loads((tmp_path / "probe.json").read_text())["checkpoint_digests"]
    assert {path.split("/")[0] for path in digests} == {"params", "aux"}


@pytest.mark.slow
def test_it_is_fine_tuned_and_guides(saved, tmp_path):
    run, _ = saved
    config = f"--config={ROOT}/configs/finetune.py:{run}"
    command("main", config, f"--workdir={tmp_path}/tuned", "--config.steps=10")
    command(
        "sample", f"--workdir={tmp_path}/tuned", f"--guide={run}", "--guidance=2", f"--output={tmp_path}/out",
        "--num_samples=4",
    )  # fmt: skip


@pytest.mark.slow
def test_it_is_continued(saved):
    run, expected = saved
    command("main", f"--config={ROOT}/tests/configs/saved.py:{run}", f"--workdir={run}")
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert list(rows) == list(range(1, 21))
    for row in expected["rows"]:
        for key, value in row.items():
            np.testing.assert_allclose(rows[row["step"]][key], value, rtol=1e-4, err_msg=f"{key} of {row['step']}")


VARIANTS = [(method, {}) for method in METHODS] + [("sd_dit", {"objectives.discrimination.teacher": "ema"})]
VARIANTS += [("sd_dit", {"optimizer.name": name}) for name in ("muon", "lion", "sgd", "lamb")]
VARIANTS += [("sd_dit", {"optimizer.clip_norm": 1.0})]


@pytest.mark.parametrize(("method", "changes"), VARIANTS)
def test_format_2_and_back(method, changes, tmp_path):
    parts = tiny_parts(method, changes)
    state = noised_state(parts)
    head = state["params"].get("discrimination", {})
    if "encoder" not in state["aux"].get("discrimination", {}).get("teacher", {"encoder": ()}):
        head = state["aux"]["discrimination"]["teacher"]["head"]
    old = as_format_2(state, head)
    modules = {"encoder", "decoder"} | ({"head"} if head else set())
    assert old["params"].keys() == old["ema"]["default"].keys() == modules
    assert_same_bits(from_format_2(old, state), state)
    before, after = (
        {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree) if path[0].key != "aux"}
        for tree in (old, state)
    )
    assert {path_from_format_2(path) for path in before if not path.startswith("ema/default/head/")} == after
    assert jax.tree.structure(from_format_2(old, state)) == jax.tree.structure(state)


def test_a_teacher_that_was_the_ema_finds_its_head(tmp_path, monkeypatch):
    """Format 2 kept the average of the head in the sampling EMA."""
    parts = tiny_parts("sd_dit", {"objectives.discrimination.teacher": "ema"})
    state = noised_state(parts)
    old = as_format_2(state, state["aux"]["discrimination"]["teacher"]["head"])
    monkeypatch.setattr("sddit_jax.runs.checkpoint.FORMAT_VERSION", 2)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, old, {})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)
    found, _ = checkpointer.restore(abstract)
    assert_same_bits(found, state)
    ema, _ = checkpointer.restore_ema()
    assert_same_bits(ema["default"], state["ema"]["default"])
    checkpointer.close()

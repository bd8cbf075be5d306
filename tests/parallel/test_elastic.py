"""A run's state is made, saved and restored in shards, on any number of devices."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import environment
from helpers import make_config
from tiny import CONDITION, assert_same_bits, tiny_parts

from sddit_jax.config import schema
from sddit_jax.config.parts import make_parts
from sddit_jax.parallel.sharding import make_mesh, path_name
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import abstract_state, restore_run

ROOT = Path(__file__).parents[2]
LAYOUTS = {  # devices and axes
    "one device": (1, {}),
    "data=2": (2, {"data": 2}),
    "fsdp=2": (2, {"data": 1, "fsdp": 2}),
    "tensor=2": (2, {"data": 1, "tensor": 2}),
    "fsdp=4": (4, {"data": 1, "fsdp": 4}),
    "data=2,fsdp=2": (4, {"data": 2, "fsdp": 2}),
    "fsdp=2,tensor=2": (4, {"data": 1, "fsdp": 2, "tensor": 2}),
    "fsdp=8": (8, {"data": 1, "fsdp": 8}),
    "data=2,fsdp=2,tensor=2": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
}


def wanted(parts, layout):
    """The shapes and the layout of a state."""
    devices, axes = LAYOUTS[layout]
    return abstract_state(parts, make_mesh(schema.ParallelConfig(**axes), jax.devices()[:devices]))


def random_state(abstract):
    """A state in which every element is random, the optimiser's too."""
    rng = np.random.default_rng(0)

    def leaf(a):
        x = rng.standard_normal(a.shape) if np.issubdtype(a.dtype, np.floating) else rng.integers(99, size=a.shape)
        return jax.device_put(x.astype(a.dtype), a.sharding)

    return jax.tree.map(leaf, abstract)


def assert_restored(directory, abstract, expected):
    checkpointer = Checkpointer(directory)
    state, _ = checkpointer.restore(abstract)
    checkpointer.close()
    jax.tree.map(lambda x, a: np.testing.assert_equal((x.dtype, x.sharding), (a.dtype, a.sharding)), state, abstract)
    assert_same_bits(jax.device_get(state), expected)
    return state


def save(directory, state):
    checkpointer = Checkpointer(directory)
    checkpointer.save(1, state, {})
    checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The parts of a network, its state on the host, and a checkpoint that eight devices saved."""
    parts = tiny_parts("sd_dit", CONDITION)
    state = random_state(wanted(parts, "fsdp=8"))
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, state)
    return parts, jax.device_get(state), directory


FAST = ("one device", "fsdp=2", "fsdp=4", "fsdp=8")


@pytest.mark.parametrize("layout", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS])
def test_saved_on_eight_devices_restored_on_fewer_and_back_it_has_the_same_bits(saved, tmp_path, layout):
    parts, expected, directory = saved
    save(tmp_path, assert_restored(directory, wanted(parts, layout), expected))
    assert_restored(tmp_path, wanted(parts, "fsdp=8"), expected)


def shard_bytes(abstract):
    """What each device holds of a state."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(abstract))


def test_a_restored_state_comes_to_each_device_in_its_shards(saved, monkeypatch):
    """Never as a whole array that is then cut."""
    parts, expected, directory = saved
    abstract = wanted(parts, "fsdp=8")
    put, transfers = jax.device_put, []

    def recorded(x, *args, **kwargs):
        transfers.append(x.nbytes)
        return put(x, *args, **kwargs)

    checkpointer = Checkpointer(directory)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "device_put", recorded)
        state, _ = checkpointer.restore(abstract)
    checkpointer.close()
    assert sum(transfers) == 8 * shard_bytes(abstract)
    for leaf in jax.tree.leaves(state):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    largest = max(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    assert max(transfers) == largest < max(leaf.nbytes for leaf in jax.tree.leaves(expected))


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("method", ["sd_dit", "dit"])
def test_a_fresh_state_is_made_in_its_shards(method):
    """Random bits included: no device's memory ever holds more than its share, and none waits for another."""
    changes = {"model.depth": 2, "model.width": 256, "model.heads": 4, "model.decoder_depth": 0, "parallel.fsdp": 8}
    if method == "sd_dit":
        changes |= {"model.decoder_depth": 1, "model.decoder_width": 256, "model.decoder_heads": 4}
    parts = make_parts(make_config(method, changes))
    abstract = wanted(parts, "fsdp=8")
    layout = jax.tree.map(lambda a: a.sharding, abstract)
    compiled = jax.jit(parts.init_state, out_shardings=layout).lower(jax.random.key(0)).compile()
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    memory = compiled.memory_analysis()
    assert shard_bytes(abstract) < 0.13 * whole
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.16 * whole
    text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in text]


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_with_two_and_with_one(tmp_path):
    """As if it had been killed after step 20, and again after step 40: it ends like one that was not, in float32."""

    def go_on(workdir, devices, *arguments):
        command = [sys.executable, "-m", "sddit_jax.main", f"--config={ROOT}/tests/configs/tiny.py"]
        changes = ["--config.checkpoint.every=20", "--config.sampling.every=0", "--config.log.diagnose_every=0"]
        done = subprocess.run(
            [*command, f"--workdir={workdir}", *changes, *arguments],
            env=environment(devices), cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"on {devices} cpu device(s)" in done.stderr

    whole, moved = tmp_path / "whole", tmp_path / "moved"
    go_on(whole, 8, "--config.parallel.data=1", "--config.parallel.fsdp=8")
    shutil.copytree(whole, moved)
    for lost, devices in ((40, 2), (60, 1)):
        for step in range(lost, 61, 20):
            shutil.rmtree(moved / "checkpoints" / str(step))
        go_on(moved, devices)
    mesh = make_mesh(schema.ParallelConfig())
    (config, expected, _), (_, state, _) = (jax.device_get(restore_run(run, mesh)) for run in (whole, moved))

    def check(path, a, b):
        distance = np.max(np.abs(a - b) - 1e-5 * np.abs(b)) / config.optimizer.learning_rate
        assert distance <= 0.01, f"{path_name(path)}: off by {distance:.3g} lr"

    for key in ("params", "ema", "aux"):
        jax.tree_util.tree_map_with_path(check, state[key], expected[key])
    assert int(state["step"]) == int(expected["step"]) == 60

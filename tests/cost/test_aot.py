"""Programs compiled for meshes and for TPUs that are not there: what they move, take and compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import make_config
from jax.sharding import AbstractMesh
from tiny import CONDITION, QUICK, smallest_config, tiny_parts

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import imagenet
from sddit_jax.cost import aot, flops, hlo
from sddit_jax.errors import ConfigError, UserError
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel import sharding
from sddit_jax.runs.folder import abstract_state

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("uncached")
# Needs libtpu, which is in the extra tpu and not in test: beside it commands complain wherever there is no TPU.
libtpu = pytest.mark.slow
FSDP = {"parallel.data": 1, "parallel.fsdp": 8}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("sd_dit", FSDP, marks=pytest.mark.slow),
        pytest.param(
            "sd_dit",
            {"parallel.data": 2, "parallel.fsdp": 4, "parallel.microbatches": 2} | CONDITION,
            marks=pytest.mark.slow,
        ),
        pytest.param("sd_dit", FSDP | {"model.scan": False, "model.remat": "full"}, marks=pytest.mark.slow),
        ("maskdit", FSDP | {"model.remat": "dots", "parallel.microbatches": 2}),
        pytest.param("dit_decoder", {"parallel.data": 8}, marks=pytest.mark.slow),
        pytest.param("dit", FSDP, marks=pytest.mark.slow),
        ("sd_dit", {"parallel.data": 2, "parallel.fsdp": 2, "parallel.tensor": 2}),
    ],
)
def test_a_step_moves_weights_gradients_and_means_and_nothing_else(method, changes):
    changes = {"model.width": 32, "model.heads": 4} | changes
    config = smallest_config(method, changes)
    mesh = sharding.make_mesh(config.parallel)
    parts = tiny_parts(method, changes, sharding.make_constrain(mesh))
    state = abstract_state(parts, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(parts), out_shardings=(layout, sharding.replicated(mesh)), compiler_options=QUICK)
    text = step.lower(state, aot.abstract_batch(config, mesh)).compile().as_text()
    rows = aot.collectives_by_purpose(hlo.collectives(text))
    assert {row["kind"] for row in rows} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert not [row["purpose"] for row in rows if "unexplained" in row["purpose"]]
    assert any("gradients" in row["purpose"] for row in rows)
    assert any("weights" in row["purpose"] for row in rows) == (mesh.shape["fsdp"] > 1)


def test_without_recomputation_a_step_computes_what_it_does_on_paper():
    config = make_config("dit", {"model.width": 64, "model.heads": 4, "model.depth": 3, "model.image_size": 8,
                                 "batch_size": 8, "model.num_classes": 10})  # fmt: skip
    mesh = sharding.make_mesh(config.parallel, jax.devices()[:1])
    compiled = hlo.matrix_flops(aot.lower_train_step(config, mesh).compile().as_text())
    paper = sum(flops.training(config).values())
    assert paper <= compiled / config.batch_size <= 1.02 * paper


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5litepod-16", "v5e:4x4"),
        ("v9:2x2", "v3, v4, v5e, v5p, v6e"),
        ("v5e", "GENERATION:SHAPE"),
        ("v5e:4x", "GENERATION:SHAPE"),
        pytest.param("v5e:3x3", "not divisible", marks=libtpu),
    ],
)
def test_a_topology_that_there_is_not(topology, words):
    with pytest.raises(UserError, match=words):
        aot.devices_of(topology)


def test_without_libtpu_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        aot.devices_of("v5e:2x2")


@libtpu
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v5e:1x1", 1),
        ("v3:2x2", 8),
        ("v4:2x2x4", 16),
        ("v5e:4x4", 16),
        ("v5e:16x16", 256),
        ("v5p:2x2x2", 8),
        ("v6e:2x4", 8),
    ],
)
def test_the_mesh_of_a_topology(topology, devices):
    found, chip = aot.devices_of(topology)
    assert len(found) == devices
    assert chip == aot.CHIPS[topology.split(":")[0]]
    assert sharding.make_mesh(make_config().parallel, found).size == devices


@libtpu
def test_a_mesh_or_a_batch_that_does_not_fit_the_topology():
    with pytest.raises(ConfigError, match="needs 3 devices, but there are 4"):
        aot.report(make_config(changes={"parallel.data": 3}), "v5e:2x2")
    with pytest.raises(ConfigError, match="batch_size 6 is not divisible by 4"):
        aot.report(make_config(changes={"batch_size": 6}), "v5e:2x2")
    with pytest.raises(ConfigError, match=r"fsdp 256 does not divide model.width 1152.*data=2 and parallel.fsdp=128"):
        aot.report(resolve(imagenet(256, "")), "v5e:16x16")


def test_the_state_falls_with_the_chips():
    """Of SD-DiT-XL/2 in GiB: what is not a matrix is whole on every device, and is little."""
    config = resolve(imagenet(256, ""))
    state = jax.eval_shape(make_parts(config).init_state, jax.random.key(0))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    for chips, data in ((8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (256, 2)):
        mesh = AbstractMesh((data, chips // data, 1), sharding.AXES)
        share = aot.state_bytes(abstract_state(make_parts(config), mesh))
        assert share == pytest.approx(whole * data / chips, rel=0.01 + 0.001 * chips / data)


def test_what_takes_less_memory_the_cheapest_first():
    config = resolve(imagenet(256, ""))
    proposals = [" ".join(changes) for changes, _ in aot.smaller(config)]
    assert proposals[:3] == [
        "--config.model.remat=full",
        "--config.model.remat=full --config.parallel.microbatches=2",
        "--config.model.remat=full --config.parallel.microbatches=4",
    ]
    first, smaller = next(iter(aot.smaller(make_config())))
    assert first == ["--config.parallel.data=1", "--config.parallel.fsdp=-1"]
    assert (smaller.parallel.data, smaller.parallel.fsdp) == (1, -1)


def preflight(*arguments):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(
        [sys.executable, "-m", "sddit_jax.preflight", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_wrong_arguments_of_preflight(command):
    done = command("preflight", "--config=configs/imagenet256.py", "--topology=v9:2x2")
    assert done.returncode == 2
    assert "error: topology 'v9:2x2' is not" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "method"),
    [
        *((topology, "sd_dit") for topology in ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")),
        ("v5e:2x4", "maskdit"),
        ("v5e:2x4", "dit"),
    ],
)
def test_small_models_compile_for_each_generation(topology, method):
    """With little recomputed, and nothing sent but weights, gradients and means."""
    report = aot.report(resolve(imagenet(256, f"size=S/2,method={method}")), topology, sampler=False, quick=True)
    assert report.fits
    assert report.state_gib < report.peak_gib < 6
    assert 1 <= report.compiled_flops_per_image / sum(report.flops_per_image.values()) <= 1.1
    assert {row["kind"] for row in report.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert not [row["purpose"] for row in report.collectives if "unexplained" in row["purpose"]]


@pytest.mark.slow
def test_preflight_of_a_run_that_does_not_fit_names_what_does():
    arguments = "--config=configs/imagenet256.py:size=S/2,method=dit", "--topology=v5e:1x1", "--quick"
    done = preflight(*arguments, "--batch=512", "--config.model.remat=none")
    assert done.returncode == 2, done.stderr
    assert "DOES NOT FIT" in done.stderr
    assert "error: the run does not fit v5e:1x1; with --config.model.remat=dots it takes" in done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is False
    assert report["peak_gib"] > report["usable_gib"] == 15.75

"""The mesh, the table of layouts, and that neither changes what is computed."""

import functools
import itertools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from jax.sharding import PartitionSpec as P
from tiny import CONDITION, QUICK, float64, jit, make_batch, noise, noised_state, smallest_config, tiny_parts

from sddit_jax.config import schema
from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import METHODS
from sddit_jax.data.loader import make_loader
from sddit_jax.data.sources import open_source
from sddit_jax.errors import ConfigError
from sddit_jax.method.train_step import make_train_step
from sddit_jax.models.layers import Hooks, unconstrained
from sddit_jax.parallel.sharding import (
    batch_sharding,
    check_batch,
    local_rows,
    make_constrain,
    make_mesh,
    path_name,
    put_batch,
    replicated,
    shardings,
)
from sddit_jax.train import train

STEPS = 20
DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"
MESHES = {  # data x fsdp x tensor
    "1x1x1": {"parallel.data": 1},
    "8x1x1": {"parallel.data": 8},
    "1x8x1": {"parallel.data": 1, "parallel.fsdp": 8},
    "2x2x2": {"parallel.data": 2, "parallel.fsdp": 2, "parallel.tensor": 2},
    "4x1x2": {"parallel.data": 4, "parallel.tensor": 2},
}
VARIANTS = {
    "sd_dit": ("sd_dit", {}),
    "sd_dit condition": ("sd_dit", CONDITION),
    "maskdit": ("maskdit", {}),
    "dit_decoder": ("dit_decoder", {}),
    "dit": ("dit", {}),
}
# How a step is computed; none of it may change what it computes.
PLAIN = {"parallel.microbatches": 1, "model.remat": "none", "model.scan": True}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def cases(variants):
    """(variant, mesh, options): each variant on each mesh, and any two values of variant, mesh and options together."""
    for (v, variant), (m, layout) in itertools.product(enumerate(variants), enumerate(MESHES)):
        options = {
            "parallel.microbatches": 1 + (v + m) % 2,
            "model.remat": ("none", "dots", "full")[(v + m) % 3],
            "model.scan": (v + m) // 2 % 2 == 0,
        }
        yield variant, layout, options


def name(value):
    """The part of a test's name that stands for a value."""
    return value if isinstance(value, str) else ",".join(f"{k.split('.')[1]}={v}" for k, v in value.items())


def mesh_of(parallel):
    """The mesh over as many of the devices as it needs."""
    return make_mesh(parallel, jax.devices()[: parallel.data * parallel.fsdp * parallel.tensor])


def run(parts, mesh, state, batches, compiler_options=QUICK):
    """The state after a step for each of the batches, and the metrics of each step."""
    layout = shardings(mesh, state)
    step = jax.jit(
        make_train_step(parts),
        out_shardings=(layout, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options,
    )
    state, rows = jax.device_put(state, layout), []
    for batch in batches:
        state, metrics = step(state, put_batch(mesh, batch))
        rows.append(jax.device_get(metrics))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_get(state), rows


def assert_same_state(state, expected, learning_rate, relative, absolute):
    """|difference| <= relative |x| + absolute lr for parameters, EMA, teacher and centers."""

    def check(path, a, b):
        assert a.dtype == b.dtype
        distance = np.max(np.abs(a - b) - relative * np.abs(b)) / learning_rate
        assert distance <= absolute, f"{path_name(path)}: off by {distance:.3g} lr"

    for name in ("params", "ema", "aux"):
        jax.tree_util.tree_map_with_path(check, state[name], expected[name])
    assert int(state["step"]) == STEPS


def toy_run(variant, layout, changes, constrained=True):
    method, own = VARIANTS[variant]
    changes = own | MESHES[layout] | changes
    config = smallest_config(method, changes)
    mesh = mesh_of(config.parallel)
    parts = tiny_parts(method, changes, make_constrain(mesh) if constrained else unconstrained)
    return *run(parts, mesh, noised_state(parts), [make_batch(parts, seed) for seed in range(STEPS)]), config


@functools.cache
def toy_run_alone(variant):
    return toy_run(variant, "1x1x1", PLAIN, constrained=False)


# One mesh of each method is fast. 8 does not divide the 2 heads: what tensor splits then is the MLPs alone.
TOYS = [
    case if case[0] in METHODS and i % len(MESHES) == (i // len(MESHES) + 2) % len(MESHES) else slow(*case)
    for i, case in enumerate(cases(VARIANTS))
]
TOYS += [slow("sd_dit", "1x1x1", PLAIN | {"parallel.tensor": 8})]


@pytest.mark.parametrize(("variant", "layout", "options"), TOYS, ids=name)
def test_no_layout_and_no_option_changes_a_result(variant, layout, options):
    """In float64, so that nothing but rounding may differ: see `float64`."""
    with float64():
        state, rows, config = toy_run(variant, layout, options)
        expected_state, expected_rows, _ = toy_run_alone(variant)
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(state["params"]))
        assert_same_state(state, expected_state, config.optimizer.learning_rate, 0, 1e-6)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for key in row:
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-8, atol=1e-9, err_msg=key)


def digits_run(method, layout, changes):
    """Twenty steps of configs/digits.py on real digits, in float32, from noised fresh parameters."""
    config = runpy.run_path(str(DIGITS))["get_config"](method)
    config.update_from_flattened_dict(MESHES[layout] | changes)
    config = resolve(config)
    mesh = mesh_of(config.parallel)
    parts = make_parts(config, Hooks(make_constrain(mesh)))
    state = jax.device_get(jit(parts.init_state)(jax.random.key(0)))
    params = jax.device_get(noise(state["params"], 1))
    state |= {"params": params, "ema": {"default": params["network"]}}
    if "discrimination" in state["aux"]:
        teacher = {"encoder": params["network"]["encoder"], "head": params["discrimination"]}
        state["aux"]["discrimination"]["teacher"] = teacher
    source = open_source("digits", split="train", image_size=8, channels=1)
    settings = {"batch_size": config.batch_size, "seed": 0, "start_step": 0, "flip": False}
    rows = local_rows(mesh, config.batch_size)
    batches = make_loader(source, rows=rows, **settings, num_threads=1, prefetch=1)
    batches = ({key: batch[key] for key in ("image", "label")} for batch in itertools.islice(batches, STEPS))
    # These compute for longer than toys: a little optimisation pays.
    options = QUICK | {"xla_backend_optimization_level": 1}
    return *run(parts, mesh, jax.tree.map(np.array, state), batches, options), config


@functools.cache
def digits_run_alone(method):
    return digits_run(method, "1x1x1", PLAIN)


def losses(rows):
    """name -> the values of all steps."""
    others = ("train/update_norm", "train/learning_rate", "train/skipped")
    names = [name for name in rows[0] if name.startswith("train/") and name not in others]
    return {name: np.array([row[name] for row in rows]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout", "options"), list(cases(METHODS)), ids=name)
def test_no_layout_and_no_option_changes_a_result_in_float32(method, layout, options):
    """At the size, learning rate and Adam's eps of a real run."""
    state, rows, config = digits_run(method, layout, options)
    expected_state, expected_rows, _ = digits_run_alone(method)
    assert_same_state(state, expected_state, config.optimizer.learning_rate, 1e-5, 0.01)
    expected = losses(expected_rows)
    for name, values in losses(rows).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_computes_nearly_the_same_and_keeps_its_state_in_float32(method):
    state, rows, _ = digits_run(method, "2x2x2", PLAIN | {"model.dtype": "bfloat16"})
    expected_state, expected_rows, _ = digits_run_alone(method)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, expected_state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    values, expected = losses(rows), losses(expected_rows)
    np.testing.assert_allclose(values["train/loss"], expected["train/loss"], rtol=0.02)
    # Two trajectories: the loss of the one token, which falls by half within these steps, is up to 3.4 % off in a step.
    for name in values:
        np.testing.assert_allclose(values[name].mean(), expected[name].mean(), rtol=0.02, err_msg=name)


def specs_of(method="sd_dit", changes=None, **parallel):
    """path -> PartitionSpec of every leaf of a state."""
    parts = tiny_parts(method, changes)
    mesh = make_mesh(schema.ParallelConfig(**parallel))
    state = jax.eval_shape(parts.init_state, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shardings(mesh, state))
    return {path_name(path): sharding.spec for path, sharding in leaves}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "lion", "sgd", "radam", "nadamw", "lamb", "muon"])
def test_ema_teacher_and_optimiser_lie_like_their_parameters(optimizer):
    specs = specs_of(changes={"optimizer.name": optimizer}, data=2, fsdp=2, tensor=2)
    params = {path.removeprefix("params/"): spec for path, spec in specs.items() if path.startswith("params/")}
    assert {spec for spec in params.values() if spec != P()} > {P("fsdp", None)}
    for path, spec in params.items():
        if path.startswith("network/"):
            assert specs[f"ema/default/{path.removeprefix('network/')}"] == spec
        if path.startswith(("network/encoder/", "discrimination/")):
            taught = path.removeprefix("network/").replace("discrimination/", "head/")
            assert specs[f"aux/discrimination/teacher/{taught}"] == spec
        moments = [s for name, s in specs.items() if name.startswith("opt_state/") and name.endswith("/" + path)]
        assert moments
        assert set(moments) == {spec}


def test_the_table_of_layouts():
    specs = specs_of(data=2, fsdp=2, tensor=2)
    blocks = "params/network/encoder/stack/blocks"
    assert specs[f"{blocks}/attention/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs[f"{blocks}/attention/qkv/bias"] == P(None, None, "tensor", None)
    assert specs[f"{blocks}/attention/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs[f"{blocks}/mlp/hidden/kernel"] == P(None, "fsdp", "tensor")
    assert specs[f"{blocks}/mlp/hidden/bias"] == P(None, "tensor")
    assert specs[f"{blocks}/mlp/out/kernel"] == P(None, "tensor", "fsdp")
    assert specs[f"{blocks}/modulation/linear/kernel"] == P(None, "fsdp", None, None)
    assert specs["params/network/decoder/bridge/modulation/linear/kernel"] == P("fsdp", None, None)
    assert specs["params/network/encoder/label/table"] == P(None, "fsdp")
    assert specs["params/discrimination/prototypes"] == P("fsdp", None)
    assert specs["params/network/encoder/patch/kernel"] == P("fsdp", None)
    for path in (
        "step",
        "params/network/encoder/cls",
        "params/network/encoder/patch/bias",
        "aux/discrimination/center/patch",
    ):
        assert not any(specs[path]), path


def test_an_axis_that_does_not_divide_is_left_out():
    specs = specs_of(fsdp=1, tensor=8)  # 2 heads, 64 hidden channels
    assert specs["params/network/encoder/stack/blocks/attention/qkv/kernel"] == P(None, "fsdp", None, None, None)
    assert specs["params/network/encoder/stack/blocks/mlp/hidden/kernel"] == P(None, "fsdp", "tensor")


def test_a_rule_with_too_many_axes_names_the_leaf():
    with pytest.raises(ValueError, match="params/patch/kernel"):
        shardings(make_mesh(schema.ParallelConfig()), {"params": {"patch": {"kernel": jnp.zeros(4)}}})


def test_a_mesh_takes_what_is_left_for_data():
    assert dict(make_mesh(schema.ParallelConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(schema.ParallelConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(schema.ParallelConfig(), jax.devices()[:2]).shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(schema.ParallelConfig(data=2, fsdp=-1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(schema.ParallelConfig(data=1, tensor=-1)).shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    with pytest.raises(ConfigError, match=r"parallel\.data and parallel\.fsdp are -1"):
        make_mesh(schema.ParallelConfig(fsdp=-1))


@pytest.mark.parametrize(
    ("parallel", "sizes", "needed"),
    [
        ({"fsdp": 3}, "data 2 x fsdp 3 x tensor 1", 6),
        ({"data": 3, "fsdp": -1}, "data 3 x fsdp 2 x tensor 1", 6),
        ({"data": 5, "tensor": -1}, "data 5 x fsdp 1 x tensor 1", 5),
        ({"data": 1}, "data 1 x fsdp 1 x tensor 1", 1),
        ({"data": 4}, "data 4 x fsdp 1 x tensor 1", 4),
        ({"data": 4, "fsdp": 2, "tensor": 2}, "data 4 x fsdp 2 x tensor 2", 16),
        ({"fsdp": 16}, "data 1 x fsdp 16 x tensor 1", 16),
    ],
)
def test_a_mesh_that_does_not_fit_names_its_sizes(parallel, sizes, needed):
    with pytest.raises(ConfigError, match=f"{sizes} needs {needed} devices, but there are 8"):
        make_mesh(schema.ParallelConfig(**parallel))


@pytest.mark.parametrize(("batch_size", "microbatches"), [(20, 2), (24, 4), (12, 2), (2, 1)])
def test_a_batch_that_does_not_divide_names_the_numbers(batch_size, microbatches):
    mesh = make_mesh(schema.ParallelConfig(data=2, fsdp=2, tensor=2))
    check_batch(mesh, 24, 3)
    message = rf"batch_size {batch_size} is not divisible by {4 * microbatches} \(data 2 x fsdp 2 x microbatches"
    with pytest.raises(ConfigError, match=message):
        check_batch(mesh, batch_size, microbatches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.fsdp": 3}, "data 2 x fsdp 3 x tensor 1 needs 6 devices"),
        ({"parallel.data": -1, "parallel.tensor": -1}, "can take what is left"),
        ({"batch_size": 12}, "batch_size 12 is not divisible by 8"),
        ({"batch_size": 24, "parallel.fsdp": 2, "parallel.microbatches": 2}, "not divisible by 16"),
    ],
)
def test_a_run_that_does_not_fit_its_devices_is_not_begun(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config("dit", {"data.source": "digits"} | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", MESHES)
def test_local_rows_are_the_rows_of_this_process_devices_each_once(layout):
    mesh = mesh_of(smallest_config("dit", MESHES[layout]).parallel)
    rows = local_rows(mesh, 24)
    np.testing.assert_array_equal(rows, np.arange(24))  # one process owns all
    batch = put_batch(mesh, {"label": rows})["label"]
    np.testing.assert_array_equal(batch, rows)
    assert batch.sharding == batch_sharding(mesh)
    shares = {tuple(shard.data.tolist()) for shard in batch.addressable_shards}
    assert sorted(row for share in shares for row in share) == list(range(24))


def test_local_rows_of_a_process_with_some_of_the_devices(monkeypatch):
    """As on two hosts: this one owns the devices 4 to 7."""
    mesh = make_mesh(schema.ParallelConfig(data=4, tensor=2))
    owned = {device: rows for device, rows in batch_sharding(mesh).devices_indices_map((24,)).items() if device.id >= 4}
    kind = type(batch_sharding(mesh))
    monkeypatch.setattr(kind, "addressable_devices_indices_map", lambda self, shape: owned)
    np.testing.assert_array_equal(local_rows(mesh, 24), np.arange(12, 24))

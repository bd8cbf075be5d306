"""The train step as a whole: one pure, guarded function of state and batch."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    assert_close,
    assert_same_bits,
    compiled_step,
    float64,
    jit,
    make_batch,
    noised_state,
    tiny_parts,
)

from sddit_jax.config.presets import METHODS
from sddit_jax.config.schema import OptimizerConfig
from sddit_jax.errors import ConfigError
from sddit_jax.method.optimizer import make_optimizer
from sddit_jax.method.train_step import draw, make_train_step, student_views

GOLDEN = Path(__file__).parent / "golden.json"
GUARDED = ("params", "ema", "opt_state", "aux")
# The smallest network there is.
SMALLEST = {"model.depth": 1, "model.image_size": 4, "model.channels": 1}
OPTIMIZERS = {  # with learning rates at which 20 steps change the loss
    "adamw": 1e-3, "adam": 1e-3, "radam": 1e-2, "nadamw": 1e-3, "lamb": 1e-2, "lion": 3e-4, "sgd": 1e-3, "muon": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sd_dit():
    """Parts, jitted step, a noised state and a batch."""
    parts, step = compiled_step("sd_dit")
    return parts, step, noised_state(parts), make_batch(parts)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_gives_the_golden_metrics(method):
    parts, step = compiled_step(method)
    _, metrics = step(noised_state(parts), make_batch(parts))
    measured = {key: float(value) for key, value in sorted(metrics.items())}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {method: measured}, indent=1, sort_keys=True) + "\n")
        return
    why = f"if {method} is meant to compute something else now: UPDATE_GOLDEN=1 python -m pytest {__file__}"
    assert measured.keys() == golden[method].keys(), why
    for key, value in golden[method].items():
        np.testing.assert_allclose(measured[key], value, rtol=1e-4, atol=1e-9, err_msg=f"{key}; {why}")


def test_the_same_state_and_batch_give_the_same_bits(sd_dit):
    _, step, state, batch = sd_dit
    assert_same_bits(step(state, batch), step(state, batch))


def test_all_that_is_random_follows_from_seed_and_step(sd_dit):
    parts, step, state, batch = sd_dit
    state = state | {"step": jnp.int32(7)}
    x0 = parts.codec.encode(batch["image"])

    @jit
    def expected(seed, number):
        drawn = draw(jax.random.fold_in(jax.random.key(seed), number), parts, x0, batch)
        views = student_views(state["params"]["network"], parts, drawn)
        return drawn, parts.objectives[0].loss(state["params"], {}, {}, views, number)[1]

    drawn, metrics = expected(parts.seed, 7)
    assert metrics.keys() == {"train/denoising"}
    assert_close({key: step(state, batch)[1][key] for key in metrics}, metrics, 1e-5)
    for other in ((parts.seed, 8), (parts.seed + 1, 7)):
        for name in ("eps_BHWC", "sigma_B", "label_B", "mask"):
            a, b = (jax.tree.leaves(getattr(d, name))[0] for d in (drawn, expected(*other)[0]))
            assert not np.array_equal(a, b), name


def test_a_step_moves_parameters_by_the_reported_update_and_counts_itself(sd_dit):
    parts, step, state, batch = sd_dit
    new, metrics = step(state, batch)
    moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), new["params"], state["params"])
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose(metrics["train/update_norm"], norm, rtol=1e-4)
    whole = np.sqrt(
        sum(float(metrics[f"grad_norm/{module}"]) ** 2 for module in ("encoder", "decoder", "discrimination"))
    )
    np.testing.assert_allclose(metrics["grad_norm/all"], whole, rtol=1e-5)
    weight = parts.objectives[1].config.weight
    total = metrics["train/denoising"] + weight * (
        metrics["train/discrimination/patch"] + metrics["train/discrimination/cls"]
    )
    np.testing.assert_allclose(metrics["train/loss"], total, rtol=1e-6)
    assert int(new["step"]) == int(state["step"]) + 1
    assert float(metrics["train/skipped"]) == 0


@pytest.mark.parametrize(("number", "decay"), [(0, 0.1), (1, 2 / 11), (50, 51 / 60), (90, 0.9), (10**6, 0.9)])
def test_the_ema_follows_the_new_parameters_by_its_law(sd_dit, number, decay):
    _, step, state, batch = sd_dit
    new, _ = step(state | {"step": jnp.int32(number)}, batch)
    old = state["ema"]["default"]
    trained = new["params"]["network"]
    expected = jax.tree.map(lambda e, p: decay * np.float64(e) + (1 - decay) * np.float64(p), old, trained)
    assert_close(new["ema"]["default"], expected, 1e-6)


def test_the_teacher_follows_the_new_parameters(sd_dit):
    _, step, state, batch = sd_dit
    new, _ = step(state, batch)
    old = state["aux"]["discrimination"]["teacher"]
    students = {"encoder": new["params"]["network"]["encoder"], "head": new["params"]["discrimination"]}
    expected = jax.tree.map(lambda t, s: 0.996 * np.float64(t) + 0.004 * np.float64(s), old, students)
    assert_close(new["aux"]["discrimination"]["teacher"], expected, 1e-6)


@pytest.fixture(scope="module")
def guarded():
    """A step, its state after one clean step, and a batch of floats in which a pixel can be spoiled."""
    parts, step = compiled_step("sd_dit")
    batch = make_batch(parts)
    batch["image"] = batch["image"].astype(np.float32)
    return step, step(noised_state(parts), batch)[0], batch


def assert_skips(step, state, batch):
    new, metrics = step(state, batch)
    assert float(metrics["train/skipped"]) == 1
    for name in GUARDED:
        assert_same_bits(new[name], state[name])
    assert int(new["step"]) == int(state["step"]) + 1
    return new


@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf, 1e30])
def test_a_batch_that_gives_no_finite_step_changes_nothing_but_the_count(guarded, pixel):
    step, state, batch = guarded
    image = batch["image"].copy()
    image[3, 2, 1, 0] = pixel
    state = assert_skips(step, state, batch | {"image": image})
    after, metrics = step(state, batch)
    assert float(metrics["train/skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    assert not np.array_equal(
        after["params"]["network"]["encoder"]["cls"], state["params"]["network"]["encoder"]["cls"]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoiled", ["params", "teacher"])
def test_a_state_that_gives_no_finite_step_stays(guarded, spoiled, value):
    step, state, batch = guarded
    tree = state["params"]["network"] if spoiled == "params" else state["aux"]["discrimination"]["teacher"]
    patch = tree["encoder"]["patch"]
    kept, patch["bias"] = patch["bias"], patch["bias"].at[0].set(value)
    try:
        assert_skips(step, state, batch)
    finally:
        patch["bias"] = kept


@pytest.mark.parametrize("method", METHODS)
def test_no_buffer_is_twice_in_the_initial_state(method, monkeypatch):
    parts = tiny_parts(method)
    monkeypatch.setattr(parts.network, "init", jit(parts.network.init))
    leaves = jax.tree.leaves(parts.init_state(jax.random.key(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_keeps_the_types_of_the_state(method):
    """Weak types too: a difference compiles the step of a run twice."""
    parts = tiny_parts(method)
    state = jax.eval_shape(parts.init_state, jax.random.key(0))
    new, _ = jax.eval_shape(make_train_step(parts), state, make_batch(parts))

    def kind(leaf):
        return leaf.shape, leaf.dtype, leaf.weak_type

    assert jax.tree.map(kind, new) == jax.tree.map(kind, state)


def test_the_state_can_be_donated():
    parts = tiny_parts("dit", SMALLEST)
    step = jit(make_train_step(parts), donate_argnums=0)
    state = noised_state(parts)
    new, _ = step(state, make_batch(parts))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    again, _ = step(noised_state(parts), make_batch(parts))
    assert_same_bits(again, new)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"optimizer.warmup_steps": 3}, {0: 0.25, 1: 0.5, 3: 1.0, 99: 1.0}),
        (
            {"optimizer.warmup_steps": 20, "optimizer.schedule": "cosine"},
            {0: 1 / 21, 20: 1.0, 40: (1 + np.sqrt(0.5)) / 2, 60: 0.5, 100: 0.0},
        ),
    ],
)
def test_the_learning_rate_of_a_step_scales_its_update(changes, rates):
    parts = tiny_parts("dit", SMALLEST | {"optimizer.name": "sgd", "optimizer.b1": 0.0} | changes)
    step, state, batch = jit(make_train_step(parts)), noised_state(parts), make_batch(parts)
    for number, rate in rates.items():
        _, metrics = step(state | {"step": jnp.int32(number)}, batch)
        np.testing.assert_allclose(metrics["train/learning_rate"], 1e-3 * rate, rtol=1e-5, atol=1e-10)
        expected = 1e-3 * rate * float(metrics["grad_norm/all"])
        np.testing.assert_allclose(metrics["train/update_norm"], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_reduces_the_loss_of_a_repeated_batch(name):
    parts = tiny_parts("dit", SMALLEST | {"optimizer.name": name, "optimizer.learning_rate": OPTIMIZERS[name]})
    step, state, batch = jit(make_train_step(parts)), noised_state(parts), make_batch(parts)
    losses = []
    for _ in range(20):
        state, metrics = step(state | {"step": jnp.int32(0)}, batch)  # the same noise each time
        assert float(metrics["train/skipped"]) == 0
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.98 * losses[0]


def test_all_optimizers_are_tested():
    with pytest.raises(ConfigError) as error:
        make_optimizer(OptimizerConfig(name="adamax"))
    assert str(error.value) == f"optimizer.name is 'adamax', but must be one of {', '.join(OPTIMIZERS)}"


@pytest.mark.parametrize("name", ["adam", "radam", "sgd"])
def test_an_optimizer_without_weight_decay_refuses_it(name):
    with pytest.raises(ConfigError, match=rf"weight_decay is 0.1, but {name} has none"):
        make_optimizer(OptimizerConfig(name=name, weight_decay=0.1))


@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_clip_norm_bounds_the_gradient_and_only_if_it_is_longer(clip_norm):
    sgd = {"optimizer.name": "sgd", "optimizer.b1": 0.0, "optimizer.clip_norm": clip_norm}
    parts = tiny_parts("dit", SMALLEST | sgd)
    _, metrics = jit(make_train_step(parts))(noised_state(parts), make_batch(parts))
    norm = float(metrics["grad_norm/all"])  # as measured, before clipping
    assert 0.02 < norm < 50
    np.testing.assert_allclose(metrics["train/update_norm"], 1e-3 * min(clip_norm, norm), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_microbatches_change_no_step(method):
    """One update of parameters, EMA, teacher and centers, from the same noise, masks and dropped labels."""
    with float64():
        results = []
        for count in (1, 2, 4):
            parts = tiny_parts(method, {"parallel.microbatches": count, "optimizer.eps": 1e-3})
            results.append(jit(make_train_step(parts))(noised_state(parts), make_batch(parts)))
        for state, metrics in results[1:]:
            assert int(state["step"]) == 1
            assert_close((state, metrics), results[0], 1e-10)

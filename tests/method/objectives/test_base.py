"""What an objective may have: features of the batch, a weight by step, tokens of a block, parameters."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import jit, make_batch, noised_state, tiny_parts

from sddit_jax.config.border import resolve
from sddit_jax.config.presets import default_config
from sddit_jax.errors import ConfigError
from sddit_jax.method.objectives import compose
from sddit_jax.method.objectives.base import Context, Needs, Objective, ObjectiveConfig
from sddit_jax.method.train_step import make_train_step

CHANGES = {"model.depth": 1, "model.image_size": 4}


class Features(Objective):
    """The mean square of a feature that the batch brings, times a parameter of its own."""

    name = "features"
    Config = ObjectiveConfig
    needs = Needs(features=("outside",))

    def init_params(self, key):
        return {"scale": jnp.ones(())}

    def loss(self, params, state, ema, views, step):
        loss = params[self.name]["scale"] * jnp.square(views.features["outside"]).mean()
        return loss, {"train/features": loss}, {}


def parts_with_features(microbatches=1, **section):
    parts = tiny_parts("dit_decoder", CHANGES | {"parallel.microbatches": microbatches})
    context = Context(parts.network, parts.diffusion, 100, parts.ema_decay)
    objective = Features(ObjectiveConfig(**section), context)
    return dataclasses.replace(parts, objectives=(*parts.objectives, objective))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_features_of_the_batch_reach_the_objective_row_by_row(microbatches):
    parts = parts_with_features(microbatches, weight=2.0)
    batch = make_batch(parts) | {"outside": np.arange(16 * 3, dtype=np.float32).reshape(16, 3)}
    state = noised_state(parts)
    new, metrics = jit(make_train_step(parts))(state, batch)
    scale, mean = float(state["params"]["features"]["scale"]), np.square(batch["outside"]).mean()
    np.testing.assert_allclose(metrics["train/features"], scale * mean, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm/features"], 2 * mean, rtol=1e-6)
    assert new["params"]["features"]["scale"] < scale
    assert "features" not in new["ema"]["default"]


def test_a_batch_without_a_feature_is_refused_by_name():
    parts = parts_with_features(weight=1.0)
    with pytest.raises(ConfigError, match=r"objectives.features needs outside .* records have image, label"):
        jax.eval_shape(make_train_step(parts), noised_state(parts), make_batch(parts))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 50: 0.5, 99: 0.5}),
        ("linear", {0: 0.5, 20: 0.5, 40: 0.25, 60: 0.0, 99: 0.0}),
        ("cosine", {10: 0.5, 30: 0.25 + 0.25 * np.sqrt(0.5), 40: 0.25, 60: 0.0}),
    ],
)
def test_the_weight_is_a_function_of_the_step(schedule, expected):
    section = ObjectiveConfig(weight=0.5, weight_schedule=schedule, final_weight=0.0, weight_steps=(20, 60))
    objective = Features(section, Context(None, None, 100, None))
    for step, weight in expected.items():
        np.testing.assert_allclose(objective.weight(jnp.int32(step)), weight, rtol=1e-6, atol=1e-9)


def test_a_weight_that_rises_from_0_trains_its_objective():
    def active(**section):
        config = default_config("dit_decoder")
        config.objectives.discrimination.update(section)
        return resolve(config).objectives.discrimination.active

    rising = {"weight": 0.0, "weight_schedule": "linear", "final_weight": 0.1}
    assert active(**rising, weight_steps=(0, 10))
    assert not active(weight=0.0)
    with pytest.raises(ConfigError, match=r"objectives.discrimination.weight_steps is \(10, 10\)"):
        active(**rising, weight_steps=(10, 10))


def test_a_change_of_the_weight_without_a_schedule_is_refused():
    config = default_config("dit_decoder")
    config.objectives.discrimination.weight_steps = (20, 50)
    with pytest.raises(ConfigError, match=r"weight_steps \(20, 50\), but .*\.weight_schedule is 'constant'"):
        resolve(config)


def test_no_two_metrics_have_one_name():
    class Loud(Features):
        def loss(self, params, state, ema, views, step):
            return jnp.zeros(()), {"train/loss": jnp.zeros(())}, {}

    parts = tiny_parts("dit_decoder", CHANGES)
    context = Context(parts.network, parts.diffusion, 100, parts.ema_decay)
    loud = dataclasses.replace(parts, objectives=(*parts.objectives, Loud(ObjectiveConfig(weight=1.0), context)))
    batch = make_batch(parts) | {"outside": np.zeros((16, 1), np.float32)}
    with pytest.raises(ValueError, match="objective features gives train/loss, a name that is taken"):
        jax.eval_shape(make_train_step(loud), noised_state(loud), batch)


def test_a_block_that_the_encoder_lacks_is_refused(monkeypatch):
    class Deep(Features):
        needs = Needs(blocks=(3,))

    parts = tiny_parts("dit_decoder")
    context = Context(parts.network, parts.diffusion, 100, parts.ema_decay)
    section = SimpleNamespace(features=ObjectiveConfig(weight=1.0))
    monkeypatch.setattr(compose, "OBJECTIVES", (Deep,))
    with pytest.raises(ConfigError, match=r"objectives.features needs the tokens of block 3, but model.depth is 2"):
        compose.make_objectives(section, context)

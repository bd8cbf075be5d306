import dataclasses
import json

import ml_collections
import pytest
from helpers import make_config

from sddit_jax.config import METHODS, Config, default_config, flatten, identity_differences, resolve, to_dict
from sddit_jax.errors import ConfigError


def nested(key, value):
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def error_of(values):
    with pytest.raises(ConfigError) as error:
        resolve(values)
    return str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method):
    config = resolve(default_config(method))
    values = to_dict(config)
    assert resolve(values) == config
    assert resolve(json.loads(json.dumps(values))) == config
    assert resolve(ml_collections.ConfigDict(values)) == config
    for key, value in METHODS[method].items():
        assert dict(flatten(config))[key] == value


def test_defaults_live_in_the_dataclasses():
    assert resolve({}) == Config() == resolve(default_config("sd_dit"))


def test_every_default_says_where_it_is_from():
    def fields(kind):
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                yield from fields(field.type)
            else:
                yield field

    for field in fields(Config):
        assert field.metadata["source"] in {"P", "S", "I", "C"}
        assert field.metadata["meaning"]


def test_default_config_is_locked_and_typed():
    config = default_config()
    with pytest.raises(AttributeError):
        config.model.widht = 3
    with pytest.raises(TypeError):
        config.steps = "many"
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(config).seed = 1


def test_unknown_method():
    with pytest.raises(ConfigError, match=r"'dino'.*sd_dit, maskdit, dit_decoder, dit"):
        default_config("dino")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"widht": 8}}, ["model.widht", "did you mean model.width?"]),
        ({"stepps": 8}, ["stepps", "did you mean steps?"]),
        ({"ema": {"qqq": 8}}, ["ema.qqq", "known: decay"]),
        ({"objectives": {"denoising": {"scop": 8}}}, ["did you mean objectives.denoising.scope?"]),
        ({"model": 3}, ["model is a section", "3"]),
    ],
)
def test_unknown_keys_are_named(values, parts):
    message = error_of(values)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", 1e5, "int"),
        ("steps", True, "int"),
        ("steps", None, "int"),
        ("model.scan", 1, "bool"),
        ("model.dtype", 32, "str"),
        ("ema.decay", "0.9", "float"),
        ("ema.decay", True, "float"),
        ("codec.mean", 0.5, "tuple of numbers"),
        ("codec.mean", (), "tuple of numbers"),
        ("codec.mean", ("0",), "float"),
        ("objectives.discrimination.teacher_momentum", (0.9,), "tuple of 2 numbers"),
        ("objectives.discrimination.teacher_momentum", (0.9, 1.0, 1.0), "tuple of 2 numbers"),
    ],
)
def test_wrong_types(key, value, wanted):
    message = error_of(nested(key, value))
    assert key in message
    assert wanted in message
    assert repr(value[0] if value == ("0",) else value) in message


def test_an_int_may_stand_for_a_float_and_a_list_for_a_tuple():
    config = resolve({"ema": {"decay": 1}, "codec": {"mean": [0, 1, 2, 3]}})
    assert type(config.ema.decay) is float
    assert config.codec.mean == (0.0, 1.0, 2.0, 3.0)


AT_LEAST_ONE = ["steps", "batch_size", "model.image_size", "model.channels", "model.patch", "model.depth", "model.width", "model.heads", "model.mlp_ratio", "model.decoder_width", "model.decoder_heads", "objectives.discrimination.prototypes", "objectives.discrimination.head_width", "objectives.discrimination.bottleneck", "objectives.discrimination.chunk", "optimizer.max_skipped", "data.num_threads", "data.prefetch", "parallel.fsdp", "parallel.tensor", "parallel.microbatches", "checkpoint.every", "checkpoint.keep_last", "sampling.steps", "sampling.grid", "eval.draws", "eval.num_samples", "log.every"]
AT_LEAST_ZERO = ["seed", "model.num_classes", "model.decoder_depth", "objectives.denoising.weight", "objectives.discrimination.weight", "objectives.reconstruction.weight", "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm", "checkpoint.keep_every", "sampling.every", "log.diagnose_every"]


@pytest.mark.parametrize(("key", "smallest"), [(k, 1) for k in AT_LEAST_ONE] + [(k, 0) for k in AT_LEAST_ZERO])
def test_smallest_values(key, smallest):
    kind = type(dict(flatten(Config()))[key])
    message = error_of(nested(key, kind(smallest - 1)))
    assert f"{key} is {kind(smallest - 1)}, but must be at least {smallest}" in message


@pytest.mark.parametrize(
    "key",
    ["model.null_label", "model.remat", "model.dtype", "masking.fill", "objectives.denoising.scope",
     "objectives.discrimination.centering", "objectives.discrimination.teacher", "optimizer.schedule", "codec.name",
     "eval.name"],
)  # fmt: skip
def test_choices(key):
    message = error_of(nested(key, "other"))
    assert f"{key} is 'other', but must be one of " in message
    assert dict(flatten(Config()))[key] in message


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("masking.ratio", [-0.1, 1.0]),
        ("objectives.label_dropout", [-0.1, 1.1]),
        ("ema.decay", [-0.1, 1.1]),
        ("objectives.discrimination.center_momentum", [-0.1, 1.1]),
        ("objectives.discrimination.teacher_temperature_warmup", [-0.1, 1.1]),
        ("diffusion.sigma_data", [0.0, -1.0, float("nan")]),
        ("diffusion.sigma_min", [0.0, -1.0]),
        ("objectives.discrimination.student_temperature", [0.0, -1.0]),
    ],
)
def test_ranges(key, values):
    for value in values:
        assert f"{key} is {value}, but must be " in error_of(nested(key, value))


@pytest.mark.parametrize(
    ("key", "values", "bad"),
    [
        ("teacher_momentum", (0.9, 1.5), 1.5),
        ("teacher_momentum", (-0.5, 1.0), -0.5),
        ("teacher_temperature", (0.0, 0.07), 0.0),
        ("teacher_temperature", (0.04, -0.07), -0.07),
    ],
)
def test_ranges_of_pairs(key, values, bad):
    key = f"objectives.discrimination.{key}"
    assert f"{key} is {bad}, but must be " in error_of(nested(key, values))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"image_size": 33}}, ["model.image_size 33", "model.patch 2"]),
        ({"model": {"width": 100}}, ["model.width 100", "model.heads 16"]),
        ({"model": {"decoder_width": 100}}, ["model.decoder_width 100", "model.decoder_heads 16"]),
        ({"model": {"width": 6, "heads": 3}}, ["model.width 6", "divisible by 4"]),
        ({"model": {"decoder_width": 6, "decoder_heads": 3}}, ["model.decoder_width 6", "divisible by 4"]),
        ({"model": {"image_size": 4}, "masking": {"ratio": 0.8}}, ["masking.ratio 0.8", "4 tokens"]),
        ({"model": {"decoder_depth": 0}}, ["masking.ratio 0.2", "model.decoder_depth is 0"]),
        (
            {"masking": {"ratio": 0.0}, "objectives": {"reconstruction": {"weight": 0.1}}},
            ["objectives.reconstruction", "masking.ratio is 0"],
        ),
        ({"diffusion": {"sigma_max": 0.002}}, ["diffusion.sigma_max 0.002", "sigma_min 0.002"]),
        ({"codec": {"mean": (0.0, 0.0)}}, ["codec.mean has 2 values", "model.channels is 4"]),
        ({"codec": {"scale": (1.0, 1.0, 1.0)}}, ["codec.scale has 3 values", "model.channels is 4"]),
        ({"batch_size": 10, "parallel": {"microbatches": 4}}, ["batch_size 10", "parallel.microbatches 4"]),
    ],
)
def test_impossible_combinations(values, parts):
    message = error_of(values)
    assert all(part in message for part in parts), message


def test_what_may_change_when_a_run_is_continued():
    free = {
        "steps": 7, "parallel.fsdp": 2, "checkpoint.every": 9, "sampling.steps": 3, "eval.draws": 2, "log.every": 1,
        "data.num_threads": 2, "data.prefetch": 3, "data.source": "digits", "model.scan": False, "model.remat": "full",
        "optimizer.max_skipped": 4,
    }  # fmt: skip
    base = make_config()
    assert identity_differences(base, base) == []
    assert identity_differences(base, make_config("sd_dit", free)) == []
    other = make_config("sd_dit", {**free, "seed": 1, "optimizer.learning_rate": 2e-4, "data.flip": False})
    assert identity_differences(base, other) == [
        "seed: 0 -> 1",
        "optimizer.learning_rate: 0.0001 -> 0.0002",
        "data.flip: True -> False",
    ]

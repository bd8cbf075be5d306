import dataclasses
import json

import ml_collections
import pytest
from helpers import make_config

from sddit_jax.config.border import Config, flatten, identity_differences, resolve, to_dict, unknown_key
from sddit_jax.config.presets import METHODS, default_config
from sddit_jax.errors import ConfigError


def nested(key, value):
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def fields(kind, prefix=""):
    """(dotted key, dataclass field) of every leaf."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


FIELDS = dict(fields(Config))


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
        assert flatten(config)[key] == value


def test_defaults_live_in_the_dataclasses():
    assert resolve({}) == Config() == resolve(default_config("sd_dit"))


def test_every_default_says_where_it_is_from():
    for field in FIELDS.values():
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
        ({"ema": {"qqq": 8}}, ["ema.qqq", "known: ema.decay, ema.warmup"]),
        ({"modle": {"depth": 8}}, ["modle", "did you mean model?"]),
        ({"depth": 8}, ["unknown config key depth", "did you mean model.depth?"]),
        ({"model.depth": 8}, ["model.depth must be nested sections"]),
        ({"objectives": {"denoising": {"scop": 8}}}, ["did you mean objectives.denoising.scope?"]),
        ({"model": 3}, ["model is a section", "3"]),
    ],
)
def test_unknown_keys_are_named(values, parts):
    message = error_of(values)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("diffusion.sigma_data", "unknown config key diffusion.sigma_data: did you mean diffusion.edm.sigma_data?"),
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("model.dept", "did you mean model.depth?"),
        ("qqq", "known: seed, steps"),
        ("model", ""),
        ("model.depth", ""),
    ],
)
def test_a_key_at_the_wrong_level_is_found(key, said):
    assert (said in unknown_key(key)) if said else unknown_key(key) == ""


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


def test_the_diffusion_of_a_run_of_format_2_lay_in_one_section():
    old = {"name": "ddpm", "sigma_data": 0.5, "sigma_max": 40.0}
    found = resolve({"diffusion": old, "sampling": {"solver": "ddpm"}}).diffusion
    assert (found.name, found.edm.sigma_max) == ("ddpm", 40.0)


def test_an_int_may_stand_for_a_float_and_a_list_for_a_tuple():
    config = resolve({"ema": {"decay": 1}, "codec": {"mean": [0, 1, 2, 3]}})
    assert type(config.ema.decay) is float
    assert config.codec.mean == (0.0, 1.0, 2.0, 3.0)


def out_of_range():
    """(key, value, what the message wants) just outside every bound that the schema states."""
    for key, field in FIELDS.items():
        pair = isinstance(field.default, tuple)
        one = type(field.default[0] if pair else field.default)(1)
        for kind, step in (("least", -one), ("most", one), ("above", 0 * one)) if one != "1" else ():
            if kind in field.metadata:
                bound = field.metadata[kind]
                value = (bound + step,) * len(field.default) if pair else bound + step
                yield key, value, f"{'at ' * (kind != 'above')}{kind} {bound}"


@pytest.mark.parametrize(("key", "value", "wanted"), list(out_of_range()))
def test_values_out_of_range(key, value, wanted):
    assert f"{key} is {value}, but must be {wanted}" in error_of(nested(key, value))


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if "choices" in field.metadata])
def test_choices(key):
    choices = FIELDS[key].metadata["choices"]
    assert f"{key} is 'other', but must be one of {', '.join(choices)}" in error_of(nested(key, "other"))
    assert FIELDS[key].default in choices


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("model.num_classes", -1),
        ("model.dtype", "float16"),
        ("diffusion.edm.sigma_data", 0.0),
        ("diffusion.edm.sigma_max", float("nan")),
        ("masking.ratio", 1.0),
        ("masking.ratio", -0.1),
        ("masking.ratio", float("nan")),
        ("ema.decay", 1.1),
        ("objectives.discrimination.student_temperature", 0.0),
        ("objectives.discrimination.teacher_temperature", (0.04, 0.0)),
        ("objectives.discrimination.teacher_momentum", (-0.1, 1.0)),
        ("objectives.discrimination.weight", float("nan")),
        ("sampling.steps", 0),
        ("log.every", 0),
    ],
)
def test_values_that_no_schema_may_allow(key, value):
    assert f"{key} is {value!r}, but must be " in error_of(nested(key, value))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"image_size": 33}}, ["model.image_size 33", "model.patch 2"]),
        ({"model": {"width": 100}}, ["model.width 100", "model.heads 16"]),
        ({"model": {"decoder_width": 100}}, ["model.decoder_width 100", "model.decoder_heads 16"]),
        ({"model": {"width": 6, "heads": 3}}, ["model.width 6", "divisible by 4"]),
        ({"model": {"decoder_width": 6, "decoder_heads": 3}}, ["model.decoder_width 6", "divisible by 4"]),
        ({"model": {"image_size": 4}, "masking": {"ratio": 0.8}}, ["masking.ratio 0.8", "4 tokens"]),
        ({"model": {"decoder_depth": 0}}, ["masking.ratio is 0.2", "model.decoder_depth is 0"]),
        (
            {"masking": {"ratio": 0.0}, "objectives": {"reconstruction": {"weight": 0.1}}},
            ["objectives.reconstruction.weight is 0.1", "masking.ratio is 0"],
        ),
        (
            {"diffusion": {"edm": {"sigma_max": 0.002}}},
            ["diffusion.edm.sigma_max 0.002", "diffusion.edm.sigma_min 0.002"],
        ),
        (
            {"sampling": {"sigma_max": 0.001}},
            ["noise level 0.001 (sampling.sigma_max", "0.002 (sampling.sigma_min, or the diffusion's sigma_min"],
        ),
        ({"sampling": {"sigma_min": 90.0}}, ["noise level 80.0", "at 90.0 (sampling.sigma_min"]),
        (
            {"sampling": {"sigma_max": 50.0}, "diffusion": {"name": "ddpm"}},
            ["sampling.sigma_max 50.0", "diffusion.name 'ddpm'", "leave both at 0"],
        ),
        ({"sampling": {"guidance_interval": (2.0, 0.5)}}, ["sampling.guidance_interval is (2.0, 0.5)", "high end"]),
        (
            {"sampling": {"guidance_interval": (2.0, 2.0)}},
            ["sampling.guidance_interval is (2.0, 2.0)", "or 0 for none"],
        ),
        (
            {"sampling": {"solver": "stochastic", "s_min": 3.0, "s_max": 2.0}},
            ["sampling.s_max 2.0", "sampling.s_min 3.0"],
        ),
        ({"sampling": {"guidance": 2.0}, "model": {"num_classes": 0}}, ["sampling.guidance is 2.0", "null label"]),
        ({"codec": {"mean": (0.0, 0.0)}}, ["codec.mean has 2 values", "4 channels"]),
        ({"codec": {"scale": (1.0, 1.0, 1.0)}}, ["codec.scale has 3 values", "4 channels"]),
        (
            {"eval": {"every": 7000, "reference": "x", "features": "pixels"}},
            ["eval.every 7000", "checkpoint.every 5000"],
        ),
        ({"eval": {"every": 5000}}, ["eval.every is 5000", "eval.reference"]),
        ({"eval": {"every": 5000, "reference": "x"}}, ["eval.every is 5000", "eval.inception"]),
        (
            {"eval": {"every": 5000, "reference": "x", "inception": "y"}, "codec": {"name": "latents"}},
            ["eval.every is 5000", "codec.autoencoder"],
        ),
        ({"batch_size": 10, "parallel": {"microbatches": 4}}, ["batch_size 10", "parallel.microbatches 4"]),
    ],
)
def test_impossible_combinations(values, parts):
    message = error_of(values)
    assert all(part in message for part in parts), message


def test_a_guide_takes_the_place_of_the_null_label():
    values = {"sampling": {"guidance": 2.0}, "model": {"num_classes": 0}}
    assert resolve(values, guide=True).sampling.guidance == 2


def test_what_may_change_when_a_run_is_continued():
    free = {
        "parallel.fsdp": 2, "checkpoint.every": 9, "sampling.steps": 3, "eval.draws": 2, "log.every": 1,
        "data.num_threads": 2, "data.prefetch": 3, "model.scan": False, "model.remat": "full",
        "optimizer.max_skipped": 4,
    }  # fmt: skip
    base = make_config()
    assert identity_differences(base, base) == []
    assert identity_differences(base, make_config("sd_dit", free)) == []
    # Schedules are functions of steps, and another source is another dataset: said, though not refused.
    assert identity_differences(base, make_config("sd_dit", {"steps": 7})) == ["steps: 400000 -> 7"]
    other = make_config("sd_dit", {**free, "seed": 1, "optimizer.learning_rate": 2e-4, "data.flip": False})
    assert identity_differences(base, other) == [
        "seed: 0 -> 1",
        "optimizer.learning_rate: 0.0001 -> 0.0002",
        "data.flip: True -> False",
    ]

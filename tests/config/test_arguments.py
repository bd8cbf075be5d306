"""What may stand behind the colon of --config=FILE:ARGUMENTS."""

import runpy
from pathlib import Path

import pytest

from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.border import resolve
from sddit_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULTS = {"data": "", "size": "S/4", "method": "sd_dit"}


def get_config(name, arguments=""):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](arguments)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", {}),
        ("data=/a", {"data": "/a"}),
        ("data=/a,size=B/2,method=dit", {"data": "/a", "size": "B/2", "method": "dit"}),
        ("method=dit,data=/a,b/c", {"method": "dit", "data": "/a,b/c"}),  # a path may have a comma
        ("data=/a=b", {"data": "/a=b"}),
        ("/images/a=b,c", {"data": "/images/a=b,c"}),  # no known name: the short form
        ("C:/a", {"data": "C:/a"}),
    ],
)
def test_pairs_and_the_short_form(text, changed):
    assert parse_arguments(text, DEFAULTS, short="data", path=True) == DEFAULTS | changed


@pytest.mark.parametrize("text", ["size=B/2,metod=dit", "size=B/2,x=1"])
def test_a_wrong_name_is_answered_with_the_right_ones(text):
    with pytest.raises(ConfigError, match=r"unknown name: it takes data=...,size=...,method=..."):
        parse_arguments(text, DEFAULTS, short="data")


def test_a_wrong_name_is_no_method():
    with pytest.raises(ConfigError, match=r"'metod=dit' does not begin with a known name: it takes method=..."):
        get_config("digits", "metod=dit")


def test_without_a_short_form_a_name_is_needed():
    with pytest.raises(ConfigError, match=r"'/data' does not begin with a known name: it takes data=..."):
        parse_arguments("/data", DEFAULTS)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("arguments", ["method=maskdit", "maskdit"])
def test_a_method_is_chosen_by_name_or_alone(name, arguments):
    assert get_config(name, arguments).masking.fill == "mask_token"
    assert get_config(name).masking.fill == "noisy"


def test_imagenet_takes_the_same_grammar():
    config = resolve(get_config("imagenet256", "data=/latents,method=dit,size=S/2"))
    assert (config.data.source, config.model.decoder_depth, config.model.depth) == ("latents:/latents", 0, 12)
    with pytest.raises(ConfigError, match=r"it takes data=...,size=...,method=..."):
        get_config("imagenet256", "sise=S/2")
    with pytest.raises(ConfigError, match="method 'dino' is not one of sd_dit, maskdit, dit_decoder, dit"):
        get_config("digits", "dino")


def test_a_folder_takes_data_size_and_method():
    config = resolve(get_config("folder", "size=B/4,method=maskdit"))
    assert (config.model.width, config.masking.ratio) == (768, 0.5)

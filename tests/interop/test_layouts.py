"""The state_dicts of the public codes: names, order, shapes, and what they tell of the network."""

import jax
import numpy as np
import pytest
from helpers import make_config, tiny_config

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_network
from sddit_jax.config.sizes import PATCHES, SIZES, parse_size
from sddit_jax.errors import WeightsError
from sddit_jax.interop.layouts import DIT, MASKDIT, OWN, fit, homeless, shapes_of, shared_prefix
from sddit_jax.interop.state_dict import to_state_dict
from sddit_jax.weights.files import Tensor

DIT_CHANGES = {"model.learn_sigma": True, "model.null_label": "row"}


def published(method, size, changes):
    model = {f"model.{key}": value for key, value in parse_size(size).items()}
    return make_config(method, model | changes)


def tensor(array):
    return Tensor(array.shape, str(array.dtype), lambda: array.astype(np.float32))


def as_file(layout, network, params):
    """The tensors of a file in a layout."""
    arrays = to_state_dict(params, network)
    return {layout.prefix + name: tensor(entry.to_file(arrays)) for name, entry in layout.entries(network).items()}


def tiny(method="maskdit", **changes):
    config = tiny_config(method, {key.replace("__", "."): value for key, value in changes.items()})
    network = make_network(config)
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    return network, params


def test_maskdits_names_in_their_order():
    entries = MASKDIT.entries(make_network(published("maskdit", "S/2", {})))
    names = list(entries)
    assert len(names) == 218
    assert names[:6] == [
        "pos_embed", "decoder_pos_embed", "mask_token", "x_embedder.proj.weight", "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight",
    ]  # fmt: skip
    assert names[9:13] == [
        "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
    ]  # fmt: skip
    assert names[-2:] == ["final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"]
    expected = {
        "pos_embed": (1, 256, 384), "decoder_pos_embed": (1, 256, 512), "mask_token": (1, 1, 512),
        "x_embedder.proj.weight": (384, 4, 2, 2), "t_embedder.mlp.0.weight": (384, 256),
        "y_embedder.embedding_table.weight": (384, 1000), "blocks.11.attn.qkv.weight": (1152, 384),
        "blocks.3.mlp.fc1.weight": (1536, 384), "blocks.3.mlp.fc2.weight": (384, 1536),
        "blocks.0.adaLN_modulation.1.weight": (2304, 384), "decoder_layer.linear.weight": (512, 384),
        "decoder_layer.adaLN_modulation.1.weight": (768, 384), "decoder_blocks.7.attn.qkv.weight": (1536, 512),
        "decoder_blocks.0.adaLN_modulation.1.weight": (3072, 384), "final_layer.linear.weight": (16, 512),
        "final_layer.adaLN_modulation.1.weight": (1024, 384),
    }  # fmt: skip
    assert {name: entries[name].shape for name in expected} == expected


@pytest.mark.parametrize(
    ("size", "image_size", "count"),
    [("S/2", 32, 68_346_256), ("XL/2", 32, 730_541_200), ("H/8", 32, 1_010_002_432), ("XL/2", 64, 731_819_152)],
)
def test_maskdits_parameters_are_as_many_as_in_its_code(size, image_size, count):
    network = make_network(published("maskdit", size, {"model.image_size": image_size}))
    assert sum(int(np.prod(entry.shape)) for entry in MASKDIT.entries(network).values()) == count


def test_dits_names_and_parameters_are_as_many_as_in_its_code():
    for size, count in (("S/8", 33_148_160), ("XL/2", 675_129_632)):
        entries = DIT.entries(make_network(published("dit", size, DIT_CHANGES)))
        assert sum(int(np.prod(entry.shape)) for entry in entries.values()) == count
    entries = DIT.entries(make_network(published("dit", "S/2", DIT_CHANGES)))
    assert len(entries) == 132
    assert entries["y_embedder.embedding_table.weight"].shape == (1001, 384)
    assert entries["final_layer.linear.weight"].shape == (32, 384)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", SIZES)
def test_the_shapes_of_a_file_tell_its_network(name, patch):
    cases = [
        (MASKDIT, "maskdit", {}),
        (MASKDIT, "maskdit", {"masking.fill": "zeros", "objectives.reconstruction.weight": 0.0}),
        (MASKDIT, "maskdit", {"model.image_size": 64, "model.num_classes": 0}),
        (MASKDIT, "dit", {}),
        (DIT, "dit", DIT_CHANGES),
        (DIT, "dit", DIT_CHANGES | {"model.image_size": 64, "model.num_classes": 10}),
        (DIT, "dit", {"model.null_label": "row"}),
    ]
    for layout, method, changes in cases:
        config = published(method, f"{name}/{patch}", changes)
        file = {key: entry.shape for key, entry in layout.entries(make_network(config)).items()}
        inferred = resolve(layout.infer(file))
        assert inferred.model == config.model
        assert inferred.masking == config.masking
        assert inferred.objectives == config.objectives
        assert inferred.diffusion.name == {MASKDIT: "edm", DIT: "ddpm"}[layout]
        assert (inferred.codec.name, inferred.codec.scale) == ("latents", (0.18215,))


def test_a_network_that_no_code_publishes_needs_a_config():
    def without(changes, layout=MASKDIT, method="maskdit"):
        config = published(method, "S/2", changes)
        return {key: entry.shape for key, entry in layout.entries(make_network(config)).items()}

    for file, message in [
        (without({"model.depth": 13}), "13 blocks of width 384: no published model, so --config"),
        (without({"model.decoder_depth": 4}), "a decoder of depth 4 and width 512: no published"),
        (without({"model.channels": 3}), "3 channels"),
        ({"encoder.patch.weight": (3, 3)}, "pos_embed is missing, so the file does not tell its network; it has enc"),
    ]:
        with pytest.raises(WeightsError, match=message):
            MASKDIT.infer(file)


@pytest.mark.parametrize(
    ("layout", "method", "changes", "names"),
    [
        (MASKDIT, "maskdit", {}, []),
        (MASKDIT, "dit", {}, []),
        (MASKDIT, "maskdit", {"model.null_label": "row"}, ["encoder.label.table"]),
        (MASKDIT, "sd_dit", {}, ["encoder.cls"]),
        (DIT, "dit", DIT_CHANGES, []),
        (DIT, "maskdit", {"model.null_label": "row"}, ["decoder.bridge.linear.bias", "decoder.bridge.linear.weight"]),
    ],
)
def test_what_a_code_has_no_place_for_is_named(layout, method, changes, names):
    found = homeless(layout, make_network(tiny_config(method, changes)))
    assert found[: len(names) or None][:3] == names


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "module._orig_mod.model."])
def test_prefixes_of_wrappers_are_passed_over(prefix):
    network, params = tiny()
    file = {prefix + key.removeprefix("model."): value for key, value in as_file(MASKDIT, network, params).items()}
    assert shared_prefix(file) == prefix
    assert shapes_of(file)["pos_embed"] == (1, 16, 32)
    arrays, faults = fit(MASKDIT, network, file, "a.pt", partial=False)
    assert not faults
    for key, array in to_state_dict(params, network).items():
        np.testing.assert_array_equal(arrays[key].reshape(array.shape), array)


def test_all_that_does_not_fit_is_listed_by_name():
    network, params = tiny()
    file = as_file(MASKDIT, network, params)
    del file["model.mask_token"]
    file["model.cls_token"] = tensor(np.zeros((1, 1, 32), np.float32))
    file["model.x_embedder.proj.bias"] = tensor(np.zeros(31, np.float32))
    file["model.t_embedder.mlp.0.bias"] = tensor(np.zeros(32, np.int64))
    file["model.t_embedder.mlp.2.bias"] = tensor(np.array([np.nan] * 2 + [0] * 30, np.float32))
    file["model.pos_embed"] = tensor(file["model.pos_embed"].read() + 0.1)
    expected = [
        "model.mask_token is missing",
        "model.cls_token is surplus",
        "model.x_embedder.proj.bias has the shape [31] instead of [32]",
        "model.t_embedder.mlp.0.bias is int64 instead of float32, float16 or bfloat16",
        "model.t_embedder.mlp.2.bias has 2 values that are not finite",
        "model.pos_embed is up to 0.1 off the fixed sine-cosine positions",
    ]
    with pytest.raises(WeightsError) as error:
        fit(MASKDIT, network, file, "a.pt", partial=False)
    for line in expected:
        assert line in str(error.value)
    arrays, faults = fit(MASKDIT, network, file, "a.pt", partial=True)
    assert len(faults) == len(expected)
    left_out = {"decoder.mask_token", "encoder.patch.bias", "encoder.time.hidden.bias", "encoder.time.out.bias"}
    assert to_state_dict(params, network).keys() - arrays.keys() == left_out


def test_a_file_of_half_precision_is_widened():
    network, params = tiny()
    half = {
        key: tensor(value.read().astype(np.float16)) for key, value in as_file(MASKDIT, network, params).items()
    }  # positions rounded too
    arrays, _ = fit(MASKDIT, network, half, "a.pt", partial=False)
    for key, array in to_state_dict(params, network).items():
        np.testing.assert_array_equal(arrays[key].reshape(array.shape), array.astype(np.float16).astype(np.float32))


def test_our_own_layout_is_the_state_dict():
    network, params = tiny("sd_dit")
    arrays = to_state_dict(params, network)
    assert list(OWN.entries(network)) == list(arrays)

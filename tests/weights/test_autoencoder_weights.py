import json
import pathlib
import re
import shutil
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from autoencoders import make_kl, make_tiny

from sddit_jax.errors import WeightsError
from sddit_jax.files import weights_hash
from sddit_jax.models.autoencoder import AutoencoderConfig
from sddit_jax.weights.autoencoder import load_autoencoder, load_tiny_autoencoder

FILE = "diffusion_pytorch_model.safetensors"
# 32 groups, since a file of CompVis does not say how many.
MODEL = {"block_out_channels": (32, 64, 32), "layers_per_block": 1, "norm_num_groups": 32}


@pytest.fixture(scope="module")
def state():
    return make_kl(**MODEL).state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_kl(**MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    return load_autoencoder(saved)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "vae")


def rewrite(folder, change):
    """Replaces the file's tensors by `change` of them."""
    tensors = safetensors.torch.load_file(folder / FILE)
    safetensors.torch.save_file({key: value.contiguous() for key, value in change(tensors).items()}, folder / FILE)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def assert_same(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def to_compvis(state, stages=3):
    """The names of CompVis for a state_dict of diffusers, by its parts."""
    top = {"conv_norm_out": "norm_out"}
    block = {"conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def rename(name):
        part, *rest = name.split(".")
        if part not in ("encoder", "decoder"):
            return name
        match rest:
            case ["mid_block", "resnets", i, layer, kind]:
                return f"{part}.mid.block_{int(i) + 1}.{layer}.{kind}"
            case ["mid_block", "attentions", "0", *layer, kind]:
                return f"{part}.mid.attn_1.{attention['.'.join(layer)]}.{kind}"
            case ["down_blocks", i, "resnets", j, layer, kind]:
                return f"{part}.down.{i}.block.{j}.{block.get(layer, layer)}.{kind}"
            case ["down_blocks", i, "downsamplers", "0", "conv", kind]:
                return f"{part}.down.{i}.downsample.conv.{kind}"
            case ["up_blocks", i, "resnets", j, layer, kind]:
                return f"{part}.up.{stages - 1 - int(i)}.block.{j}.{block.get(layer, layer)}.{kind}"
            case ["up_blocks", i, "upsamplers", "0", "conv", kind]:
                return f"{part}.up.{stages - 1 - int(i)}.upsample.conv.{kind}"
            case [layer, kind]:
                return f"{part}.{top.get(layer, layer)}.{kind}"

    renamed = {rename(name): value for name, value in state.items()}
    pointwise = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {name: v[:, :, None, None] if pointwise.search(name) else v for name, v in renamed.items()}


class TestDiffusers:
    def test_a_folder(self, loaded):
        config, params = loaded
        assert config == AutoencoderConfig(widths=(32, 64, 32), blocks=1)
        assert params.keys() == {"encoder", "decoder"}
        assert {(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(params)} == {(np.ndarray, np.dtype("float32"))}

    def test_a_file_with_its_config(self, folder, loaded):
        (folder / FILE).rename(folder / "ema.safetensors")
        assert_same(load_autoencoder(str(folder / "ema.safetensors")), loaded)

    @pytest.mark.parametrize("pointwise", [False, True])
    def test_old_names_of_the_attention(self, folder, loaded, pointwise):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def change(tensors):
            renamed = {}
            for name, value in tensors.items():
                for new, old in names.items():
                    if f".{new}." in name:
                        name = name.replace(new, old)
                        value = value[:, :, None, None] if pointwise and value.ndim == 2 else value
                renamed[name] = value
            return renamed

        rewrite(folder, change)
        assert_same(load_autoencoder(folder), loaded)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_widened(self, folder, loaded, dtype):
        rewrite(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
        _, params = load_autoencoder(folder)
        rounded = jax.tree.map(lambda x: torch.from_numpy(x).to(dtype).float().numpy(), loaded[1])
        jax.tree.map(np.testing.assert_array_equal, params, rounded)

    def test_what_old_configs_do_not_say(self, folder, loaded):
        keys = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
                "latents_mean", "latents_std", "force_upcast")  # fmt: skip
        configure(folder, **dict.fromkeys(keys, "absent"))
        assert_same(load_autoencoder(folder), loaded)

    def test_scaling_can_be_given(self, folder):
        configure(folder, scaling_factor=0.13025)
        assert load_autoencoder(folder)[0].scaling_factor == 0.13025
        config, _ = load_autoencoder(folder, scaling_factor=2, shift_factor=0.5)
        assert (config.scaling_factor, config.shift_factor) == (2, 0.5)

    def test_all_missing_surplus_and_misshapen_tensors_are_named(self, folder):
        def change(tensors):
            del tensors["encoder.conv_in.bias"], tensors["decoder.mid_block.attentions.0.to_k.weight"]
            tensors["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"] = torch.ones(32, 64, 3, 3)
            return tensors | {"ema.decay": torch.ones(1), "encoder.down_blocks.7.x": torch.ones(1)}

        rewrite(folder, change)
        with pytest.raises(WeightsError) as error:
            load_autoencoder(folder)
        faults = str(error.value).removeprefix(f"{folder / FILE} does not fit: ").split("; ")
        assert sorted(faults) == [
            "decoder.mid_block.attentions.0.to_k.weight is missing",
            "decoder.up_blocks.1.resnets.0.conv_shortcut.weight has the shape [32, 64, 3, 3] instead of [64, 32]",
            "ema.decay is surplus",
            "encoder.conv_in.bias is missing",
            "encoder.down_blocks.7.x is surplus",
        ]

    def test_a_truncated_file(self, folder):
        data = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes(data[: len(data) // 2])
        with pytest.raises(WeightsError, match=f"{FILE} is not an intact safetensors file"):
            load_autoencoder(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'; only 'AutoencoderKL'"),
            ({"act_fn": "relu"}, "act_fn is 'relu'; only 'silu'"),
            ({"latents_mean": [0.0] * 4}, "latents_mean is"),
            ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types is"),
            ({"block_out_channels": [32, "64"]}, "block_out_channels is .* a list of integers"),
            ({"layers_per_block": True}, "layers_per_block is True; it should be an integer"),
            ({"latent_channels": "absent"}, "latent_channels is None; it should be an integer"),
            ({"use_quant_conv": 1}, "use_quant_conv is 1; it should be true or false"),
            ({"scaling_factor": "1"}, "scaling_factor is '1'; it should be a number"),
            ({"scaling_factor": float("nan")}, "scaling_factor nan must be a finite number"),
            ({"norm_num_groups": 5}, "width 32 must be a multiple of norm_groups, 5"),
        ],
    )
    def test_configs_that_are_not_known_are_named(self, folder, changes, message):
        configure(folder, **changes)
        with pytest.raises(WeightsError, match=message):
            load_autoencoder(folder)

    @pytest.mark.parametrize(
        ("content", "message"), [("{", "cannot be read as JSON"), ("[" * 10**5, "JSON"), ("[]", "holds a list")]
    )
    def test_a_config_that_is_no_object(self, folder, content, message):
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=message):
            load_autoencoder(folder)

    @pytest.mark.parametrize("name", ["config.json", FILE])
    def test_a_folder_without_one_of_its_files(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(WeightsError, match=f"vae has no {name}"):
            load_autoencoder(folder)

    def test_a_file_without_its_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(WeightsError, match=r"config\.json is not beside it"):
            load_autoencoder(folder / FILE)


class TestCompVis:
    def save(self, folder, content, name="autoencoder_kl.pth"):
        torch.save(content, folder / name)
        return folder / name

    def test_architecture_is_that_of_the_shapes(self, tmp_path, state, loaded):
        assert_same(load_autoencoder(self.save(tmp_path, to_compvis(state))), loaded)

    def test_training_loss_and_other_models_are_ignored_by_name(self, tmp_path, state, loaded):
        ours = to_compvis(state) | {"loss.logvar": torch.ones(1), "loss.discriminator.main.0.weight": torch.ones(2)}
        assert_same(load_autoencoder(self.save(tmp_path, {"state_dict": ours, "epoch": 1})), loaded)
        whole = {f"first_stage_model.{name}": value for name, value in ours.items()}
        whole |= {"model.diffusion_model.x": torch.ones(1), "betas": torch.ones(1)}
        assert_same(load_autoencoder(self.save(tmp_path, {"state_dict": whole}, "sd.ckpt")), loaded)

    def test_safetensors_whatever_lies_beside_it(self, tmp_path, state, loaded):
        (tmp_path / "config.json").write_text("{")
        tensors = {name: value.contiguous() for name, value in to_compvis(state).items()}
        safetensors.torch.save_file(tensors, tmp_path / "ae.safetensors")
        assert_same(load_autoencoder(tmp_path / "ae.safetensors"), loaded)

    def test_other_channels_without_quant_convs(self, tmp_path):
        model = make_kl(
            block_out_channels=(32,), layers_per_block=2, norm_num_groups=32, latent_channels=16, in_channels=1,
            out_channels=2, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        )  # fmt: skip
        path = self.save(tmp_path, to_compvis(model.state_dict(), stages=1))
        for given in ({}, {"scaling_factor": 0.3611}, {"shift_factor": 0.1159}):
            with pytest.raises(WeightsError, match="16 latent channels are scaled; give scaling_factor and shift"):
                load_autoencoder(path, **given)
        config, params = load_autoencoder(path, scaling_factor=0.3611, shift_factor=0.1159)
        assert config == AutoencoderConfig(
            in_channels=1, out_channels=2, latent_channels=16, widths=(32,), blocks=2, mid_attention=False,
            quant_conv=False, post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
        model.save_pretrained(tmp_path / "vae")
        assert_same((config, params), load_autoencoder(tmp_path / "vae", scaling_factor=0.3611, shift_factor=0.1159))

    def test_faults_are_named_as_in_the_file(self, tmp_path, state):
        tensors = to_compvis(state)
        del tensors["decoder.up.2.block.1.norm1.bias"]
        tensors["encoder.down.1.attn.0.q.weight"] = torch.ones(64, 64, 1, 1)
        tensors["encoder.mid.attn_1.k.weight"] = torch.ones(32, 32, 2, 1)
        with pytest.raises(WeightsError) as error:
            load_autoencoder(self.save(tmp_path, tensors))
        for fault in (
            "decoder.up.2.block.1.norm1.bias is missing",
            "encoder.down.1.attn.0.q.weight is surplus",
            "encoder.mid.attn_1.k.weight has the shape [32, 32, 2, 1] instead of [32, 32]",
        ):
            assert fault in str(error.value)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("decoder.conv_out.weight", None, "decoder.conv_out.weight is missing"),
            ("decoder.conv_in.weight", torch.ones(3), r"the shape \[3\], not four axes"),
            ("encoder.down.0.block.0.conv1.weight", torch.ones(48, 32, 3, 3), "width 48 must be a multiple"),
        ],
    )
    def test_shapes_that_tell_no_architecture(self, tmp_path, state, name, value, message):
        tensors = to_compvis(state) | {name: value}
        path = self.save(tmp_path, {key: value for key, value in tensors.items() if value is not None})
        with pytest.raises(WeightsError, match=message):
            load_autoencoder(path)

    def test_another_models_file(self, tmp_path):
        with pytest.raises(WeightsError, match="not called as CompVis calls an autoencoder's"):
            load_autoencoder(self.save(tmp_path, {"fc.weight": torch.ones(2)}))


class TestTiny:
    @pytest.fixture
    def folder(self, tmp_path):
        make_tiny().save_pretrained(tmp_path / "taesd")
        return tmp_path / "taesd"

    def test_all_missing_surplus_and_misshapen_tensors_are_named(self, folder):
        def change(tensors):
            del tensors["encoder.layers.1.conv.4.bias"]
            return tensors | {"decoder.layers.0.weight": torch.ones(8, 5, 3, 3), "extra": torch.ones(1)}

        rewrite(folder, change)
        with pytest.raises(WeightsError) as error:
            load_tiny_autoencoder(folder)
        faults = str(error.value).removeprefix(f"{folder / FILE} does not fit: ").split("; ")
        assert sorted(faults) == [
            "decoder.layers.0.weight has the shape [8, 5, 3, 3] instead of [8, 4, 3, 3]",
            "encoder.layers.1.conv.4.bias is missing",
            "extra is surplus",
        ]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'; only 'AutoencoderTiny'"),
            ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is 4; only 2"),
            ({"encoder_block_out_channels": [8, 8, 8, 16]}, r"several widths, \[8, 16\]"),
            ({"num_encoder_blocks": [1, 3]}, r"encoder_blocks \(1, 3\) and decoder_blocks"),
        ],
    )
    def test_configs_that_are_not_known_are_named(self, folder, changes, message):
        configure(folder, **changes)
        with pytest.raises(WeightsError, match=message):
            load_tiny_autoencoder(folder)

    def test_a_file_without_its_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(WeightsError, match=r"config\.json is not beside it"):
            load_tiny_autoencoder(folder / FILE)


class TestHub:
    def test_an_id_is_fetched(self, saved, loaded, monkeypatch):
        asked = []

        def download(repository, name):
            asked.append((repository, name))
            return str(saved / pathlib.Path(name).name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert_same(load_autoencoder("stabilityai/sd-vae-ft-mse"), loaded)
        load_autoencoder("owner/name/vae")
        assert asked == [
            ("stabilityai/sd-vae-ft-mse", "config.json"), ("stabilityai/sd-vae-ft-mse", FILE),
            ("owner/name", "vae/config.json"), ("owner/name", f"vae/{FILE}"),
        ]  # fmt: skip

    def test_an_id_that_cannot_be_fetched_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(WeightsError, match="owner/name is not a file or folder here and could not be fetched"):
            load_autoencoder("owner/name")

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(WeightsError, match="pip install huggingface_hub"):
            load_autoencoder("owner/name")

    @pytest.mark.parametrize("source", ["nothing", "/nothing/here", "./a/b", "assets/autoencoder_kl.pth", "a//b", ""])
    def test_what_is_no_id_is_not_asked_for(self, source, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: pytest.fail("asked"))
        with pytest.raises(WeightsError):
            load_autoencoder(source)


def test_hash_is_of_the_values_not_of_the_file(tmp_path, state, loaded):
    torch.save(to_compvis(state), tmp_path / "autoencoder_kl.pth")
    _, params = load_autoencoder(tmp_path / "autoencoder_kl.pth")
    assert weights_hash(params) == weights_hash(loaded[1])

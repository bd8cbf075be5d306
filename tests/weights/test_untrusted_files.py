import argparse
import os
import pathlib
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from sddit_jax.errors import WeightsError
from sddit_jax.weights.files import open_checkpoint

TENSORS = {
    "blocks.0.weight": torch.linspace(-1, 1, 12).reshape(4, 3),
    "blocks.0.bias": torch.tensor([0.5, -2.0, 1 / 3]),
    "half": torch.tensor([[0.1, -65504.0]], dtype=torch.float16),
}
FORMATS = ["zip.pt", "legacy.pt", "x.safetensors"]
# Legacy files that are damaged make torch warn of their protocol.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


class Runs:
    """Pickled as a call: whoever unpickles it calls `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def save(path, content=TENSORS, metadata=None):
    """Saves in the format that the file's name says."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata)
    elif path.name == "pickle.pt":
        # Of the protocol that torch's unpickler knows.
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.name == "zip.pt")
    return path


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def assert_reads(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, value in read(tensors).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name].detach().numpy())


class TestGroups:
    @pytest.mark.parametrize("name", FORMATS)
    def test_of_a_state_dict(self, tmp_path, name):
        checkpoint = open_checkpoint(save(tmp_path / name))
        assert checkpoint.groups.keys() == {""}
        assert (checkpoint.skipped, checkpoint.metadata) == ([], {})
        assert_reads(checkpoint.groups[""], TENSORS)

    @pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
    def test_of_what_a_training_code_saves(self, tmp_path, name):
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        content = {
            "model": network.state_dict(),
            "ema": {"weight": torch.zeros(2, 3), "bias": torch.ones(2)},
            "opt": optimizer.state_dict(),
            "args": argparse.Namespace(lr=1e-4, model="DiT-XL/2", betas=(0.9, 0.999), more=argparse.Namespace(x=1)),
            "step": 7,
            "none": None,
        }
        checkpoint = open_checkpoint(save(tmp_path / name, content))
        assert checkpoint.groups.keys() == {"model", "ema"}
        for group in ("model", "ema"):
            assert_reads(checkpoint.groups[group], content[group])
        assert checkpoint.skipped == [
            "opt (dict)", "args (argparse.Namespace, not executed)", "step (int)", "none (NoneType)"
        ]  # fmt: skip

    def test_metadata_of_safetensors(self, tmp_path):
        metadata = {"config": '{"model": {"width": 32}}', "step": "5"}
        checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", metadata=metadata))
        assert checkpoint.metadata == metadata
        assert_reads(checkpoint.groups[""], TENSORS)


class Trap:
    def __new__(cls, *args, **kwargs):
        raise AssertionError("constructed")


class ByCall(argparse.Namespace):
    """The bytes of a pickle that calls argparse.Namespace(x=...) and sets its state."""

    def __reduce__(self):
        return argparse.Namespace, (), self.__dict__


class TestNothingIsExecuted:
    @pytest.mark.parametrize("kind", [argparse.Namespace, ByCall])
    @pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
    def test_a_namespace_is_not_constructed(self, tmp_path, monkeypatch, name, kind):
        path = save(tmp_path / name, {"model": TENSORS, "args": kind(x=3)})
        monkeypatch.setattr(argparse, "Namespace", Trap)
        with pytest.raises(AssertionError, match="constructed"):
            torch.load(path, weights_only=False)
        checkpoint = open_checkpoint(path)
        assert checkpoint.skipped == ["args (argparse.Namespace, not executed)"]
        assert_reads(checkpoint.groups["model"], TENSORS)

    def test_a_namespace_is_not_allowed_for_others_afterwards(self, tmp_path):
        path = save(tmp_path / "zip.pt", {"model": TENSORS, "args": argparse.Namespace(x=3)})
        open_checkpoint(path)
        with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
            torch.load(path, weights_only=True)

    @pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "pickle.pt"])
    @pytest.mark.parametrize("place", ["alone", "beside tensors", "in a namespace"])
    @pytest.mark.parametrize(
        ("make", "named"),
        [
            (lambda marker: Runs(os.system, f"touch {marker}"), r"posix\.system"),
            (lambda marker: Runs(exec, f"open({str(marker)!r}, 'w')"), r"GLOBAL exec"),
            (lambda marker: Runs(pathlib.Path.touch, marker), r"GLOBAL getattr"),
            (lambda marker: Runs(open, str(marker), "w"), r"io\.open"),
        ],
        ids=["system", "exec", "touch", "open"],
    )
    def test_a_malicious_pickle_is_refused(self, tmp_path, monkeypatch, name, place, make, named):
        # torch would read this as leave to unpickle anything where a caller does not say otherwise.
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        marker = tmp_path / "marker"
        evil = make(marker)
        beside = {} if name == "pickle.pt" else {"model": TENSORS}
        content = {"alone": evil, "beside tensors": {**beside, "x": evil}}.get(
            place, {**beside, "args": argparse.Namespace(x=evil)}
        )
        path = save(tmp_path / name, content)
        with pytest.raises(WeightsError, match=named) as error:
            open_checkpoint(path)
        assert not marker.exists()
        assert str(error.value).startswith(f"{path} is not an intact PyTorch file")
        # torch's own message tells how to load such a file all the same.
        assert "weights_only" not in str(error.value)

    def test_the_malicious_pickles_of_these_tests_do_run(self, tmp_path):
        marker = tmp_path / "marker"
        pickle.loads(pickle.dumps(Runs(os.system, f"touch {marker}")))
        assert marker.exists()


class TestDamage:
    @pytest.mark.parametrize("name", FORMATS)
    def test_a_truncated_file_is_refused(self, tmp_path, name):
        path = save(tmp_path / name)
        data = path.read_bytes()
        lengths = {0, 1, 2, 4, 8, 10, 100, len(data) // 2, len(data) - 100, len(data) - 1, *range(0, len(data), 29)}
        for length in sorted(lengths):
            path.write_bytes(data[:length])
            with pytest.raises(WeightsError, match=f"{name} is not an intact"):
                open_checkpoint(path)

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("content", ["tensors", "groups"])
    def test_a_changed_byte_gives_a_typed_error_or_tensors(self, tmp_path, name, content):
        groups = {"model": TENSORS, "args": argparse.Namespace(lr=0.1), "step": 3}
        path = save(tmp_path / name, groups if content == "groups" and name.endswith(".pt") else TENSORS)
        data, rng, outcomes = path.read_bytes(), np.random.default_rng(0), []
        for position in rng.integers(len(data), size=150):
            damaged = bytearray(data)
            damaged[position] ^= rng.integers(1, 256)
            path.write_bytes(damaged)
            try:
                for tensors in open_checkpoint(path).groups.values():
                    read(tensors)
                outcomes.append("read")
            except WeightsError:
                outcomes.append("refused")
        assert min(outcomes.count(outcome) for outcome in ("read", "refused")) > 10

    @pytest.mark.parametrize("name", FORMATS)
    def test_other_files(self, tmp_path, name):
        path = tmp_path / name
        for data in (b"not a file of weights\n" * 100, b"\0" * 1000, b"PK\x03\x04" + b"\0" * 1000, b"\x80\x02}q\0."):
            path.write_bytes(data)
            with pytest.raises(WeightsError, match=str(path)):
                open_checkpoint(path)

    def test_a_zip_file_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
            file.writestr("x/readme.txt", "weights")
        with pytest.raises(WeightsError, match=r"x\.pt is not an intact"):
            open_checkpoint(tmp_path / "x.pt")

    def test_a_torchscript_archive(self, tmp_path):
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
            with pytest.raises(WeightsError, match="TorchScript") as error:
                open_checkpoint(tmp_path / "x.pt")
        assert "Re-running" not in str(error.value)


class TestNoTensors:
    @pytest.mark.parametrize("name", FORMATS)
    def test_missing_files_and_folders(self, tmp_path, name):
        with pytest.raises(WeightsError, match=f"{name} is not an intact .*[Nn]o such file"):
            open_checkpoint(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(WeightsError, match=f"{name} is a folder"):
            open_checkpoint(tmp_path / name)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, "only an empty dict"),
            ({"model": {}, "step": 3}, r"only model \(dict\), step \(int\)"),
            ({"args": argparse.Namespace(x=1)}, r"only args \(argparse\.Namespace, not executed\)"),
            ([torch.ones(2)], "holds a list"),
            (torch.ones(2), "holds a Tensor"),
            ("weights", "holds a str"),
        ],
    )
    @pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
    def test_of_torch(self, tmp_path, name, content, message):
        with pytest.raises(WeightsError, match=f"{name} .*{message}"):
            open_checkpoint(save(tmp_path / name, content))

    def test_of_safetensors(self, tmp_path):
        with pytest.raises(WeightsError, match=r"x\.safetensors has no tensors"):
            open_checkpoint(save(tmp_path / "x.safetensors", {}))


class TestValues:
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_every_half_is_widened_exactly(self, tmp_path, name, dtype):
        bits = np.arange(1 << 16, dtype=np.uint16)
        path = save(tmp_path / name, {"all": torch.from_numpy(bits).view(dtype)})
        value = open_checkpoint(path).groups[""]["all"].read()
        # A bfloat16 is the upper half of a float32.
        exact = bits.view(np.float16) if dtype == torch.float16 else (bits.astype(np.uint32) << 16).view(np.float32)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, exact.astype(np.float32))

    @pytest.mark.parametrize("name", FORMATS)
    def test_shapes_and_types_are_told_before_the_values(self, tmp_path, name):
        content = {
            "double": torch.tensor([[0.1, 1e300]], dtype=torch.float64),
            "scalar": torch.tensor(2.5),
            "none": torch.zeros(0, 3),
            "whole": torch.tensor([1, 2, 3]),
        }
        tensors = open_checkpoint(save(tmp_path / name, content)).groups[""]
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            "double": (1, 2), "scalar": (), "none": (0, 3), "whole": (3,)
        }  # fmt: skip
        names = ("F64", "I64") if name == "x.safetensors" else ("float64", "int64")
        assert (tensors["double"].dtype, tensors["whole"].dtype) == names
        np.testing.assert_array_equal(tensors["scalar"].read(), np.float32(2.5))
        assert tensors["none"].read().shape == (0, 3)

    @pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
    def test_views_of_one_storage(self, tmp_path, name):
        x = torch.arange(24.0).reshape(4, 6)
        content = {
            "whole": x, "tied": x, "turned": x.t(), "row": x[2], "steps": x[::2, 1::3],
            "repeated": x[:1].expand(3, 6), "parameter": torch.nn.Parameter(x[:, 4]),
        }  # fmt: skip
        assert_reads(open_checkpoint(save(tmp_path / name, content)).groups[""], content)

    def test_a_compressed_zip_file(self, tmp_path):
        save(tmp_path / "zip.pt")
        with (
            zipfile.ZipFile(tmp_path / "zip.pt") as stored,
            zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
        ):
            for entry in stored.namelist():
                compressed.writestr(entry, stored.read(entry))
        assert_reads(open_checkpoint(tmp_path / "x.pt").groups[""], TENSORS)

    @pytest.mark.parametrize("name", FORMATS)
    def test_changing_an_array_does_not_change_the_file(self, tmp_path, name):
        path = save(tmp_path / name)
        before = path.read_bytes()
        for value in read(open_checkpoint(path).groups[""]).values():
            value[...] = 7
        assert path.read_bytes() == before
        assert_reads(open_checkpoint(path).groups[""], TENSORS)

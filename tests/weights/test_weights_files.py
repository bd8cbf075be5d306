import hashlib
import pickle
import struct
import sys

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from autoencoders import normal

from sddit_jax.errors import UserError, WeightsError
from sddit_jax.files import weights_hash
from sddit_jax.weights.files import fill, open_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([0.5, -1.0])}


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def save(path, tensors):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_widened_to_float32(tmp_path, name, dtype):
    save(tmp_path / name, {key: value.to(dtype) for key, value in TENSORS.items()})
    tensors = open_tensors(tmp_path / name)
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in tensors.items():
        value = tensor.read()
        assert tensor.shape == tuple(TENSORS[key].shape)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, TENSORS[key])


def test_files_from_before_torchs_zip_format(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    tensors = open_tensors(tmp_path / "x.pth")
    np.testing.assert_array_equal(tensors["b"].read(), TENSORS["b"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, suffix, zipped):
    sentinel, path = tmp_path / "sentinel", tmp_path / f"evil{suffix}"
    torch.save({**TENSORS, "evil": Evil(sentinel)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=f"evil{suffix} is not an intact") as error:
        open_tensors(path)
    assert not sentinel.exists()
    assert suffix == ".safetensors" or "io.open was not an allowed global" in str(error.value)
    assert "weights_only" not in str(error.value)
    path.write_bytes(pickle.dumps(Evil(sentinel)))
    with pytest.raises(WeightsError, match=f"evil{suffix} is not an intact"):
        open_tensors(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("kept", [0, 1, 7, 40, 0.5, -1])
def test_truncated_files_are_named(tmp_path, name, kept):
    path = tmp_path / name
    save(path, TENSORS)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if 0 < kept < 1 else kept])
    with pytest.raises(WeightsError, match=f"{name} is not an intact"):
        open_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["x.safetensors", "zip.pth", "pickle.pth"])
def test_damage_gives_a_typed_error_or_tensors(tmp_path, name):
    path, rng = tmp_path / name, np.random.default_rng(0)
    save(path, TENSORS)
    if name == "pickle.pth":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    data, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=rng.integers(1, 20)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_tensors(path)
        except WeightsError:
            refused += 1
    assert refused > 20


def test_missing_files_and_other_names(tmp_path):
    for name in ("x.safetensors", "x.pth"):
        with pytest.raises(WeightsError, match=f"{name} is not an intact"):
            open_tensors(tmp_path / name)
    with pytest.raises(WeightsError, match=r"x\.npz: the name .* in one of \.safetensors, \.pth"):
        open_tensors(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": 3}, r"only state_dict \(int\)"),
        ({"a": 3}, r"only a \(int\)"),
        ({7: torch.ones(2)}, "7 is a Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is a Tensor; it should be a dense tensor"),
        ({"a": torch.ones(2, device="meta")}, "'a' is a Tensor; it should be a dense tensor"),
    ],
)
def test_what_is_no_dense_tensor_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        open_tensors(tmp_path / "x.pth")


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[torch\]'"):
        open_tensors(tmp_path / "x.pth")


def test_fill_turns_axes(tmp_path):
    kernel_OIHW, linear_OI, bias_O = normal(5, 2, 3, 4), normal(5, 2), normal(5)
    tensors = {"k": kernel_OIHW, "l": linear_OI, "p": linear_OI[:, :, None, None], "b": bias_O}
    save(tmp_path / "x.pth", {name: torch.from_numpy(value) for name, value in tensors.items()})
    shapes = {"one": {"k": shape(3, 4, 2, 5), "l": shape(2, 5)}, "p": shape(2, 5), "b": shape(5)}
    filled = fill(shapes, open_tensors(tmp_path / "x.pth"), lambda path: path[-1], "x.pth")
    np.testing.assert_array_equal(filled["one"]["k"], np.moveaxis(kernel_OIHW, (2, 3, 1, 0), (0, 1, 2, 3)))
    np.testing.assert_array_equal(filled["one"]["l"], linear_OI.T)
    np.testing.assert_array_equal(filled["p"], linear_OI.T)
    np.testing.assert_array_equal(filled["b"], bias_O)
    assert all(leaf.flags.owndata and leaf.flags.c_contiguous for leaf in jax.tree.leaves(filled))


def test_fill_names_every_fault(tmp_path):
    content = {
        "wide": torch.ones(3, 4),
        "long": torch.ones(2),
        "whole": torch.ones(3, dtype=torch.int64),
        "double": torch.ones(3, dtype=torch.float64),
        "extra": torch.ones(1),
        "other": torch.ones(1),
    }
    save(tmp_path / "x.safetensors", content)
    shapes = {
        "wide": shape(3, 4),
        "long": shape(3),
        "whole": shape(3),
        "double": shape(3),
        "a": shape(1),
        "b": shape(1),
    }
    with pytest.raises(WeightsError) as error:
        fill(shapes, open_tensors(tmp_path / "x.safetensors"), str, "x.safetensors")
    text = str(error.value)
    assert text.startswith("x.safetensors does not fit: ")
    for fault in (
        "a is missing", "b is missing", "extra is surplus", "other is surplus",
        "wide has the shape [3, 4] instead of [4, 3]", "long has the shape [2] instead of [3]",
        "whole is I64 instead of float32, float16 or bfloat16", "double is F64 instead of float32",
    ):  # fmt: skip
        assert fault in text
    assert text.count(";") == 7


def test_values_that_are_not_finite_are_named(tmp_path):
    save(tmp_path / "x.pth", {"a": torch.tensor([1.0, np.nan]), "b": torch.tensor([np.inf]), "c": torch.ones(1)})
    with pytest.raises(WeightsError, match="is damaged: a has 1 values that are not finite; b has 1 values"):
        fill({"a": shape(2), "b": shape(1), "c": shape(1)}, open_tensors(tmp_path / "x.pth"), str, "x.pth")


class TestHash:
    def test_is_that_of_the_format(self):
        # A changed value here means that records of earlier versions no longer name their weights.
        params = {"b": {"c": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.zeros(0, np.float32)}
        content = b"a float32 (0,)\n" + b"b/c float32 (2, 3)\n" + struct.pack("<6f", *range(6))
        assert weights_hash(params) == hashlib.sha256(content).hexdigest()[:16]

    def test_does_not_depend_on_order_layout_or_device(self):
        x, y = normal(3, 4), normal(5)
        same = [
            {"a": x, "b": {"c": y}},
            {"b": {"c": y}, "a": np.asfortranarray(x)},
            {"a": jax.numpy.array(x), "b": {"c": y}},
        ]
        assert len({weights_hash(params) for params in same}) == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"a": normal(4, 3)},
            {"b": normal(3, 4)},
            {"a": normal(3, 4).astype(np.float16)},
            {"a": normal(3, 4) * np.where(np.arange(4) == 2, -1, 1).astype(np.float32)},
            {"a": {"a": normal(3, 4)}},
        ],
    )
    def test_sees_every_difference(self, other):
        assert weights_hash(other) != weights_hash({"a": normal(3, 4)})

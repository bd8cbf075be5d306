import hashlib
import pickle
import re

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from inceptions import random_state_dict

from sddit_jax.errors import WeightsError
from sddit_jax.weights.inception import load_inception

LAYER = "Mixed_7b.branch3x3dbl_3a"


@pytest.fixture(scope="module")
def state():
    return random_state_dict()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def save(path, state):
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def test_batch_norm_is_folded(state, saved):
    params = load_inception(saved).params
    rng = np.random.default_rng(0)
    weight = state[f"{LAYER}.conv.weight"].double()
    x = torch.from_numpy(rng.normal(size=(2, weight.shape[1], 8, 8)))
    expected = torch.nn.functional.conv2d(x, weight, padding=(0, 1))
    norm = [state[f"{LAYER}.bn.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(expected, *norm, eps=1e-3).numpy()
    block, layer = LAYER.split(".")
    leaves = params[block][layer]
    kernel = torch.from_numpy(leaves["kernel"].transpose(3, 2, 0, 1)).double()
    bias = torch.from_numpy(leaves["bias"]).double()
    found = torch.nn.functional.conv2d(x, kernel, bias, padding=(0, 1)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(params["fc"]["kernel"], state["fc.weight"].numpy().T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_the_file_is_known_by_its_hash(saved):
    loaded = load_inception(str(saved))
    assert loaded.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert not loaded.published


def test_formats_hold_the_same(state, saved, tmp_path):
    expected = load_inception(saved).params
    # PyTorch since 0.4.1 counts batches beside the statistics.
    counted = state | {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in state if "var" in name
    }
    for path, content in (("a.safetensors", state), ("b.pth", counted), ("c.pt", {"state_dict": state})):
        jax.tree.map(np.testing.assert_array_equal, load_inception(save(tmp_path / path, content)).params, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "fc.bias is missing"),
        (lambda s: s.pop(f"{LAYER}.bn.running_var"), f"{LAYER}.bn.running_var is missing"),
        (lambda s: s.update({"AuxLogits.fc.bias": torch.zeros(1000)}), "AuxLogits.fc.bias is surplus"),
        # Torchvision's classifier.
        (lambda s: s.update({"fc.bias": torch.zeros(1000)}), r"fc.bias has the shape \[1000\] instead of \[1008\]"),
        (lambda s: s[f"{LAYER}.conv.weight"].view(-1)[:3].fill_(np.nan), "has 3 values that are not finite"),
        (lambda s: s[f"{LAYER}.bn.running_var"][:2].fill_(-1), "running_var have 2 values below 0"),
        (lambda s: s.update({"fc.bias": torch.zeros(1008, dtype=torch.int32)}), "fc.bias is int32"),
    ],
)
def test_what_does_not_fit_is_named(state, tmp_path, change, message):
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    path = save(tmp_path / "x.pth", state)
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}.*{message}"):
        load_inception(path)


# Damaged files make torch warn of their protocol.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.pth").write_bytes(content[:5_000_000] + bytes([content[5_000_000] ^ 1]) + content[5_000_001:])
    (tmp_path / "text.pth").write_text("not a file of weights")
    (tmp_path / "text.safetensors").write_text("not a file of weights")
    (tmp_path / "executes.pth").write_bytes(pickle.dumps(torch.nn.Linear(1, 1)))
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            load_inception(path)


def test_a_file_that_is_not_there_says_where_to_get_it(tmp_path):
    with pytest.raises(WeightsError, match=r"is not a file here.*pt_inception-2015-12-05-6726825d\.pth"):
        load_inception(tmp_path / "nothing.pth")

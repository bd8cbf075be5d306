import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from sddit_jax.errors import CheckpointError
from sddit_jax.runs.checkpoint import MANIFEST, Checkpointer, _sums, digest
from sddit_jax.runs.versions import versions

META = {"config": {"model": {"width": 32, "ratio": 0.1}}, "codec": {"name": "pixels"}}
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


def sharding(ndim, devices):
    mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, jax.P("data") if ndim else jax.P())


def make_state(seed=0, devices=8, width=32):
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"kernel": rng.normal(size=(64, width)).astype(np.float32)},
        "half": jnp.asarray(rng.normal(size=(16, 3)), jnp.bfloat16),
        "scale": np.float32(rng.normal()),
    }
    state = {
        "params": params,
        "ema": {"slow": params, "fast": jax.tree.map(lambda x: x * 2, params)},
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "aux": {"centers": {"frozen": rng.random(8) < 0.5, "count": rng.integers(9, size=8)}},
        "step": np.int32(seed),
    }
    return jax.tree.map(lambda x: jax.device_put(x, sharding(np.ndim(x), devices)), state)


def abstract(state, devices=8):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.ndim, devices)), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the steps 1, 2, 3, each of its own seed; copy it before changing it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpointer(directory, keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), META)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def flip(path, position):
    data = bytearray(path.read_bytes())
    bit = int(position * (8 * len(data) - 1))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


DAMAGES = {
    "first bit": lambda path: flip(path, 0.0),
    "middle bit": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1.0),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def by_hand(words):
    def mix(u):
        u = (u ^ u >> 16) * 0x85EBCA6B % 2**32
        u = (u ^ u >> 13) * 0xC2B2AE35 % 2**32
        return u ^ u >> 16

    def total(salt):
        return sum(mix(int(u) ^ mix((i + salt) % 2**32)) for i, u in enumerate(words)) % 2**32

    return f"{total(0x9E3779B9):08x}{total(0x7F4A7C15):08x}"


class TestDigest:
    def test_does_not_depend_on_the_sharding(self):
        values = [digest(make_state(devices=n)) for n in (1, 2, 8)]
        assert values[0] == values[1] == values[2]
        columns = NamedSharding(jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2), jax.P("b", "a"))
        x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
        assert digest(x) == digest(jax.device_put(x, columns)) == digest(jnp.asarray(x))

    def test_paths_and_values_are_those_of_the_format(self):
        # Changed values here mean that checkpoints of an earlier version cannot be restored.
        tree = {
            "params": {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)},
            "list": [jnp.float32(1), jnp.zeros((0, 3)), jnp.asarray([True, False])],
            "half": jnp.ones(3, jnp.bfloat16),
        }
        assert digest(tree) == {
            "params/a": by_hand(np.arange(6, dtype=np.float32).view(np.uint32)),
            "list/0": by_hand([0x3F800000]),
            "list/1": by_hand([]),
            "list/2": by_hand([1, 0]),
            "half": by_hand([0x3F80] * 3),
        }
        assert digest({"a": jnp.float32(1)}) == {"a": "e7f2d91e8b349dda"}

    @pytest.mark.usefixtures("uncached")
    def test_no_array_is_gathered(self):
        state = make_state()
        text = _sums.lower(state["params"]["encoder"]["kernel"]).compile().as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(data=st.data())
    def test_every_flipped_bit_changes_it(self, data):
        dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int32", "uint8", "float16"]))
        raw = data.draw(hnp.arrays(np.uint8, (4, 3, jnp.dtype(dtype).itemsize)))
        bit = data.draw(st.integers(0, raw.size * 8 - 1))
        changed = raw.copy().reshape(-1)
        changed[bit // 8] ^= 1 << bit % 8
        values = [np.frombuffer(x.tobytes(), jnp.dtype(dtype)).reshape(4, 3) for x in (raw, changed)]
        before, after = (digest(x)[""] for x in values)
        assert before[:8] != after[:8]
        assert before[8:] != after[8:]

    def test_two_flipped_signs_and_exchanged_elements_change_it(self):
        x = np.arange(1, 9, dtype=np.float32)
        signs = x * np.where(np.arange(8) < 2, -1, 1).astype(np.float32)
        assert len({digest(y)[""] for y in (x, signs, x[::-1].copy(), np.roll(x, 1))}) == 4


class TestRoundTrip:
    @pytest.mark.parametrize(("before", "after"), [(8, 8), (8, 1), (8, 2), (8, 4), (1, 8), (2, 8)])
    def test_bit_identical_on_any_number_of_devices(self, tmp_path, before, after):
        state = make_state(devices=before)
        checkpoints = Checkpointer(tmp_path)
        checkpoints.save(7, state, META)
        wanted = abstract(state, after)
        restored, meta = checkpoints.restore(wanted)
        assert_same(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
        assert (meta["step"], meta["config"], meta["codec"]) == (7, META["config"], META["codec"])
        assert meta["digests"] == digest(state)
        assert meta["versions"] == versions()

    def test_none_without_checkpoints(self, tmp_path):
        assert Checkpointer(tmp_path / "new").restore(abstract(make_state())) is None

    def test_donation_right_after_save(self, tmp_path):
        update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
        checkpoints = Checkpointer(tmp_path)
        shape, spec = (8, 1 << 17), sharding(2, 8)
        for step in range(3):
            x = jax.device_put(np.full(shape, step + 0.5, np.float32), spec)
            state = {"params": {"x": x}, "ema": {"slow": {"x": x + 1}}, "step": jnp.int32(step)}
            before = jax.tree.map(lambda x: np.array(x, copy=True), state)
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            checkpoints.save(step, state, META)
            for _ in range(4):
                state = update(state)
            restored, _ = checkpoints.restore(wanted)
            assert_same(restored, before)

    def test_changing_the_record_after_save_does_not_change_what_is_saved(self, tmp_path):
        meta = {"config": {"a": 1}}
        checkpoints = Checkpointer(tmp_path)
        checkpoints.save(1, make_state(), meta)
        meta["config"]["a"] = 2
        checkpoints.wait()
        assert checkpoints.read_meta(1)["config"] == {"a": 1}


class TestVersions:
    def test_the_record_names_what_computes(self):
        assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= versions().keys()
        assert versions()["jax"] == jax.__version__

    def test_a_run_that_goes_on_with_others_says_so_in_one_line(self, directory, caplog, monkeypatch):
        monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
        wanted = abstract(make_state())
        Checkpointer(directory, read_only=True).restore(wanted)
        assert not caplog.records
        Checkpointer(directory).restore(wanted)
        (line,) = caplog.messages
        assert f"{directory}/3 was saved with python " in line
        assert "(here 3.99.0)" in line

    def test_a_run_that_goes_on_with_the_same_says_nothing(self, directory, caplog):
        Checkpointer(directory).restore(abstract(make_state()))
        assert not caplog.records


class TestEma:
    def test_alone_without_train(self, directory):
        shutil.rmtree(directory / "3" / "train")
        ema, meta = Checkpointer(directory, read_only=True).restore_ema()
        assert_same(ema, make_state(3)["ema"])
        assert meta["step"] == 3
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(ema))

    def test_of_a_step_and_in_a_layout(self, saved):
        state = make_state(2)
        ema, _ = Checkpointer(saved, read_only=True).restore_ema(abstract(state["ema"], 2), step=2)
        assert_same(ema, state["ema"])
        assert len(ema["slow"]["encoder"]["kernel"].sharding.device_set) == 2

    def test_the_one_before_a_damaged_one_and_nothing_moves(self, directory, caplog):
        (directory / "3" / "ema" / "_METADATA").unlink()
        before = files(directory)
        _, meta = Checkpointer(directory, read_only=True).restore_ema()
        assert meta["step"] == 2
        assert "ema/_METADATA, named in MANIFEST.sha256, is missing" in caplog.text
        assert files(directory) == before

    @pytest.mark.parametrize("step", [None, 9])
    def test_none_is_an_error(self, tmp_path, saved, step):
        where = tmp_path / "nothing" if step is None else saved
        with pytest.raises(CheckpointError, match="no checkpoint"):
            Checkpointer(where, read_only=True).restore_ema(step=step)
        assert not (tmp_path / "nothing").exists()


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_of_any_file_is_named(self, saved, tmp_path, damage):
        # With one checkpoint only, nothing is restored or moved: quick enough for all files.
        folder = shutil.copytree(saved / "3", tmp_path / "3")
        checkpoints, wanted = Checkpointer(tmp_path), abstract(make_state())
        for name in files(folder):
            before = (folder / name).read_bytes()
            DAMAGES[damage](folder / name)
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore(wanted)
            assert f"{folder}: " in str(error.value)
            assert name in str(error.value)
            (folder / name).write_bytes(before)
        assert checkpoints.restore(wanted)[1]["step"] == 3

    @pytest.mark.parametrize("name", ["meta/metadata", "train/manifest.ocdbt", MANIFEST])
    def test_the_one_before_is_used(self, directory, caplog, name):
        flip(directory / "3" / name, 0.4)
        state, meta = Checkpointer(directory).restore(abstract(make_state()))
        assert_same(state, make_state(2))
        assert meta["step"] == 2
        assert f"{directory}/3: " in caplog.text
        assert name in caplog.text

    @pytest.mark.slow
    def test_random_bits_of_random_files(self, saved, tmp_path):
        folder = shutil.copytree(saved / "3", tmp_path / "3")
        checkpoints, wanted = Checkpointer(tmp_path), abstract(make_state())
        rng = np.random.default_rng(0)
        for name in rng.choice(files(folder), 500):
            before = (folder / name).read_bytes()
            flip(folder / name, rng.random())
            with pytest.raises(CheckpointError, match=name):
                checkpoints.restore(wanted)
            (folder / name).write_bytes(before)

    def test_values_that_the_files_do_not_explain(self, directory, caplog):
        """Digests are of the values on the devices, so they see what file hashes can't."""
        meta = directory / "3" / "meta" / "metadata"
        record = json.loads(meta.read_text())
        record["digests"]["params/scale"] = "0" * 16
        old = hashlib.sha256(meta.read_bytes()).hexdigest()
        meta.write_text(json.dumps(record))
        manifest = directory / "3" / MANIFEST
        new = hashlib.sha256(meta.read_bytes()).hexdigest()
        manifest.write_text(manifest.read_text().replace(old, new))
        assert Checkpointer(directory).restore(abstract(make_state()))[1]["step"] == 2
        assert "params/scale" in caplog.text
        assert f"{directory}/3" in caplog.text

    def test_the_damaged_step_can_be_saved_again(self, directory):
        (directory / "3" / "ema" / "manifest.ocdbt").unlink()
        checkpoints = Checkpointer(directory, keep_last=3)
        state, _ = checkpoints.restore(abstract(make_state()))
        assert_same(state, make_state(2))
        assert checkpoints.all_steps() == [1, 2]
        assert (directory / "3.damaged").is_dir()
        checkpoints.save(3, make_state(30), META)
        checkpoints.close()
        again = Checkpointer(directory)
        assert again.all_steps() == [1, 2, 3]
        assert_same(again.restore(abstract(make_state()))[0], make_state(30))

    def test_all_damaged_is_an_error_again_and_again(self, directory):
        for step in (1, 2, 3):
            flip(directory / str(step) / "train" / "_METADATA", 0.3)
        before = files(directory)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"/3: train/_METADATA.*/2: .*/1: "):
                Checkpointer(directory).restore(abstract(make_state()))
        assert files(directory) == before

    def test_another_model_is_the_users_mistake(self, directory, caplog):
        before = files(directory)
        with pytest.raises(CheckpointError) as error:
            Checkpointer(directory).restore(abstract(make_state(width=40)))
        for word in ("encoder/kernel", "float32[64,32]", "float32[64,40]"):
            assert word in str(error.value)
        assert files(directory) == before
        assert not caplog.records

    def test_another_optimizer_or_dtype_too(self, directory):
        state = make_state()
        with pytest.raises(CheckpointError, match="aux/more was saved as None"):
            Checkpointer(directory).restore(abstract({**state, "aux": {**state["aux"], "more": state["step"]}}))
        with pytest.raises(CheckpointError, match=r"step was saved as int32\[\], here it is uint8\[\]"):
            Checkpointer(directory).restore(abstract({**state, "step": state["step"].astype(jnp.uint8)}))


class TestWriting:
    def test_keep_policy(self, tmp_path):
        checkpoints = Checkpointer(tmp_path, keep_last=2, keep_every=4)
        state = make_state()
        for step in range(1, 8):
            checkpoints.save(step, state, META)
            assert checkpoints.all_steps()[-1] == step
        checkpoints.close()
        assert checkpoints.all_steps() == [4, 6, 7] == Checkpointer(tmp_path).all_steps()
        assert sorted(os.listdir(tmp_path)) == ["4", "6", "7"]

    def test_a_pinned_step_is_kept_until_another_is(self, tmp_path):
        checkpoints = Checkpointer(tmp_path, keep_last=1)
        state, kept = make_state(), []
        for step, pinned in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, None)):
            checkpoints.pin(pinned)
            checkpoints.save(step, state, META)
            checkpoints.wait()
            kept.append(checkpoints.all_steps())
        assert kept == [[1], [1, 2], [1, 3], [4], [4, 5], [6]]
        checkpoints.close()
        assert Checkpointer(tmp_path).all_steps() == [6]

    def test_several_steps_are_pinned_at_once(self, tmp_path):
        checkpoints = Checkpointer(tmp_path, keep_last=1)
        for step in range(1, 5):
            checkpoints.pin(1, 2, None)
            checkpoints.save(step, make_state(), META)
        checkpoints.close()
        assert Checkpointer(tmp_path).all_steps() == [1, 2, 4]

    def test_saving_a_step_twice_is_saving_it_once(self, directory):
        checkpoints = Checkpointer(directory, keep_last=3)
        checkpoints.save(3, make_state(30), META)
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))

    def test_manifest_is_read_by_the_standard_tool(self, saved):
        check = ["sha256sum", "--check", "--strict", MANIFEST]
        assert subprocess.run(check, cwd=saved / "3", capture_output=True).returncode == 0
        assert all(name in (saved / "3" / MANIFEST).read_text() for name in COMMIT_FILES)

    def test_a_disk_that_takes_no_more(self, directory):
        """A limit on the size of files acts like a full disk: within a write, in a thread."""
        child = subprocess.run([sys.executable, "-c", NO_SPACE, str(directory)], capture_output=True, text=True)
        assert child.stdout.startswith(f"{directory} could not be written: "), child.stderr
        checkpoints = Checkpointer(directory)
        assert checkpoints.all_steps() == [1, 2, 3]
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))

    def test_a_place_that_cannot_be_one(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=f"{tmp_path}/file/checkpoints could not be written"):
            Checkpointer(tmp_path / "file" / "checkpoints")

    def test_killed_while_saving(self, directory):
        """Nothing half-written is taken for a checkpoint, and it is gone at the next start."""
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(directory)], stdout=subprocess.PIPE)
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert any(name.startswith("4.") for name in os.listdir(directory))
        assert Checkpointer(directory, read_only=True).all_steps() == [1, 2, 3]
        checkpoints = Checkpointer(directory, keep_last=4)
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))
        checkpoints.save(4, make_state(4), META)
        checkpoints.close()
        assert sorted(os.listdir(directory)) == ["1", "2", "3", "4"]


KILLED = """
import sys, time, jax.numpy as jnp
from sddit_jax.runs import checkpoint
def stop(folder, names):
    print("writing", flush=True)
    time.sleep(60)
checkpoints = checkpoint.Checkpointer(sys.argv[1])
checkpoint._hashes = stop
checkpoints.save(4, {"ema": {"x": jnp.ones(8)}, "step": jnp.int32(4)}, {})
checkpoints.wait()
"""

NO_SPACE = """
import resource, sys, numpy as np, jax.numpy as jnp
from sddit_jax.runs.checkpoint import Checkpointer, CheckpointError
checkpoints = Checkpointer(sys.argv[1])
noise = jnp.asarray(np.random.default_rng(0).random(100_000), jnp.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(4, {"ema": {"x": noise}, "step": jnp.int32(4)}, {})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""

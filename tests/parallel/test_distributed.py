"""Two real processes, with simulated devices, as one run: the same numbers as one process, and every way to end."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import QUICK

from sddit_jax.config import schema
from sddit_jax.errors import CommandError, Unreachable, UserError
from sddit_jax.parallel import distributed
from sddit_jax.parallel.sharding import make_mesh, path_name
from sddit_jax.runs.checkpoint import Checkpointer, digest
from sddit_jax.runs.folder import restore_run

ROOT = Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=4"]
TRAIN = [sys.executable, "-m", "sddit_jax.main", f"--config={ROOT}/tests/configs/tiny.py"]
# Quick to compile: two processes that are half a minute apart at a collective of simulated devices give up.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": " ".join(f"--{flag}={str(value).lower()}" for flag, value in QUICK.items()),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
EIGHT = {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
HEARTBEAT = 10
SHORT = [
    "--config.steps=20", "--config.checkpoint.every=5", "--config.sampling.every=0", "--config.log.every=1",
]  # fmt: skip
# With the evaluation at the end, and parameters of which each process holds one half.
FSDP = [
    *SHORT, "--config.parallel.fsdp=8",
    "--config.eval.name=digits", "--config.eval.draws=1", "--config.eval.num_samples=12",
]  # fmt: skip
# Heads and hidden channels over all devices, and so over both processes.
TENSOR = [
    "--config.steps=6", "--config.sampling.every=0", "--config.log.every=1", "--config.log.diagnose_every=0",
    "--config.parallel.tensor=8", "--config.model.heads=8", "--config.model.decoder_heads=8",
]  # fmt: skip


def one(*command: str, **more: str) -> subprocess.CompletedProcess:
    """One process with eight devices."""
    return subprocess.run(
        command, env=ENVIRONMENT | EIGHT | more, cwd=ROOT, capture_output=True, text=True, timeout=400
    )


def two(*command: str) -> subprocess.CompletedProcess:
    """Two processes with four devices each; their lines are in stdout."""
    return subprocess.run(
        [*LOCAL, f"--heartbeat_seconds={HEARTBEAT}", "--", *command],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def start_two(*command: str) -> list[subprocess.Popen]:
    """Two processes, to be signalled one by one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = ENVIRONMENT | {"XLA_FLAGS": EIGHT["XLA_FLAGS"].replace("=8", "=4")}
    place = [f"--distributed=127.0.0.1:{port}", "--process_count=2", f"--heartbeat_seconds={HEARTBEAT}"]
    return [
        subprocess.Popen(
            [*command, *place, f"--process_index={index}"],
            env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )
        for index in range(2)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """What the processes say, once all have ended; they are killed if they have not in time."""
    deadline = time.monotonic() + timeout
    try:
        return [process.communicate(timeout=max(deadline - time.monotonic(), 1))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_until(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(ended(processes, 1)))
        time.sleep(0.02)


def rows(workdir: Path) -> list[dict]:
    """The rows that are whole, without what depends on the machine."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in whole]


def saved_digests(workdir: Path) -> dict[str, str]:
    checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
    return checkpointer.read_meta(checkpointer.all_steps()[-1])["digests"]


def host_state(workdir: Path, devices: int = 8, **parallel: int) -> dict[str, np.ndarray]:
    """path -> leaf of the newest checkpoint, as restored on a mesh of this process."""
    mesh = make_mesh(schema.ParallelConfig(**parallel), jax.devices()[:devices])
    _, state, meta = restore_run(workdir, mesh)
    assert digest(state) == meta["digests"]
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_up_to_rounding(a: Path, b: Path, learning_rate: float = 1e-3) -> None:
    """The same rows, and |difference| <= 1e-5 |x| + 0.01 lr for parameters, EMA and the objectives' state."""
    assert len(rows(a)) == len(rows(b))
    for row, expected in zip(rows(a), rows(b), strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6, err_msg=f"{row['step']} {key}")
    state, expected_state = host_state(a), host_state(b)
    assert state.keys() == expected_state.keys()
    for path, leaf in state.items():
        if not path.startswith("opt_state/"):
            excess = (np.abs(leaf - expected_state[path]) - 1e-5 * np.abs(leaf)).max()
            assert excess <= 0.01 * learning_rate, f"{path}: off by {excess / learning_rate:.3g} lr"


@pytest.fixture(scope="session")
def together(tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("together")
    done = two(*TRAIN, f"--workdir={workdir}", *FSDP)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("plan: from step 0 to 20, 16 images each, on 8 cpu device(s)") == 1
    assert done.stdout.count("20 steps done") == 1
    assert "[1] plan" not in done.stdout
    return workdir


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    """The workdir of the same run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    done = one(*TRAIN, f"--workdir={workdir}", *FSDP)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_two_processes_compute_what_one_does(together, alone):
    assert_same_up_to_rounding(together, alone)
    assert "eval/class_consistency" in rows(together)[-1]
    names = [sorted(p.name for p in run.rglob("*") if "checkpoints" not in p.parts) for run in (together, alone)]
    assert [name for name in names[0] if "events" not in name] == [name for name in names[1] if "events" not in name]
    pictures = [np.asarray(Image.open(run / "samples" / "20.png"), int) for run in (together, alone)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.slow
def test_two_processes_compute_what_one_does_with_tensors_that_span_them(tmp_path):
    done = two(*TRAIN, f"--workdir={tmp_path}/two", *TENSOR)
    assert done.returncode == 0, done.stdout
    done = one(*TRAIN, f"--workdir={tmp_path}/one", *TENSOR)
    assert done.returncode == 0, done.stderr
    assert_same_up_to_rounding(tmp_path / "two", tmp_path / "one")


STOPPED = """
import os, signal, time
import jax
from sddit_jax import cli, main
from sddit_jax.evaluation import distance

distance._BATCH_SIZE = 32
make_generate, batches = distance.make_generate, []

def stopping(*args, **kwargs):
    generate = make_generate(*args, **kwargs)

    def stop_in_the_first_batch(*args):
        batches.append(args)
        if len(batches) == 1 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # JAX looks for signals once a second.
        time.sleep(2)
        return generate(*args)

    return stop_in_the_first_batch

distance.make_generate = stopping
cli.run(main.main)
"""


@pytest.mark.slow
def test_two_processes_measure_the_distances_of_one_and_keep_the_same_checkpoint(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1)).astype(np.uint8))
    changes = [
        *SHORT, "--config.eval.every=5", "--config.eval.features=pixels", "--config.eval.num_samples=100",
        f"--config.eval.reference={tmp_path}/images.npz", "--config.checkpoint.keep_last=1",
    ]  # fmt: skip
    workdirs = tmp_path / "two", tmp_path / "one"
    for run, workdir in zip((two, one), workdirs, strict=True):
        done = run(*TRAIN, f"--workdir={workdir}", *changes)
        assert done.returncode == 0, done.stdout + done.stderr
    of_two, of_one = ({r["step"]: r["eval/fd_pixels"] for r in rows(w) if "eval/fd_pixels" in r} for w in workdirs)
    assert list(of_two) == list(of_one) == [5, 10, 15, 20]
    for step, distance in of_two.items():
        assert distance == pytest.approx(of_one[step], rel=1e-3)
    best = min(of_two, key=of_two.get)
    assert json.loads((workdirs[0] / "best.json").read_text())["step"] == best
    steps = Checkpointer(workdirs[0] / "checkpoints", read_only=True).all_steps()
    # What to keep was decided when 20 was saved, before its own distance.
    assert steps == sorted({min((5, 10, 15), key=of_two.get), 20})
    # Stopped by a signal to one of them in the midst of the first distance, they go on to the same end.
    stopped = tmp_path / "stopped"
    done = two(sys.executable, "-c", STOPPED, TRAIN[-1], f"--workdir={stopped}", *changes)
    assert done.returncode == 75, done.stdout
    assert done.stdout.count("error: SIGTERM: saved step 5") == 2
    assert not (stopped / "best.json").exists()
    done = two(*TRAIN, f"--workdir={stopped}", *changes)
    assert done.returncode == 0, done.stdout
    assert rows(stopped) == rows(workdirs[0])
    assert (stopped / "best.json").read_text() == (workdirs[0] / "best.json").read_text()
    assert Checkpointer(stopped / "checkpoints", read_only=True).all_steps() == steps
    assert saved_digests(stopped) == saved_digests(workdirs[0])
    # The command on two processes: one file of results, the same as that of one.
    arguments = ["--features=pixels", f"--samples={tmp_path}/images.npz", f"--reference={tmp_path}/images.npz"]
    found = []
    for run in (two, one):
        done = run(sys.executable, "-m", "sddit_jax.evaluate", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (done.stdout + done.stderr).count("fd_pixels  ") == 1
        found.append(json.loads((tmp_path / "images.evaluation.json").read_text()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_what_two_processes_saved_one_restores_on_any_number_of_devices(together):
    expected = host_state(together, 8, fsdp=8)
    for devices, parallel in ((1, {}), (2, {"tensor": 2}), (4, {"fsdp": 4})):
        state = host_state(together, devices, **parallel)
        assert state.keys() == expected.keys()
        for path, leaf in state.items():
            np.testing.assert_array_equal(leaf, expected[path], strict=True)


RESTORE = """
import json, sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from sddit_jax import cli, process_flags
from sddit_jax.runs.checkpoint import digest
from sddit_jax.runs.folder import restore_run
from sddit_jax.config.schema import ParallelConfig
from sddit_jax.parallel.sharding import make_mesh

def main(workdir, output):
    process_flags.start_processes()
    mesh = make_mesh(ParallelConfig(tensor=8))
    _, state, _ = restore_run(Path(workdir), mesh)
    kernel = state["params"]["network"]["encoder"]["stack"]["blocks"]["mlp"]["hidden"]["kernel"]
    values = multihost_utils.process_allgather(kernel, tiled=True)
    found = {
        "digests": digest(state),
        "processes_of_an_axis": [device.process_index for device in mesh.devices[0, 0]],
        "here": sum(shard.data.size for shard in kernel.addressable_shards),
        "values": np.asarray(values).tolist(),
    }
    Path(output, str(jax.process_index())).write_text(json.dumps(found))

cli.run(main, words=2)
"""


@pytest.mark.slow
def test_what_one_process_saved_two_restore_and_their_tensors_span_them(alone, tmp_path):
    done = two(sys.executable, "-c", RESTORE, str(alone), str(tmp_path))
    assert done.returncode == 0, done.stdout
    found = [json.loads((tmp_path / str(index)).read_text()) for index in range(2)]
    kernel = host_state(alone)["params/network/encoder/stack/blocks/mlp/hidden/kernel"]
    for each in found:
        assert each["processes_of_an_axis"] == [0] * 4 + [1] * 4
        assert each["here"] == kernel.size // 2
        assert each["digests"] == saved_digests(alone)
        np.testing.assert_array_equal(np.array(each["values"], np.float32), kernel)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_stopped_and_killed_at_one_process_a_run_ends_as_if_neither(together, tmp_path, index):
    command = [*TRAIN, f"--workdir={tmp_path}", *FSDP]
    processes = start_two(*command)
    wait_until(lambda: (tmp_path / "config.json").exists(), processes)
    processes[index].send_signal(signal.SIGTERM)
    said = ended(processes, 120)
    assert [process.returncode for process in processes] == [75, 75], said
    steps = {re.search(r"error: SIGTERM: saved step (\d+)", text)[1] for text in said}
    assert len(steps) == 1
    assert Checkpointer(tmp_path / "checkpoints", read_only=True).all_steps()[-1] == int(steps.pop()) < 12

    processes = start_two(*command)
    wait_until(lambda: len(rows(tmp_path)) >= 12, processes)
    processes[index].kill()
    began = time.monotonic()
    ended(processes, HEARTBEAT + 30)
    assert time.monotonic() - began < HEARTBEAT + 30
    assert processes[1 - index].returncode not in (0, 2, 3)

    done = two(*command)
    assert done.returncode == 0, done.stdout
    assert saved_digests(tmp_path) == saved_digests(together)
    assert rows(tmp_path) == rows(together)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_and_back(together, alone, tmp_path):
    """By SIGINT at the start, on another mesh until a SIGTERM, and with a third one to the end."""
    processes = start_two(*TRAIN, f"--workdir={tmp_path}", *FSDP)
    wait_until(lambda: (tmp_path / "config.json").exists(), processes)
    processes[1].send_signal(signal.SIGINT)
    said = ended(processes, 120)
    assert [process.returncode for process in processes] == [75, 75], said
    arguments = [f"--workdir={tmp_path}", *FSDP]
    process = subprocess.Popen(
        [*TRAIN, *arguments, "--config.parallel.fsdp=2"],
        env=ENVIRONMENT | EIGHT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(rows(tmp_path)) >= 6, [process])
    process.send_signal(signal.SIGTERM)
    said = ended([process], 120)
    assert process.returncode == 75, said
    done = two(*TRAIN, *arguments, "--config.parallel.fsdp=4", "--config.parallel.tensor=2")
    assert done.returncode == 0, done.stdout
    (rows_a, rows_b) = ([row for row in rows(run) if "train/loss" in row] for run in (tmp_path, together))
    assert [row["step"] for row in rows_a] == [row["step"] for row in rows_b]
    for row, expected in zip(rows_a, rows_b, strict=True):
        np.testing.assert_allclose(row["train/loss"], expected["train/loss"], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_start_from_the_newest_intact_weights_of_another_run(alone, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(alone, run)
    file = max((run / "checkpoints" / "20").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = two(*TRAIN, f"--workdir={tmp_path}/new", *SHORT, "--config.steps=2", f"--config.init_from={run}")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passing over a damaged checkpoint") == 1
    assert f"starting from the weights of {run} at step 15" in done.stdout


FAILING = """
import itertools, jax
from sddit_jax import cli, main, train
from sddit_jax.errors import DataError

make_loader = train.make_loader

def failing(*args, **kwargs):
    yield from itertools.islice(make_loader(*args, **kwargs), 3)
    raise {error}

def loader(*args, **kwargs):
    return (failing if jax.process_index() == {index} else make_loader)(*args, **kwargs)

train.make_loader = loader
cli.run(main.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "index", "code"),
    [("DataError('the disk of one host is gone')", 1, 2), ("RuntimeError('the disk of one host is gone')", 0, 1)],
)
def test_an_error_of_one_process_ends_all(tmp_path, error, index, code):
    script = FAILING.format(error=error, index=index)
    processes = start_two(sys.executable, "-c", script, TRAIN[-1], f"--workdir={tmp_path}", *TENSOR[:-3])
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) >= 2, processes)
    said = ended(processes, HEARTBEAT + 30)
    assert processes[index].returncode == code
    assert "the disk of one host is gone" in said[index]
    assert processes[1 - index].returncode not in (0, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.parallel.fsdp=3", "a mesh of data 2 x fsdp 3 x tensor 1 needs 6 devices, but there are 8"),
        pytest.param("--config.batch_size=12", "batch_size 12 is not divisible by 8", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_told_once_by_each_process(tmp_path, change, message):
    done = two(*TRAIN, f"--workdir={tmp_path}/new", change)
    assert done.returncode == 2, done.stdout
    assert done.stdout.count(f"error: {message}") == 2
    assert "Check failure" not in done.stdout


@pytest.mark.slow
def test_samples_of_two_processes_are_those_of_one(alone, tmp_path):
    arguments = [f"--workdir={alone}", "--num_samples=20", "--batch_size=8", "--steps=4", "--guidance=1.5"]
    sample = [sys.executable, "-m", "sddit_jax.sample", *arguments]
    done = two(*sample, f"--output={tmp_path}/two", "--class_grid")
    assert done.returncode == 0, done.stdout
    done = one(*sample, f"--output={tmp_path}/one")
    assert done.returncode == 0, done.stderr
    a, b = (np.load(tmp_path / name / "samples.npz", allow_pickle=False) for name in ("two", "one"))
    np.testing.assert_array_equal(a["arr_1"], b["arr_1"])
    assert a["arr_0"].shape == (20, 8, 8, 1)
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 2
    names = ["class_grid.png", "grid.png", "samples.json", "samples.npz"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names


FULL = """
import time
from sddit_jax import cli, sample
from sddit_jax.generation.sample_folder import SampleFolder
from sddit_jax.errors import UserError

def full(*args):
    time.sleep({seconds})
    raise UserError("no space left")

SampleFolder.{method} = full
cli.run(sample.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "seconds"),
    [("write", 0), ("finish", 5)],
)
def test_a_disk_that_is_full_at_process_0_ends_all(alone, tmp_path, method, seconds):
    done = two(
        sys.executable, "-c", FULL.format(method=method, seconds=seconds), f"--workdir={alone}", f"--output={tmp_path}",
        "--num_samples=16", "--batch_size=8", "--steps=2",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert done.stdout.count("error: no space left") == 2, done.stdout


@pytest.mark.slow
def test_sampling_of_two_processes_goes_on_in_one_and_refuses_as_one(alone, tmp_path):
    arguments = [f"--workdir={alone}", f"--output={tmp_path}/out", "--num_samples=4000", "--batch_size=8", "--steps=2"]
    sample = [sys.executable, "-m", "sddit_jax.sample", *arguments]
    processes = start_two(*sample)
    wait_until(lambda: len(list(tmp_path.glob("out/parts/*.npy"))) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes, 120)
    assert [process.returncode for process in processes] == [75, 75], said
    counts = {
        re.search(r"error: SIGTERM: (\d+) of 4000 images are in .*; the same command continues", s)[1] for s in said
    }
    assert counts == {str(8 * len(list(tmp_path.glob("out/parts/*.npy"))))}
    done = two(*sample, "--seed=1")
    assert done.returncode == 2
    assert done.stdout.count("holds other samples: seed 0 instead of 1; use another --output") == 2
    done = one(*sample)
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "out" / "samples.npz")["arr_0"]) == 4000


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def initialized(monkeypatch) -> Iterator[list]:
    """What jax.distributed.initialize is called with, once the processes have met."""
    calls = []
    log = logging.getLogger("sddit_jax")
    level = log.level
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    yield calls
    log.setLevel(level)  # All but process 0 have raised it.


def start_threads(*places: tuple[str, int, int], wait_seconds: int = 20) -> list[Exception | None]:
    """Each place's start in a thread, and how it ended."""
    results: list[Exception | None] = [None] * len(places)

    def run(number: int) -> None:
        try:
            distributed.start(*places[number], wait_seconds=wait_seconds)
        except CommandError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet_whoever_comes_first(initialized, port):
    address = f"127.0.0.1:{port}"
    assert start_threads(*((address, index, 4) for index in (3, 1, 0, 2))) == [None] * 4
    assert sorted(args[:3] for args, _ in initialized) == [(address, 4, index) for index in range(4)]


def test_strangers_at_the_port_do_no_harm(initialized, port):
    def stranger() -> None:
        for message in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\xfe\n"):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(message)
                    break
                except OSError:
                    time.sleep(0.01)

    thread = threading.Thread(target=stranger)
    thread.start()
    server = threading.Thread(target=distributed.start, args=(f"127.0.0.1:{port}", 0, 2))
    server.start()
    thread.join()
    assert not initialized
    assert start_threads((f"127.0.0.1:{port}", 1, 2)) == [None]
    server.join()
    assert len(initialized) == 2


def test_a_process_that_was_started_again_takes_its_place(initialized, port):
    server = threading.Thread(target=distributed.start, args=(f"127.0.0.1:{port}", 0, 3))
    server.start()
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.01)
    connection.sendall(b'{"index": 1, "count": 3}\n')
    time.sleep(0.2)
    connection.close()
    assert start_threads((f"127.0.0.1:{port}", 1, 3), (f"127.0.0.1:{port}", 2, 3)) == [None, None]
    server.join()
    assert len(initialized) == 3


def assert_error(error: Exception | None, kind: type, *words: str) -> None:
    assert type(error) is kind
    for word in words:
        assert word in str(error)


def test_a_missing_process_is_named_to_all(port):
    errors = start_threads(*((f"127.0.0.1:{port}", index, 4) for index in (0, 2)), wait_seconds=1)
    for error in errors:
        assert_error(error, Unreachable, "of 4 processes 1, 3 did not come", f"127.0.0.1:{port}", "1 s")
        assert error.exit_code == 75


def test_an_address_where_nobody_is_is_named(port):
    (error,) = start_threads((f"127.0.0.1:{port}", 1, 2), wait_seconds=1)
    assert_error(error, Unreachable, f"127.0.0.1:{port}", "1 s", "refused")
    (error,) = start_threads(("no.such.host.invalid:1234", 1, 2), wait_seconds=1)
    assert_error(error, Unreachable, "no.such.host.invalid:1234")


def test_a_port_in_use_is_named(port):
    with socket.create_server(("", port)):
        (error,) = start_threads((f"127.0.0.1:{port}", 0, 2))
    assert_error(error, Unreachable, f"port {port}", "in use")


def test_places_that_do_not_fit_together_are_told_to_all(port):
    address = f"127.0.0.1:{port}"
    for error in start_threads((address, 0, 3), (address, 1, 3), (address, 1, 3)):
        assert_error(error, UserError, "two processes have --process_index=1")
    errors = start_threads((address, 0, 2), (address, 1, 3))
    for error in errors:
        assert_error(error, UserError, "process 1 has --process_count=3, but process 0 has 2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("127.0.0.1:1234", 2, 2), ("--process_index=2", "0 to 1")),
        (("127.0.0.1:1234", -1, 2), ("--process_index=-1",)),
        (("127.0.0.1:1234", None, 2), ("needs --process_index",)),
        (("127.0.0.1", 0, 2), ("HOST:PORT",)),
        (("127.0.0.1:123456", 0, 2), ("HOST:PORT",)),
        (("on", None, None), ("--distributed=on", "off, auto or HOST:PORT")),
        (("off", 0, 2), ("--distributed=HOST:PORT",)),
        (("auto", 0, 2), ("leave them out",)),
    ],
)
def test_wrong_flags_are_explained(arguments, words):
    with pytest.raises(UserError) as caught:
        distributed.start(*arguments)
    assert_error(caught.value, UserError, *words)


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "3",
}  # fmt: skip


def test_auto_takes_slurms_word(initialized, monkeypatch, port):
    for key, value in {**SLURM, "SLURM_PROCID": "1", "JAX_COORDINATOR_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Unreachable, match=f"localhost:{port}"):
        distributed.start("auto", wait_seconds=1)
    server = threading.Thread(target=distributed.start, args=(f"localhost:{port}", 0, 2))
    server.start()
    distributed.start("auto", wait_seconds=20, heartbeat_seconds=7)
    server.join()
    (args, kwargs) = next(call for call in initialized if call[0][2] == 1)
    assert args == (f"localhost:{port}", 2, 1, [3])
    assert kwargs["heartbeat_timeout_seconds"] == 7


def test_auto_where_there_is_no_cluster_says_what_to_do_instead():
    with pytest.raises(UserError, match="none of Cloud TPU, GKE, SLURM"):
        distributed.start("auto")


def test_the_command_ends_with_75_and_one_line_when_nobody_is_there(port, tmp_path):
    done = one(
        *TRAIN, f"--workdir={tmp_path}", f"--distributed=127.0.0.1:{port}", "--process_index=1", "--process_count=2",
        "--wait_seconds=1",
    )  # fmt: skip
    assert done.returncode == 75
    assert re.fullmatch(r"error: process 0 was not found at .*\n", done.stderr)

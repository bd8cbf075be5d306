"""The commands as a user runs them: in a process of their own, ended by errors, signals and kills."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import environment

from sddit_jax.runs.checkpoint import Checkpointer

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT}/tests/configs/tiny.py"


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    done = command("main", TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def final_digests(workdir: Path) -> dict[str, str]:
    checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
    assert checkpointer.all_steps()[-1] == 60
    return checkpointer.read_meta(60)["digests"]


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert final_digests(workdir) == final_digests(reference)
    assert rows(workdir) == rows(reference)


def assert_user_error(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in message


def test_a_run_leaves_what_the_readme_says(finished):
    assert json.loads((finished / "config.json").read_text())["steps"] == 60
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["30.png", "60.png"]
    table = rows(finished)
    assert [row["step"] for row in table] == [1, *range(5, 61, 5)]
    assert {"train/loss", "train/denoising", "train/discrimination/cls", "train/discrimination/patch", "images_seen",
            "teacher/cls/entropy", "teacher/patch/mean_entropy", "teacher/cls/agreement", "teacher/cls/center_norm",
            "grad_norm/encoder", "grad_norm/decoder", "grad_norm/discrimination"} <= table[0].keys()  # fmt: skip
    assert "teacher/cls/information" in table[4]
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == [
        40,
        50,
        60,
    ]


def test_a_finished_run_is_left_as_it_is(command, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    assert command("main", TINY, f"--workdir={finished}").returncode == 0
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_continues(command, finished, tmp_path, number):
    process = start(tmp_path)
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    step = int(re.search(rf"{number.name}: saved step (\d+)", stderr)[1])
    assert Checkpointer(tmp_path / "checkpoints", read_only=True).all_steps()[-1] == step
    assert command("main", TINY, f"--workdir={tmp_path}").returncode == 0
    assert_same_run(tmp_path, finished)


def start(workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sddit_jax.main", TINY, f"--workdir={workdir}"],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in complete_rows(path)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} in {workdir}")


def complete_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_at_random(workdir: Path, rng: random.Random) -> None:
    """Starts the run, and kills it within the second in which it would train; or it is done before."""
    process = start(workdir)
    deadline = time.monotonic() + 120
    seen = len((workdir / "metrics.jsonl").read_bytes()) if (workdir / "metrics.jsonl").exists() else -1
    while process.poll() is None and time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and len(path.read_bytes()) != seen:
            time.sleep(rng.uniform(0, 1.0))
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_killed_once_it_ends_as_if_never_killed(command, finished, tmp_path):
    kill_at_random(tmp_path, random.Random(0))
    assert command("main", TINY, f"--workdir={tmp_path}").returncode == 0
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_killed_ten_times_in_a_row_it_ends_as_if_never_killed(tmp_path, monkeypatch):
    """By the programs that a user runs: XLA optimises them as it does by default."""
    monkeypatch.setenv("XLA_FLAGS", "")
    rng = random.Random(1)
    for _ in range(10):
        kill_at_random(tmp_path / "killed", rng)
    for workdir in ("killed", "finished"):
        process = start(tmp_path / workdir)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert_same_run(tmp_path / "killed", tmp_path / "finished")


def test_a_damaged_newest_checkpoint_is_named_and_the_run_still_ends_the_same(command, finished, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished, workdir)
    file = max((workdir / "checkpoints" / "60").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = command("main", TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr
    assert "checkpoints/60" in done.stderr
    assert_same_run(workdir, finished)


@pytest.mark.slow
def test_on_eight_devices_with_the_evaluation_at_the_end(tmp_path):
    changes = ["--config.steps=2", "--config.eval.name=digits", "--config.eval.draws=1", "--config.eval.num_samples=12"]
    command = [sys.executable, "-m", "sddit_jax.main", TINY, f"--workdir={tmp_path}", *changes]
    for _ in range(2):  # The second only evaluates again, to the same row.
        done = subprocess.run(command, env=environment(8), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "recognised as the asked digit" in done.stderr
        evaluated = [row for row in rows(tmp_path) if "eval/class_consistency" in row]
        assert len(evaluated) == 1
        assert {"eval/frechet_pixels", "eval/nearest_real", "eval/cls/information", "eval/patch/information",
                "eval/probe_cls", "eval/probe_cls_untrained"} <= evaluated[0].keys()  # fmt: skip


@pytest.mark.slow
def test_without_labels(command, tmp_path):
    arguments = [TINY, f"--workdir={tmp_path}/run", "--config.model.num_classes=0", "--config.steps=20"]
    assert command("main", *arguments).returncode == 0
    last = rows(tmp_path / "run")[-1]
    assert np.isfinite(last["train/loss"])
    assert last["teacher/cls/information"] is not None
    done = command("sample", f"--workdir={tmp_path}/run", f"--output={tmp_path}/out", "--num_samples=3", "--steps=3")
    assert done.returncode == 0, done.stderr
    assert_user_error(
        command("sample", f"--workdir={tmp_path}/run", f"--output={tmp_path}/out", "--guidance=2.0"), "guidance"
    )


def test_help(command):
    done = command("main", "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    assert "Trains" in done.stdout


def test_sample_by_a_weaker_run(command, finished, tmp_path):
    arguments = [f"--workdir={finished}", "--num_samples=4", "--steps=4", f"--output={tmp_path}", f"--guide={finished}"]
    assert_user_error(command("sample", *arguments), "--guide", "set --guidance")
    settings = ["--guidance=2", "--guidance_interval=0.3,5", "--solver=stochastic", "--s_churn=2", "--guide_step=40"]
    done = command("sample", *arguments, *settings)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["guide"]["checkpoint_step"] == 40
    assert record["checkpoint_step"] == 60
    assert record["guide"]["checkpoint_digests"] != record["checkpoint_digests"]
    assert record["guidance_interval"] == [0.3, 5]
    assert record["churn"] == {"s_churn": 2, "s_min": 0.05, "s_max": 50, "s_noise": 1.003}
    assert len(record["noise_levels"]) == 5


def test_wrong_arguments_are_explained(command, finished, tmp_path):
    """The errors of config/border.py itself are tested without a process."""
    workdir = f"--workdir={tmp_path}/new"
    (tmp_path / "empty").mkdir()
    assert_user_error(command("main"), "--config", "--workdir")
    assert_user_error(command("main", TINY, "--workdir=gs://bucket/run"), "gs://bucket/run", "mount")
    assert_user_error(command("main", TINY, workdir, "--config.model.dept=3"), "dept")
    assert_user_error(command("main", TINY, workdir, "--config.model.depth=three"), "depth", "three")
    assert_user_error(command("main", f"{TINY}:sddit", workdir), "sddit", "sd_dit")
    assert_user_error(command("main", "--config=no/such/file.py", workdir), "no/such/file.py")
    assert_user_error(command("main", TINY, workdir, "--config.masking.ratio=1.0"), "masking.ratio", "1.0")
    assert_user_error(command("main", TINY, workdir, "--config.model.patch=3"), "model.patch 3", "8")
    assert_user_error(command("main", TINY, workdir, "--config.model.heads=3"), "model.heads 3", "16")
    assert_user_error(command("main", TINY, workdir, f"--config.data.source=folder:{tmp_path}/none"), "none")
    assert_user_error(command("main", TINY, workdir, f"--config.data.source=folder:{tmp_path}/empty"), "no images")
    assert_user_error(
        command("main", TINY, f"--workdir={finished}", "--config.model.width=32"), "another model", "width"
    )
    assert not (tmp_path / "new").exists()
    assert_user_error(command("sample", f"--workdir={tmp_path}/none", f"--output={tmp_path}/o"), "none")
    assert_user_error(command("sample", f"--workdir={finished}", f"--output={tmp_path}/o", "--labels=12"), "12", "9")
    assert final_digests(finished)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_state_kept(command, tmp_path):
    arguments = [
        TINY,
        f"--workdir={tmp_path}",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.max_skipped=4",
    ]
    done = command("main", *arguments)
    assert_user_error(done, "not finite", "learning_rate", code=3)
    checkpointer = Checkpointer(tmp_path / "checkpoints", read_only=True)
    ema, _ = checkpointer.restore_ema()
    assert all(np.isfinite(leaf).all() for leaf in jax_leaves(ema))
    again = command("main", *arguments)
    assert_user_error(again, "not finite", code=3)


def jax_leaves(tree) -> list:
    return [leaf for value in tree.values() for leaf in (jax_leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.slow
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path):
    """The size limit of a process stands for a disk with no room: no checkpoint file fits, the log does."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import runpy; sys.argv = ['main', *sys.argv[1:]]; runpy.run_module('sddit_jax.main', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, TINY, f"--workdir={tmp_path}"],
        env=environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "could not be written" in message
    assert str(tmp_path) in message


@pytest.fixture(scope="session")
def monitored(command, tmp_path_factory) -> tuple[Path, list[str]]:
    """The workdir of an uninterrupted run that measures a distance every 10 steps, and its arguments."""
    folder = tmp_path_factory.mktemp("monitored")
    done = command("evaluate", "--features=pixels", "--source=digits", f"--write_reference={folder}/digits.npz")
    assert done.returncode == 0, done.stderr
    arguments = [
        TINY,
        "--config.steps=40",
        "--config.eval.every=10",
        f"--config.eval.reference={folder}/digits.npz",
        "--config.eval.features=pixels",
        "--config.eval.num_samples=100",
        "--config.checkpoint.keep_last=1",
    ]
    done = command("main", *arguments, f"--workdir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder / "run", arguments


def checkpoint_steps(workdir: Path) -> list[int]:
    return Checkpointer(workdir / "checkpoints", read_only=True).all_steps()


def test_distances_are_logged_and_the_best_checkpoint_is_kept(monitored):
    workdir, _ = monitored
    distances = {row["step"]: row["eval/fd_pixels"] for row in rows(workdir) if "eval/fd_pixels" in row}
    assert list(distances) == [10, 20, 30, 40]
    best = json.loads((workdir / "best.json").read_text())
    assert {int(step): distance for step, distance in best["distances"].items()} == distances
    assert best["distance"] == distances[best["step"]] == min(distances.values())
    # By more than a percent, which is far above rounding.
    assert best["step"] == 30
    assert checkpoint_steps(workdir) == [30, 40]


@pytest.mark.slow
def test_a_run_that_goes_on_measures_the_same_and_keeps_the_same(command, monitored, tmp_path):
    reference, arguments = monitored
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    done = command("main", *arguments, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "from step 30 to 40" in done.stderr
    assert rows(workdir) == rows(reference)
    assert (workdir / "best.json").read_text() == (reference / "best.json").read_text()
    assert checkpoint_steps(workdir) == checkpoint_steps(reference)
    # Under other conditions the distances are not compared.
    done = command("main", *arguments, f"--workdir={workdir}", "--config.steps=50", "--config.eval.num_samples=70")
    assert done.returncode == 0, done.stderr
    assert "compared anew, and checkpoint 30, which had the lowest, is no longer kept" in done.stderr
    assert list(json.loads((workdir / "best.json").read_text())["distances"]) == ["40", "50"]
    # 40 was the best when 50 was saved.
    assert checkpoint_steps(workdir) == [40, 50]


STOPPED = """
import os, signal
from sddit_jax import cli, main
from sddit_jax.evaluation import distance

distance._BATCH_SIZE = 32
make_generate, batches = distance.make_generate, []

def stopping(*args, **kwargs):
    generate = make_generate(*args, **kwargs)

    def stop_in_the_second_batch_of_step_20(*args):
        batches.append(args)
        if len(batches) == 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(batches) <= 4 + 2
        return generate(*args)

    return stop_in_the_second_batch_of_step_20

distance.make_generate = stopping
cli.run(main.main)
"""


@pytest.mark.slow
def test_stopped_while_it_measures_it_ends_as_if_never_stopped(command, monitored, tmp_path):
    reference, arguments = monitored
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, *arguments, f"--workdir={tmp_path}"],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "error: SIGTERM: saved step 20" in done.stderr
    assert checkpoint_steps(tmp_path)[-1] == 20
    assert list(json.loads((tmp_path / "best.json").read_text())["distances"]) == ["10"]
    done = command("main", *arguments, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "from step 20 to 40" in done.stderr
    assert rows(tmp_path) == rows(reference)
    assert (tmp_path / "best.json").read_text() == (reference / "best.json").read_text()
    assert checkpoint_steps(tmp_path) == checkpoint_steps(reference)


@pytest.mark.slow
def test_killed_between_distances_it_ends_as_if_never_killed(command, monitored, tmp_path):
    reference, arguments = monitored
    process = subprocess.Popen(
        [sys.executable, "-m", "sddit_jax.main", *arguments, f"--workdir={tmp_path}"],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(tmp_path, 20)
    process.kill()
    process.wait()
    assert command("main", *arguments, f"--workdir={tmp_path}").returncode == 0
    assert rows(tmp_path) == rows(reference)
    assert (tmp_path / "best.json").read_text() == (reference / "best.json").read_text()
    assert checkpoint_steps(tmp_path) == checkpoint_steps(reference)


def test_a_reference_that_does_not_fit_is_named_before_the_first_step(command, monitored, tmp_path):
    _, arguments = monitored
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "rgb.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    workdir = f"--workdir={tmp_path}/new"
    for name, words in (("large", "8x8"), ("rgb", "192 features"), ("absent", "absent.npz")):
        changed = [*arguments, workdir, f"--config.eval.reference={tmp_path}/{name}.npz"]
        assert_user_error(command("main", *changed), words)
    assert_user_error(command("main", *arguments, workdir, "--config.eval.features=inception"), "eval.inception")

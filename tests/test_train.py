"""The loop: evaluators of one's own, in the order of effects; and what may cross between host and devices."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import jax
import optax
import pytest
from helpers import tiny_config

from sddit_jax.errors import Interrupted
from sddit_jax.evaluation import evaluators
from sddit_jax.evaluation.protocol import Evaluator
from sddit_jax.parallel import sharding
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.train import train

CONFIG = tiny_config(
    "dit",
    {
        "data.source": "digits",
        "data.num_threads": 1,
        "model.channels": 1,
        "model.num_classes": 10,
        "model.depth": 1,
        "parallel.data": 1,
        "batch_size": 8,
        "steps": 6,
        "checkpoint.every": 4,
        "checkpoint.keep_last": 1,
        "log.every": 2,
        "log.tensorboard": False,
        "sampling.steps": 2,
        "sampling.every": 0,
        "sampling.grid": 1,
    },
)


DIRECTIONS = ("host_to_device", "device_to_device", "device_to_host")
MEASURED: list[int] = []
SAID: list[tuple[int, bool, bool]] = []
FORBIDDEN: dict[str, str] = {}


class Beside(Evaluator):
    """Joins the row of every third step."""

    name = "eval/norm"
    joins_step = True

    def due(self, step):
        return step % 3 == 0

    def measure(self, state, moment):
        assert moment.batch["image"].shape == (8, 8, 8, 1)
        FORBIDDEN.update({kind: getattr(jax.config, f"jax_transfer_guard_{kind}") for kind in DIRECTIONS})
        return {self.name: jax.jit(optax.tree.norm)(state["params"])}

    def say(self, step, row):
        SAID.append((step, self.name in row, "train/loss" in row))


class Apart(Evaluator):
    """Has rows of its own at odd steps, none of which is saved when it measures."""

    name = "eval/step"
    best = 4

    def due(self, step):
        return step % 2 == 1

    def measure(self, state, moment):
        MEASURED.append(moment.step)
        moment.check()
        # What has a row of its own may transfer as it likes.
        return {self.name: state["step"] + 0}

    def say(self, step, row):
        SAID.append((step, self.name in row, "train/loss" in row))


class Stopped(Apart):
    """As if a signal came when it measures step 3 for the first time."""

    def measure(self, state, moment):
        if moment.step == 3 and 3 not in MEASURED:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().measure(state, moment)


class Careless(Beside):
    """Adds a number of the host's to one of a device."""

    def measure(self, state, moment):
        return {self.name: state["step"] + 1}


def rows_of(workdir: Path, *kinds: type[Evaluator]) -> list[dict]:
    """Trains on one device with evaluators of one's own; the rows without speed."""
    mesh = sharding.make_mesh(CONFIG.parallel, jax.devices()[:1])
    with (
        mock.patch.object(sharding, "make_mesh", return_value=mesh),
        mock.patch.object(evaluators, "EVALUATORS", kinds),
    ):
        train(CONFIG, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run that nobody stopped, and its rows."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, rows_of(workdir, Beside, Apart)


def test_an_evaluator_is_one_class_and_one_row(whole):
    workdir, rows = whole
    assert [(row["step"], "train/loss" in row, "eval/norm" in row, "eval/step" in row) for row in rows] == [
        (1, True, False, False),
        (1, False, False, True),
        (2, True, False, False),
        (3, True, True, False),
        (3, False, False, True),
        (4, True, False, False),
        (5, False, False, True),
        (6, True, True, False),
    ]
    assert [row["eval/step"] for row in rows if "eval/step" in row] == [1, 3, 5]
    assert SAID == [(1, True, False), (3, True, True), (3, True, False), (5, True, False), (6, True, True)]
    # The newest, and what an evaluator calls the best.
    assert Checkpointer(workdir / "checkpoints", read_only=True).all_steps() == [4, 6]


def test_stopped_in_an_evaluation_it_ends_as_if_never_stopped(whole, tmp_path):
    MEASURED.clear()
    with pytest.raises(Interrupted, match="SIGTERM: saved step 3"):
        rows_of(tmp_path, Beside, Stopped)
    assert rows_of(tmp_path, Beside, Stopped) == whole[1]
    assert MEASURED == [1, 3, 3, 5]


@pytest.mark.usefixtures("whole")
def test_nothing_crosses_within_a_step_but_the_batch_and_the_metrics(monkeypatch, tmp_path):
    """A CPU's memory is the host's, so there JAX sees what goes to a device, and lets pass what comes back.

    (Of arrays on several devices JAX 0.12 sees that too.) Of the way back only the setting is tested.
    """
    assert [FORBIDDEN[kind] for kind in DIRECTIONS] == ["disallow"] * 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        rows_of(tmp_path / "careless", Careless)
    # Rows that nobody has put on the devices.
    monkeypatch.setattr(sharding, "put_batch", lambda mesh, rows: rows)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        rows_of(tmp_path / "not_put")

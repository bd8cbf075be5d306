"""Rows are those of the step before, and their speed is that of the steps."""

import json
import time

import numpy as np
import pytest
from helpers import make_config

from sddit_jax.runs.meter import Meter
from sddit_jax.runs.reporting import MetricsLog

CONFIG = make_config(changes={"steps": 100, "batch_size": 4, "log.every": 10})


@pytest.fixture
def meter(tmp_path):
    metrics_log, said = MetricsLog(tmp_path, tensorboard=False), []
    meter = Meter(CONFIG, 0, metrics_log, lambda step, row: said.append((step, row)))
    meter.said = said
    meter.rows = lambda: [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    yield meter
    meter.close()
    metrics_log.close()


def metrics(step: int, skipped: int = 0) -> dict[str, np.ndarray]:
    return {"train/loss": np.float32(step), "train/skipped": np.int32(skipped)}


def test_a_step_is_read_when_the_next_is_there(meter):
    meter.add(1, metrics(1))
    assert not meter.rows()
    for step in range(2, 12):
        meter.add(step, metrics(step))
    assert [row["step"] for row in meter.rows()] == [1, 10]
    meter.add(12, metrics(12), row=True)
    meter.flush()
    meter.flush()
    assert [row["step"] for row in meter.rows()] == [1, 10, 12]
    assert [row["images_seen"] for row in meter.rows()] == [4, 40, 48]
    assert meter.said == [(step, {"train/loss": step, "train/skipped": 0}) for step in (1, 10, 12)]


def test_steps_that_were_skipped_have_rows_and_are_counted(meter):
    for step, skipped in enumerate([0, 0, 1, 2, 0], 1):
        meter.add(step, metrics(step, skipped))
    assert meter.skipped == 2
    meter.flush()
    assert meter.skipped == 0
    assert [row["step"] for row in meter.rows()] == [1, 3, 4]


def test_what_was_not_spent_on_steps_is_left_out(meter, monkeypatch):
    meter.add(1, metrics(1))
    meter.flush()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter.add(2, metrics(2), row=True)
    meter.flush()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    meter.leave_out(4)
    meter.waited += 6
    meter.add(3, metrics(3))
    meter.add(4, metrics(4), row=True)
    meter.flush()
    row = meter.rows()[-1]
    assert row["perf/step_seconds"] == pytest.approx((10 - 4) / 2)
    assert row["perf/data_wait_seconds"] == 6 / 2
    assert row["perf/images_per_second"] == pytest.approx(4 / 3)

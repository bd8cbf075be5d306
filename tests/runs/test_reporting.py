import json
import math
import re
import sys
import types

import hypothesis
import hypothesis.strategies as st
import pytest

from sddit_jax.errors import UserError
from sddit_jax.runs.reporting import MetricsLog, Progress


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, **kwargs):
    log = MetricsLog(workdir, **kwargs)
    for step in steps:
        log.write(step, {"train/loss": step / 3})
    log.close()


@pytest.fixture(autouse=True)
def no_optional_packages(monkeypatch):
    for name in ("tensorboardX", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)


class TestMetricsLog:
    def test_a_row_is_there_as_soon_as_it_is_written(self, tmp_path):
        log = MetricsLog(tmp_path / "new" / "run")
        log.write(1, {"train/loss": 0.1, "images_seen": 256})
        assert rows(tmp_path / "new" / "run") == [{"step": 1, "train/loss": 0.1, "images_seen": 256.0}]

    @hypothesis.settings(deadline=None, max_examples=30)
    @hypothesis.given(value=st.floats())
    def test_floats_come_back_exactly_and_others_as_null(self, tmp_path_factory, value):
        workdir = tmp_path_factory.mktemp("floats")
        log = MetricsLog(workdir)
        log.write(1, {"x": value})
        log.close()
        (row,) = rows(workdir)
        assert row["x"] == (value if math.isfinite(value) else None)

    def test_a_resume_cuts_the_rows_after_the_restored_step(self, tmp_path):
        write(tmp_path, range(1, 8))
        write(tmp_path, range(5, 9), restored_step=4)
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
        write(tmp_path, [1], restored_step=0)
        assert [row["step"] for row in rows(tmp_path)] == [1]

    def test_at_the_restored_step_what_is_measured_again_comes_again_and_the_others_stay(self, tmp_path):
        log = MetricsLog(tmp_path)
        for step in (3, 4):
            for values in ({"train/loss": 1.0}, {"eval/fid": 2.0}, {"eval/probe_cls": 3.0}):
                log.write(step, values)
        log.close()
        before = rows(tmp_path)
        MetricsLog(tmp_path, restored_step=4).close()
        assert rows(tmp_path) == before
        MetricsLog(tmp_path, restored_step=4, repeated=lambda key: key == "eval/fid").close()
        assert rows(tmp_path) == [*before[:4], before[5]]

    @pytest.mark.parametrize("half", ['{"step": 3, "train/l', '{"step": 3}', "\0\0\0\n", "12\n"])
    def test_a_half_written_line_is_dropped(self, tmp_path, half):
        write(tmp_path, [1, 2])
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(half)
        write(tmp_path, [3])
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_only_the_primary_process_writes(self, tmp_path):
        write(tmp_path / "run", [1], primary=False, wandb={"project": "x"})
        assert not (tmp_path / "run").exists()

    def test_wandb_is_an_error_only_if_asked_for(self, tmp_path):
        with pytest.raises(UserError, match="pip install wandb"):
            MetricsLog(tmp_path, wandb={})

    def test_tensorboard_and_wandb_get_the_same_numbers(self, tmp_path, monkeypatch):
        seen = []

        class SummaryWriter:
            def __init__(self, folder, purge_step):
                seen.append(("tensorboard", folder, purge_step))

            def add_scalar(self, key, value, step):
                seen.append((key, value, step))

            def close(self):
                seen.append("closed")

        run = types.SimpleNamespace(
            log=lambda metrics, step: seen.append((metrics, step)),
            finish=lambda: seen.append("finished"),
        )
        board = types.ModuleType("tensorboardX")
        board.SummaryWriter, board.__spec__ = SummaryWriter, object()
        wandb = types.SimpleNamespace(init=lambda **kwargs: seen.append(kwargs) or run)
        monkeypatch.setitem(sys.modules, "tensorboardX", board)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        write(tmp_path, [5], restored_step=4, wandb={"project": "x"})
        value = 5 / 3
        assert seen == [
            ("tensorboard", str(tmp_path), 5),
            {"dir": str(tmp_path), "project": "x"},
            ("train/loss", value, 5),
            ({"train/loss": value}, 5),
            "closed",
            "finished",
        ]


class TestProgress:
    def test_plain_lines_now_and_then_and_at_the_end(self, capfd):
        progress = Progress(total=100, start=90, every_seconds=3600)
        for step in range(91, 101):
            progress.show(step, "loss 1.2500, 512 images/s")
        progress.close()
        first, last = capfd.readouterr().err.splitlines()
        assert re.fullmatch(r"step 91/100, loss 1.2500, 512 images/s, 00:00 left", first)
        assert last.startswith("step 100/100, ")

    def test_a_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        progress = Progress(total=100, start=90)
        progress.show(100, "loss 1.2500, 512 images/s")
        progress.close()
        shown = capsys.readouterr().err
        assert "100/100" in shown
        assert "loss 1.2500, 512 images/s" in shown
        assert "\n" not in shown.removesuffix("\n")

    @pytest.mark.parametrize("terminal", [True, False])
    def test_silent_elsewhere(self, capsys, monkeypatch, terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        progress = Progress(total=2, primary=False)
        progress.show(2, "loss 1.0000, 1 images/s")
        progress.close()
        assert capsys.readouterr().err == ""

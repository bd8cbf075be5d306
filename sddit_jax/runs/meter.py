"""Reads the metrics of each step, and writes rows, speed and the progress bar from them."""

import logging
import time
from collections.abc import Callable, Mapping

import jax

from sddit_jax.config.schema import Config
from sddit_jax.runs.reporting import MetricsLog, Progress

log = logging.getLogger("sddit_jax")


class Meter:
    """Reads the metrics of a step after the next step has been dispatched, so that the devices never wait for the host.

    say(step, row): is called with the metrics of each row that is written, without those of speed. skipped: how many
    steps in a row, up to the last one read, changed no weights. waited: the seconds since the last row that the caller
    spent waiting for data; the caller adds to it.
    """

    def __init__(
        self, config: Config, start: int, metrics_log: MetricsLog, say: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        self._config, self._metrics_log, self._say = config, metrics_log, say
        self._progress = Progress(config.steps, start, primary=jax.process_index() == 0)
        self._pending: tuple[int, Mapping[str, jax.Array], bool] | None = None
        self._last_step, self._last_time = start, time.monotonic()
        self.skipped, self.waited = 0, 0.0

    def add(self, step: int, metrics: Mapping[str, jax.Array], *, row: bool = False) -> None:
        """Takes the metrics of a dispatched step, and reads those of the step before. row: always write its row."""
        self.flush()
        self._pending = step, metrics, row

    def flush(self) -> None:
        """Reads the metrics of the last dispatched step, and writes its row if it is due or the step was skipped.

        Waits for the devices.
        """
        if self._pending is None:
            return
        (step, metrics, row), self._pending = self._pending, None
        config = self._config
        was_skipped, self.skipped = self.skipped, int(jax.device_get(metrics["train/skipped"]))
        due = row or step % config.log.every == 0 or step in (1, config.steps)
        if not (due or self.skipped):
            return
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if self.skipped and not was_skipped:
            log.warning("step %d was skipped: its loss or gradients are not finite", step)
        now, steps = time.monotonic(), step - self._last_step
        seconds = (now - self._last_time) / steps
        perf = {
            "perf/images_per_second": config.batch_size / seconds,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": self.waited / steps,
        }
        self._last_step, self._last_time, self.waited = step, now, 0.0
        self._metrics_log.write(step, values | perf | {"images_seen": step * config.batch_size})
        self._progress.show(step, f"loss {values['train/loss']:.4f}, {config.batch_size / seconds:.4g} images/s")
        self._say(step, values)

    def leave_out(self, seconds: float) -> None:
        """Leaves seconds since the last row, in which no step was computed, out of the speed."""
        self._last_time += seconds

    def close(self) -> None:
        """Ends the progress bar."""
        self._progress.close()

"""What the steps of a run report: rows of metrics, the bar, speed, and how many in a row were skipped."""

import logging
import time
from collections.abc import Callable, Mapping

import jax

from sddit_jax.config.schema import Config
from sddit_jax.runs.reporting import MetricsLog, Progress

log = logging.getLogger("sddit_jax")


class Meter:
    """Reads the metrics of a step when the next one has been dispatched, so that the devices never wait.

    say(step, row): called with the metrics of each row that has been written, without those of speed.

    skipped: how many steps in a row, up to the last that was read, changed no weights. waited: seconds that data was
    waited for; whoever waits adds them.
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
        """Takes the metrics of a step that has been dispatched, and reads those of the step before.

        row: writes a row for this step even if its interval does not ask for one.
        """
        self.flush()
        self._pending = step, metrics, row

    def flush(self) -> None:
        """Reads what has not been read; waits for the devices."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last row that were not spent on steps."""
        self._last_time += seconds

    def close(self) -> None:
        """Ends the bar."""
        self._progress.close()

    def _read(self, step: int, metrics: Mapping[str, jax.Array], row: bool) -> None:
        """Writes a row if it is time for one, or if the step was skipped."""
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
        self._progress.update(step, loss=values["train/loss"], images_per_second=perf["perf/images_per_second"])
        self._say(step, values)

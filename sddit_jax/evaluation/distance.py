"""The distance of samples to a reference during training, and the checkpoint with the lowest distance."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sddit_jax.errors import CheckpointError, ConfigError
from sddit_jax.evaluation.feature_spaces import measure
from sddit_jax.evaluation.metric_table import distance_name, frechet
from sddit_jax.evaluation.protocol import Evaluator, Moment, Run
from sddit_jax.evaluation.reference import open_reference
from sddit_jax.evaluation.spaces import open_space
from sddit_jax.files import read_json, undamaged, write_json
from sddit_jax.generation.drawing import make_generate
from sddit_jax.method.state import State
from sddit_jax.parallel.distributed import decided_by_primary
from sddit_jax.sampling.labels import balanced_labels

log = logging.getLogger("sddit_jax")

BEST = "best.json"
# Images that are decoded, and whose features are computed, at a time. At most so many are sampled at a time.
_BATCH_SIZE = 256
_REMEDY = "; remove it to start comparing anew"


class Distance(Evaluator):
    """Measures the Frechet distance of samples of the EMA weights to a reference, every `eval.every` steps.

    All measurements draw the same noise and labels. WORKDIR/best.json has the step with the lowest distance, all
    distances, and their conditions. A run with other conditions ignores the file's distances. A run that starts from
    step `start` ignores the distances of later steps, and measures them again.

    When made, it raises ConfigError, DataError or WeightsError for a distance that cannot be measured.
    """

    def __init__(self, run: Run, start: int) -> None:
        super().__init__(run, start)
        config = run.config
        self._label_N = balanced_labels(config.eval.num_samples, config.model.num_classes)
        self._space = open_space(config.eval.features, config.eval.inception, run.mesh, _BATCH_SIZE)
        shape = self._shape_of_samples()
        self._reference = open_reference(config.eval.reference, self._space, shape, _BATCH_SIZE, ("fid",))
        self.name = f"eval/{distance_name(self._space)}"
        batch_size = min(config.batch_size, len(self._label_N), _BATCH_SIZE)
        self._generate = make_generate(run.sample, run.mesh, batch_size, run.decode)

        sampling = {k: v for k, v in dataclasses.asdict(config.sampling).items() if k not in ("every", "grid")}
        self._path = run.workdir / BEST
        self._conditions = {
            "num_samples": config.eval.num_samples,
            "seed": config.seed,
            "sampling": sampling,
            "autoencoder": run.decode.weights,
            "features": {k: v for k, v in self._space.record.items() if k != "weights"},
            "reference_sha256": self._reference.record["sha256"],
        }
        found = decided_by_primary(self._read).items()
        self._distances = {int(step): distance for step, distance in found if int(step) <= start}

    @classmethod
    def make(cls, run: Run, start: int) -> Evaluator:
        """A `Distance`, or without eval.every an `EarlierBest`."""
        return cls(run, start) if run.config.eval.every else EarlierBest(run, start)

    @property
    def best(self) -> int | None:
        """The step with the lowest distance, the first of equals; None without a distance."""
        return min(self._distances, key=self._distances.get, default=None)

    def due(self, step: int) -> bool:
        """Every `eval.every` steps."""
        return step % self.run.config.eval.every == 0

    def measure(self, state: State, moment: Moment) -> dict[str, float]:
        """Returns the distance as `self.name`, and the seconds that it took unless best.json has it already.

        `moment.check` is called between batches.
        """
        ema, step = state["ema"]["default"], moment.step
        if step in self._distances:
            return {self.name: self._distances[step]}
        began = time.monotonic()
        sampling_seconds: list[float] = []
        measured = measure(self._space, self._batches(ema, sampling_seconds, moment.check), keep=False)
        name = distance_name(self._space)
        found = frechet(name, measured.moments, self._reference.pool, self._reference.count)
        if not self._distances:
            for words in found.warnings:
                log.warning("%s", words)
        # All processes take the distance of process 0, so that they keep the same checkpoint.
        words_2 = multihost_utils.broadcast_one_to_all(np.array([found.results[name]]).view(np.uint32))
        distance = float(np.asarray(words_2).view(np.float64)[0])
        self._distances[step] = distance
        if jax.process_index() == 0:
            self._write()
        ended = time.monotonic()
        log.info(
            "step %d: %s %.6g of %d samples (%.1f s, of which %.1f s sampling); best: step %d",
            step, self.name, distance, len(self._label_N), ended - began, sum(sampling_seconds), self.best,
        )  # fmt: skip
        return {
            self.name: distance,
            "perf/eval_seconds": ended - began,
            "perf/eval_sampling_seconds": sum(sampling_seconds),
        }

    def _batches(self, ema: Any, seconds: list[float], check: Callable[[], None]) -> Iterator[np.ndarray]:
        """Batches of samples. Appends to `seconds` how long each took."""
        index_N = np.arange(len(self._label_N))
        for start in range(0, len(index_N), _BATCH_SIZE):
            check()
            began = time.monotonic()
            part = slice(start, start + _BATCH_SIZE)
            images_BHWC = self._generate(ema, self.run.config.seed, self._label_N[part], index_N[part])
            seconds.append(time.monotonic() - began)
            yield images_BHWC

    def _shape_of_samples(self) -> tuple[int, int, int, int]:
        config, factor = self.run.config, self.run.codec.get("factor") or 1
        m = config.model
        side, channels = m.image_size * factor, 3 if config.codec.name == "latents" else m.channels
        if channels not in (1, 3):
            raise ConfigError(f"eval.every is {config.eval.every}: images need 1 or 3 channels, and have {channels}")
        return len(self._label_N), side, side, channels

    def _read(self) -> dict[str, float]:
        if not self._path.exists():
            return {}
        with undamaged(self._path, CheckpointError, _REMEDY):
            saved = read_json(self._path, CheckpointError, _REMEDY)
            found, distances = saved["conditions"], {str(int(k)): float(v) for k, v in saved["distances"].items()}
        if found != json.loads(json.dumps(self._conditions)):
            lost = f"checkpoint {min(distances, key=distances.get)}" if distances else "no checkpoint"
            log.warning(
                "%s has distances under other conditions: steps are compared anew, and %s, which had the lowest, is no "
                "longer kept. A later save may remove it; to keep it, stop now and copy it",
                self._path, lost,
            )  # fmt: skip
            return {}
        return distances

    def _write(self) -> None:
        content = {
            "step": self.best,
            "distance": self._distances[self.best],
            "name": self.name,
            "distances": self._distances,
            "conditions": self._conditions,
            "reference": self._reference.record["path"],
        }
        write_json(self._path, content)


class EarlierBest(Evaluator):
    """Measures nothing, and keeps the checkpoint that WORKDIR/best.json names.

    When made, it raises CheckpointError if that file cannot be read.
    """

    name = "distance"
    best: int | None = None

    def __init__(self, run: Run, start: int) -> None:
        super().__init__(run, start)
        path = run.workdir / BEST
        if path.exists():
            with undamaged(path, CheckpointError, _REMEDY):
                self.best = int(read_json(path, CheckpointError, _REMEDY)["step"])

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def measure(self, state: State, moment: Moment) -> dict[str, float]:
        """Nothing."""
        return {}

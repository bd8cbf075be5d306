"""The training loop: the only place that orders effects."""

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sddit_jax.config import border
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.data.image_sources import Source
from sddit_jax.data.loader import make_loader
from sddit_jax.data.sources import open_source
from sddit_jax.errors import CheckpointError, ConfigError, DataError, Diverged, Interrupted
from sddit_jax.evaluation import diagnosis
from sddit_jax.evaluation.distance import Monitor, recorded_best
from sddit_jax.generation.decoding import Decode, load_decode
from sddit_jax.generation.drawing import make_generate
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import Parts, State
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel import cpu, sharding
from sddit_jax.parallel.distributed import stop_requests
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import abstract_state
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import CHECKPOINTS, CONFIG, read_config, restore_run, write_config
from sddit_jax.runs.reporting import MetricsLog, Progress, save_grid
from sddit_jax.sampling.labels import balanced_labels
from sddit_jax.sampling.sampler import make_sample

log = logging.getLogger("sddit_jax")


def train(config: Config, workdir: Path) -> None:
    """Trains until config.steps, from the newest intact checkpoint in workdir if there is one.

    Raises ConfigError, DataError or CheckpointError before the first step; Diverged or Interrupted after saving.
    """
    mesh = sharding.make_mesh(config.parallel)
    sharding.check_batch(mesh, config.batch_size, config.parallel.microbatches)
    sharding.check_width(mesh, config.model.width)
    source = _open_source(config)
    parts = make_parts(config, make_hooks(mesh, config.model))
    codec = (source.codec or {}) | parts.codec.record()
    decode = load_decode(config.codec.autoencoder, codec, mesh)
    _check_identity(workdir, config)

    abstract = abstract_state(parts, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    checkpointer = Checkpointer(
        workdir / CHECKPOINTS, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every
    )
    restored = checkpointer.restore(abstract)
    if restored is not None:
        state, meta = restored
        check_codec(f"the network of {workdir}", meta["codec"], source.name, codec)
    elif config.init_from:
        state = _started_from(Path(config.init_from).expanduser(), config, parts, codec, mesh, layout)
    else:
        init_state = jax.jit(parts.init_state, out_shardings=layout, compiler_options=cpu.init_compiler_options())
        state = init_state(jax.random.key(config.seed))
    start = int(state["step"])
    if start > config.steps:
        raise ConfigError(
            f"{workdir} is at step {start}, past steps {config.steps}; raise steps or use another --workdir"
        )
    monitor = Monitor(config, parts, codec, decode, mesh, workdir, start) if config.eval.every else None
    _print_plan(config, source, mesh, abstract, start)
    primary = jax.process_index() == 0
    wandb_run = {
        "project": config.log.wandb,
        "config": border.to_dict(config),
        "id": hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],
        "resume": "allow",
    }

    def repeated(key: str) -> bool:
        """Whether this run measures again at its start what a row of that step has."""
        if monitor and key == monitor.name:
            return monitor.due(start)
        return key.startswith("eval/") and start == config.steps and config.eval.name != "none"

    with _full_disk_explained(workdir), closing(checkpointer):
        metrics_log = MetricsLog(
            workdir,
            restored_step=start,
            repeated=repeated,
            primary=primary,
            tensorboard=config.log.tensorboard,
            wandb=wandb_run if config.log.wandb else None,
        )
        with closing(metrics_log):
            # From here on a run saves before it stops.
            with stop_requests() as stopped_by:
                # Whoever sees config.json may stop any of the processes.
                multihost_utils.sync_global_devices("the run begins")
                if primary:
                    write_config(workdir, config)
                run = _Run(config, workdir, mesh, parts, source, codec, decode, checkpointer, metrics_log, monitor)
                state = run.steps(state, start, layout, stopped_by)
            run.finish(state)


class _Run:
    """The loop and what it does at its intervals."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        parts: Parts,
        source: Source,
        codec: dict[str, Any],
        decode: Decode,
        checkpointer: Checkpointer,
        metrics_log: MetricsLog,
        monitor: Monitor | None,
    ) -> None:
        self.config, self.workdir, self.mesh, self.parts = config, workdir, mesh, parts
        self.source, self.checkpointer, self.metrics_log = source, checkpointer, metrics_log
        self.meta = {"config": border.to_dict(config), "codec": codec}
        sample = make_sample(parts.network, parts.diffusion, parts.codec, config.sampling)
        self.generate = make_generate(sample, mesh, config.sampling.grid, decode)
        self.monitor = monitor
        # Without evaluation, what an earlier one found best is kept.
        checkpointer.pin(monitor.best if monitor else recorded_best(workdir))
        self.diagnose = None
        if config.log.diagnose_every and diagnosis.discrimination_of(parts):
            everywhere = sharding.replicated(mesh)
            self.diagnose = jax.jit(lambda s, batch: diagnosis.diagnose(parts, s, batch), out_shardings=everywhere)

    def steps(self, state: State, start: int, layout: Any, stopped_by: Callable[[], str]) -> State:
        """Steps start + 1 to config.steps. The device is never waited for: step k's metrics are read during k + 1."""
        config = self.config
        replicated = sharding.replicated(self.mesh)
        train_step = jax.jit(make_train_step(self.parts), donate_argnums=0, out_shardings=(layout, replicated))
        batches = make_loader(
            self.source,
            batch_size=config.batch_size,
            rows=sharding.local_rows(self.mesh, config.batch_size),
            seed=config.seed,
            start_step=start,
            flip=config.data.flip,
            num_threads=1 if config.data.in_memory else config.data.num_threads,
            prefetch=config.data.prefetch,
        )
        meter = _Meter(config, start, self.metrics_log)
        pending: tuple[int, dict[str, Any]] | None = None
        with closing(batches), closing(meter):
            # The row of its distance was cut, and a run that was stopped before has none.
            self._measure(meter, start, state, stopped_by)
            for step in range(start + 1, config.steps + 1):
                began = time.monotonic()
                try:
                    rows = next(batches)
                except DataError:
                    self._save_before_leaving(meter, pending, step - 1, state)
                    raise
                batch = sharding.put_batch(self.mesh, {k: v for k, v in rows.items() if k != "index"})
                meter.waited += time.monotonic() - began
                state, metrics = train_step(state, batch)
                if self.diagnose and (step % config.log.diagnose_every == 0 or step == config.steps):
                    metrics |= self.diagnose(state, batch)
                if pending is not None:
                    self._report(meter, *pending)
                pending = step, metrics
                diverged = meter.skipped >= config.optimizer.max_skipped
                stopped = stopped_by()
                if step % config.checkpoint.every == 0 or step == config.steps or stopped or diverged:
                    # Rows first: a run killed in between would continue after the checkpoint and lack them.
                    self._report(meter, *pending)
                    pending = None
                    self.checkpointer.save(step, state, self.meta)
                if diverged or (step == config.steps and meter.skipped):
                    self.checkpointer.wait()
                    raise self._diverged(step, meter.skipped)
                if stopped:
                    self._leave(stopped, step)
                self._measure(meter, step, state, stopped_by)
                if config.sampling.every and step % config.sampling.every == 0 and step < config.steps:
                    self._sample_grid(state, step)
            self.checkpointer.wait()
        if skipped := int(state["skipped"]):
            raise self._diverged(config.steps, skipped)
        if bad := int(multihost_utils.process_allgather(np.array([len(self.source.bad_files)])).sum()):
            log.warning("%d images could not be read; others were used in their place", bad)
        return state

    def _measure(self, meter: "_Meter", step: int, state: State, stopped_by: Callable[[], str]) -> None:
        """Measures the distance of a step that is due, which is saved: so a request to stop need not wait for it."""
        if self.monitor is None or not self.monitor.due(step):
            return

        def check() -> None:
            if stopped := stopped_by():
                self._leave(stopped, step)

        measured = self.monitor.measure(state["ema"]["default"], step, check)
        self.checkpointer.pin(self.monitor.best)
        self.metrics_log.write(step, measured)
        meter.last_time += measured.get("perf/eval_seconds", 0.0)

    def _leave(self, stopped: str, step: int) -> NoReturn:
        self.checkpointer.wait()
        raise Interrupted(f"{stopped}: saved step {step} in {self.workdir}; the same command continues")

    def _save_before_leaving(
        self, meter: "_Meter", pending: tuple[int, dict[str, Any]] | None, step: int, state: State
    ) -> None:
        """Saves what was done before data that cannot be read. Alone: other processes may not have met it."""
        if jax.process_count() > 1 or not step:
            return
        if pending is not None:
            self._report(meter, *pending)
        self.checkpointer.save(step, state, self.meta)
        self.checkpointer.wait()
        log.warning("step %d is saved in %s", step, self.workdir)

    def finish(self, state: State) -> None:
        """The evaluation that the config asks for, and the last pictures."""
        if self.config.eval.name == "digits":
            results = diagnosis.evaluate_digits(self.config, self.parts, state, self.source, self.generate, self.mesh)
            self.metrics_log.write(self.config.steps, results)
            for line in diagnosis.digits_lines(results):
                log.info("%s", line)
        path = self._sample_grid(state, self.config.steps)
        log.info("%d steps done; samples: %s", self.config.steps, path)
        if self.monitor and self.monitor.best is not None:
            log.info("the lowest %s: checkpoint %d, kept", self.monitor.name, self.monitor.best)

    def _report(self, meter: "_Meter", step: int, metrics: dict[str, jax.Array]) -> None:
        values = meter.report(step, metrics)
        if step > self.config.steps // 10 and (reason := diagnosis.collapse(self.parts, values)):
            log.warning("step %d: the discrimination looks collapsed: %s", step, reason)

    def _diverged(self, step: int, skipped: int) -> Diverged:
        return Diverged(
            f"the loss was not finite in the {skipped} steps up to {step}; they changed no weights, and the state is "
            f"saved. Starting again would end the same: lower optimizer.learning_rate "
            f"({self.config.optimizer.learning_rate}) or set optimizer.clip_norm"
        )

    def _sample_grid(self, state: State, step: int) -> Path:
        """The same noise and labels each time, so that one sees the same images improve."""
        labels = balanced_labels(self.config.sampling.grid, self.config.model.num_classes)
        pictures = self.generate(state["ema"]["default"], self.config.seed, labels)
        path = self.workdir / "samples" / f"{step}.png"
        if jax.process_index() == 0:
            save_grid(pictures, path)
        return path


class _Meter:
    """Rows of metrics at their interval, the bar, speed, and how many steps in a row were skipped."""

    def __init__(self, config: Config, start: int, metrics_log: MetricsLog) -> None:
        self.config, self.metrics_log = config, metrics_log
        self.progress = Progress(config.steps, start, primary=jax.process_index() == 0)
        self.skipped, self.waited = 0, 0.0
        self.last_step, self.last_time = start, time.monotonic()

    def report(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Reads one step's metrics, for a row if it is time for one or the step was skipped; the row, or nothing."""
        was_skipped, self.skipped = self.skipped, int(metrics["train/skipped"])
        measured = any(key.endswith("/information") for key in metrics)
        due = step % self.config.log.every == 0 or step in (1, self.config.steps) or measured
        if not (due or self.skipped):
            return {}
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if self.skipped and not was_skipped:
            log.warning("step %d was skipped: its loss or gradients are not finite", step)
        now, steps = time.monotonic(), step - self.last_step
        seconds = (now - self.last_time) / steps
        perf = {
            "perf/images_per_second": self.config.batch_size / seconds,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": self.waited / steps,
        }
        self.last_step, self.last_time, self.waited = step, now, 0.0
        self.metrics_log.write(step, values | perf | {"images_seen": step * self.config.batch_size})
        self.progress.update(step, loss=values["train/loss"], images_per_second=perf["perf/images_per_second"])
        return values

    def close(self) -> None:
        """Ends the bar."""
        self.progress.close()


@contextmanager
def _full_disk_explained(workdir: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises, wherever the run writes, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise CheckpointError(f"{workdir} could not be written: {error}") from error


def _open_source(config: Config) -> Source:
    m = config.model
    source = open_source(
        config.data.source,
        split=config.data.split,
        image_size=m.image_size,
        channels=m.channels,
        download=config.data.download,
        in_memory=config.data.in_memory,
        verify=config.data.verify,
    )
    if source.codec is not None:
        for key, found in (("mean", source.codec["shift_factor"]), ("scale", source.codec["scaling_factor"])):
            values = getattr(config.codec, key)
            if len(values) == 1 and values != (found,):
                raise ConfigError(
                    f"codec.{key} is {values}, but the autoencoder of {source.name} has ({found},); to scale the "
                    f"channels otherwise on purpose, give a value for each"
                )
    if m.num_classes and source.num_classes != m.num_classes:
        raise ConfigError(
            f"model.num_classes is {m.num_classes}, but {source.name} has {source.num_classes} classes; "
            f"set model.num_classes={source.num_classes}, or 0 to train without labels"
        )
    return source


def _started_from(
    run: Path, config: Config, parts: Parts, codec: dict[str, Any], mesh: jax.sharding.Mesh, layout: Any
) -> State:
    """A state at step 0 with the parameters and the EMA of another run's newest checkpoint.

    What objectives own is taken from there too, where it has the same shapes; otherwise it is fresh.
    """
    theirs, state, meta = restore_run(run, mesh)
    check_codec(f"the network of {run}", meta["codec"], "the data of this run", codec)
    if theirs.model != config.model:
        differences = [line for line in border.identity_differences(theirs, config) if "model." in line]
        if differences:
            raise CheckpointError(f"init_from {run} holds another model: {', '.join(differences)}")
    log.info("starting from the weights of %s at step %d", run, meta["step"])
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))

    def same(a: Any, b: Any) -> bool:
        return jax.tree.structure(a) == jax.tree.structure(b) and all(
            x.shape == y.shape for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    taken = {name: tree for name, tree in state["params"].items() if name in shapes and same(tree, shapes[name])}
    if "network" not in taken:
        raise CheckpointError(f"init_from {run} holds another network; masking.fill must agree too")
    if fresh := shapes.keys() - taken.keys():
        log.info("fresh, since %s has none of these shapes: %s", run, ", ".join(sorted(fresh)))

    def start(key: jax.Array, taken: Any, ema: Any) -> State:
        return parts.state_from(parts.init_params(key) | taken, ema)

    return jax.jit(start, out_shardings=layout)(jax.random.key(config.seed), taken, state["ema"]["default"])


def _check_identity(workdir: Path, config: Config) -> None:
    """Where workdir has a run's config.json, prints what differs, and refuses another model."""
    if not (workdir / CONFIG).exists():
        return
    saved = read_config(workdir)
    differences = border.identity_differences(saved, config)
    if any(line.startswith("model.") for line in differences):
        raise CheckpointError(f"{workdir} holds another model ({', '.join(differences)}); use another --workdir")
    for line in differences:
        log.warning("continuing %s with a changed %s", workdir, line)


def _print_plan(config: Config, source: Source, mesh: jax.sharding.Mesh, abstract: State, start: int) -> None:
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in abstract["params"].items()}
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    m = config.model
    log.info("model: %s parameters (%s)", f"{sum(counts.values()):,}", sizes)
    log.info(
        "data: %s, %s images of %dx%dx%d, %d classes",
        source.name, f"{len(source):,}", m.image_size, m.image_size, m.channels, m.num_classes,
    )  # fmt: skip
    log.info(
        "plan: from step %s to %s, %d images each, on %d %s device(s)",
        f"{start:,}", f"{config.steps:,}", config.batch_size, mesh.size, jax.default_backend(),
    )  # fmt: skip

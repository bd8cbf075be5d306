"""The training loop: the only place that orders effects."""

import dataclasses
import errno
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sddit_jax.config import border
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.data.configured import open_configured
from sddit_jax.data.image_sources import Batch
from sddit_jax.data.loader import make_loader
from sddit_jax.errors import CheckpointError, ConfigError, DataError, Diverged, Interrupted
from sddit_jax.evaluation.evaluators import make_evaluators
from sddit_jax.evaluation.protocol import Evaluator, Moment, Run
from sddit_jax.generation.decoding import load_decode
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import State, by_owner
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel import cpu, sharding
from sddit_jax.parallel.distributed import stop_requests
from sddit_jax.parallel.hooks import attention_kernel, make_hooks
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import CHECKPOINTS, write_config
from sddit_jax.runs.meter import Meter
from sddit_jax.runs.reporting import MetricsLog, save_grid
from sddit_jax.runs.start import check_identity, state_from_run
from sddit_jax.sampling.labels import balanced_labels

log = logging.getLogger("sddit_jax")


def train(config: Config, workdir: Path) -> None:
    """Trains to step config.steps, from the newest intact checkpoint in workdir if there is one.

    Raises ConfigError, DataError or CheckpointError before the first step, and Diverged or Interrupted after saving.
    """
    run = _open_run(config, workdir)
    checkpointer = Checkpointer(
        workdir / CHECKPOINTS, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every
    )
    state = _first_state(run, checkpointer)
    start = int(state["step"])
    if start > config.steps:
        raise ConfigError(f"{workdir} is at step {start}, past steps {config.steps}; raise steps or change --workdir")
    evaluators = make_evaluators(run, start)
    _print_plan(run, state, start)
    with _disk_explained(workdir), closing(checkpointer), closing(_open_log(run, start, evaluators)) as metrics_log:
        # From here on a signal makes the run save before it stops.
        with stop_requests() as stopped_by:
            # All processes catch signals before config.json appears: whoever waits for the file may then send one.
            multihost_utils.sync_global_devices("the run begins")
            if jax.process_index() == 0:
                write_config(workdir, config)
            loop = _Loop(run, start, evaluators, checkpointer, metrics_log, stopped_by)
            state = loop.steps(state)
        loop.finish(state)


@dataclasses.dataclass
class _Loop:
    """Computes the steps, and writes after each of them, in this order: row, checkpoint, evaluations, pictures.

    This order lets a run that ends between two effects, and starts again, leave the same files as one that never ended.
    """

    run: Run
    start: int
    evaluators: Sequence[Evaluator]
    checkpointer: Checkpointer
    metrics_log: MetricsLog
    stopped_by: Callable[[], str]

    def __post_init__(self) -> None:
        self.config = self.run.config
        self.meter = Meter(self.config, self.start, self.metrics_log, self._say)
        kernel = attention_kernel(self.config.model, self.run.mesh.devices.flat[0])
        self.meta = {"config": border.to_dict(self.config), "codec": self.run.codec, "attention": kernel}
        self._pin()

    def steps(self, state: State) -> State:
        """Computes steps start + 1 to config.steps; reads the metrics of step k while the devices compute k + 1."""
        start, last = self.start, self.config.steps
        if start == last and (skipped := int(state["skipped"])):
            raise self._diverged(start, skipped)
        layout = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(self.run.mesh)
        train_step = jax.jit(make_train_step(self.run.parts), donate_argnums=0, out_shardings=layout)
        data = self.config.data
        loader = make_loader(
            self.run.source,
            batch_size=self.config.batch_size,
            rows=sharding.local_rows(self.run.mesh, self.config.batch_size),
            seed=self.config.seed,
            start_step=start,
            flip=data.flip,
            num_threads=1 if data.in_memory else data.num_threads,
            prefetch=data.prefetch,
        )
        with closing(self.meter), closing(loader):
            if start:
                # `_open_log` deleted their rows, and a run that stopped right after its checkpoint has not written any.
                self._evaluate(start, state)
            for step in range(start + 1, last + 1):
                batch = self._next_batch(loader, step, state)
                # An implicit transfer, which would make the devices wait, raises an error.
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                    due = self._due(step, joins_step=True)
                    for evaluator in due:
                        metrics |= evaluator.measure(state, Moment(step, batch=batch))
                    self.meter.add(step, metrics, row=bool(due))
                self._save_if_due(step, state)
                self._evaluate(step, state)
                if self.config.sampling.every and step % self.config.sampling.every == 0 and step < last:
                    self._save_pictures(step, state)
            self.checkpointer.wait()
        bad_files = np.array([len(self.run.source.bad_files)])
        if bad := int(multihost_utils.process_allgather(bad_files).sum()):
            log.warning("%d images could not be read; others were used in their place", bad)
        return state

    def finish(self, state: State) -> None:
        """Draws the last pictures, and names the best checkpoints."""
        path = self._save_pictures(self.config.steps, state)
        log.info("%d steps done; samples: %s", self.config.steps, path)
        for evaluator in self.evaluators:
            if evaluator.best is not None:
                log.info("the lowest %s: checkpoint %d, kept", evaluator.name, evaluator.best)

    def _next_batch(self, loader: Iterator[Batch], step: int, state: State) -> dict[str, jax.Array]:
        """The batch of a step. If its data cannot be read, saves `state`, that of the step before, and raises."""
        began = time.monotonic()
        try:
            rows = next(loader)
        except DataError:
            # Only a run of one process can save: other processes may have read their data and not come.
            if step > 1 and jax.process_count() == 1:
                self._save(step - 1, state)
                self.checkpointer.wait()
                log.warning("step %d is saved in %s", step - 1, self.run.workdir)
            raise
        batch = sharding.put_batch(self.run.mesh, {name: x for name, x in rows.items() if name != "index"})
        self.meter.waited += time.monotonic() - began
        return batch

    def _save_if_due(self, step: int, state: State) -> None:
        """Saves at the interval, at the end, after a signal, and when the run has diverged."""
        last = step == self.config.steps
        diverged = self.meter.skipped >= self.config.optimizer.max_skipped
        stopped = self.stopped_by()
        if step % self.config.checkpoint.every == 0 or last or stopped or diverged:
            self._save(step, state)
        if diverged or (last and self.meter.skipped):
            self.checkpointer.wait()
            raise self._diverged(step, self.meter.skipped)
        if stopped:
            self._leave(stopped, step, state)

    def _save(self, step: int, state: State) -> None:
        # Rows first: a run that is killed in between continues after the checkpoint, and would lack them.
        self.meter.flush()
        self.checkpointer.save(step, state, self.meta)

    def _leave(self, stopped: str, step: int, state: State) -> NoReturn:
        self._save(step, state)
        self.checkpointer.wait()
        raise Interrupted(f"{stopped}: saved step {step} in {self.run.workdir}; the same command continues")

    def _due(self, step: int, joins_step: bool) -> list[Evaluator]:
        return [e for e in self.evaluators if e.joins_step == joins_step and e.due(step)]

    def _evaluate(self, step: int, state: State) -> None:
        """Writes the rows of evaluators that have their own. A signal ends the measurement and saves the step."""

        def check() -> None:
            if stopped := self.stopped_by():
                self._leave(stopped, step, state)

        for evaluator in self._due(step, joins_step=False):
            # So that the time of the measurement has no step in it.
            self.meter.flush()
            jax.block_until_ready(state)
            began = time.monotonic()
            row = evaluator.measure(state, Moment(step, check))
            self._pin()
            self.metrics_log.write(step, row)
            evaluator.say(step, row)
            self.meter.leave_out(time.monotonic() - began)

    def _pin(self) -> None:
        self.checkpointer.pin(*(evaluator.best for evaluator in self.evaluators))

    def _say(self, step: int, row: Mapping[str, float]) -> None:
        for evaluator in self._due(step, joins_step=True):
            evaluator.say(step, row)

    def _diverged(self, step: int, skipped: int) -> Diverged:
        return Diverged(
            f"the loss was not finite in the {skipped} steps up to {step}; they changed no weights, and the state is "
            f"saved. Starting again would end the same: lower optimizer.learning_rate "
            f"({self.config.optimizer.learning_rate}) or set optimizer.clip_norm"
        )

    def _save_pictures(self, step: int, state: State) -> Path:
        """Writes a grid of samples, with the same noise and labels at each step, and returns its path."""
        labels = balanced_labels(self.config.sampling.grid, self.config.model.num_classes)
        pictures = self.run.generate(state["ema"]["default"], self.config.seed, labels)
        path = self.run.workdir / "samples" / f"{step}.png"
        if jax.process_index() == 0:
            save_grid(pictures, path)
        return path


def _open_run(config: Config, workdir: Path) -> Run:
    """Opens the parts of a run, and checks that they fit each other and the run in workdir."""
    mesh = sharding.make_mesh(config.parallel)
    sharding.check_batch(mesh, config.batch_size, config.parallel.microbatches)
    sharding.check_width(mesh, config.model.width)
    source = open_configured(config)
    parts = make_parts(config, make_hooks(mesh, config.model))
    codec = (source.codec or {}) | parts.codec.record()
    decode = load_decode(config.codec.autoencoder, codec, mesh)
    check_identity(workdir, config)
    return Run(config, workdir, mesh, parts, source, codec, decode)


def _first_state(run: Run, checkpointer: Checkpointer) -> State:
    """The state of the newest intact checkpoint; else from the weights of init_from; else fresh."""
    config, parts = run.config, run.parts
    abstract = sharding.abstract_state(parts, run.mesh)
    if (restored := checkpointer.restore(abstract)) is not None:
        state, meta = restored
        check_codec(f"the network of {run.workdir}", meta["codec"], run.source.name, run.codec)
        return state
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if config.init_from:
        return state_from_run(Path(config.init_from).expanduser(), config, parts, run.codec, run.mesh, layout)
    init_state = jax.jit(parts.init_state, out_shardings=layout, compiler_options=cpu.init_compiler_options())
    return init_state(jax.random.key(config.seed))


def _open_log(run: Run, start: int, evaluators: Sequence[Evaluator]) -> MetricsLog:
    """Opens the metrics log, without rows after the start and rows that the evaluators will write again."""
    config = run.config
    repeated = {e.name for e in evaluators if start and not e.joins_step and e.due(start)}
    wandb_run = {
        "project": config.log.wandb,
        "config": border.to_dict(config),
        "id": hashlib.sha256(str(run.workdir.absolute()).encode()).hexdigest()[:16],
        "resume": "allow",
    }
    return MetricsLog(
        run.workdir,
        restored_step=start,
        repeated=repeated.__contains__,
        primary=jax.process_index() == 0,
        tensorboard=config.log.tensorboard,
        wandb=wandb_run if config.log.wandb else None,
    )


@contextmanager
def _disk_explained(workdir: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise CheckpointError(f"{workdir} could not be written: {error}") from error


def _print_plan(run: Run, state: State, start: int) -> None:
    trees = by_owner(state["params"])
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in trees.items()}
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    config, m = run.config, run.config.model
    shape, devices = f"{m.image_size}x{m.image_size}x{m.channels}", f"{run.mesh.size} {jax.default_backend()} device(s)"
    log.info(f"model: {sum(counts.values()):,} parameters ({sizes})")
    log.info(f"data: {run.source.name}, {len(run.source):,} images of {shape}, {m.num_classes} classes")
    log.info(f"plan: from step {start:,} to {config.steps:,}, {config.batch_size} images each, on {devices}")

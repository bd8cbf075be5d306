"""Checkpoints: atomic, asynchronous, of any sharding, and never believed before they are verified.

A step is a folder with three items: `ema` (all that sampling needs), `train` (the rest of the
state) and `meta` (JSON: the caller's record, shape and digest of every leaf, versions). Orbax
writes and commits it, but restores flipped bits without a word, so there are two checks of our own.
A manifest covers the files (`sha256sum -c MANIFEST.sha256` reads it), and one process checks it for
all before Orbax touches them: an error in one process only would leave the others in a barrier. The
digests cover the values, from the devices that saved them to the devices they are restored to.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sddit_jax.errors import CheckpointError
from sddit_jax.files import sha256_of, write_whole
from sddit_jax.parallel.sharding import path_name
from sddit_jax.runs.formats import FORMAT_VERSION, READABLE, as_format_2, from_format_2, path_from_format_2
from sddit_jax.runs.versions import changed_versions, versions

log = logging.getLogger("sddit_jax")

MANIFEST = "MANIFEST.sha256"
# What a record has of each leaf, by its path.
_BY_PATH = ("shapes", "digests")
# Orbax writes these two while it commits, when the manifest is already written.
_COMMIT_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def digest(tree: Any) -> dict[str, str]:
    """The path of each leaf, and 64 bits in hexadecimal that do not depend on the leaf's layout.

    The elements as unsigned integers u_i give two sums over i of mix(u_i ^ key_i) modulo 2^32, with
    pseudo-random keys that depend on the flat index i. Integer sums are exact in any order, so
    every sharding gives the same value, and each device only reads its own part. `mix` is a
    bijection: a change within one element, such as a flipped bit, changes its term and therefore
    the sum for certain; others, such as exchanged elements, escape with a chance of about 2^-64.
    (Odd weights, a sum of u_i * w_i, would see one flipped bit too, but never two flipped signs:
    each adds 2^31, whatever its weight.) Shape and dtype are not covered.
    """
    # One call for each leaf: leaves may be on different devices, and many share a shape.
    sums = {}
    for path, leaf in _leaves(tree).items():
        sums[path] = _sums(leaf)
        if jax.default_backend() == "cpu":
            # Simulated devices on few cores can lock each other out when many of their collectives are in flight.
            jax.block_until_ready(sums[path])
    sums = jax.device_get(sums)
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in sums.items()}


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # Elements of 8 bytes become two words along a new last axis.
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = words.astype(jnp.uint32)
    # The index is built in the shape of the leaf: reshaping a flat one could gather the leaf.
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    keys = _mix(index + jnp.uint32(0x9E3779B9)), _mix(index + jnp.uint32(0x7F4A7C15))
    # Scalars, not an array of two: they are replicated for certain, so every process can read them.
    return tuple(jnp.sum(_mix(words ^ key), dtype=jnp.uint32) for key in keys)


def _mix(u: jax.Array) -> jax.Array:
    """A bijection of the 32-bit integers that spreads every bit over all (murmur3's finaliser)."""
    u = (u ^ (u >> 16)) * jnp.uint32(0x85EBCA6B)
    u = (u ^ (u >> 13)) * jnp.uint32(0xC2B2AE35)
    return u ^ (u >> 16)


class _DamagedError(CheckpointError):
    """A checkpoint that is not what was saved."""


class Checkpointer:
    """The checkpoints of one run. All processes make the same calls.

    Kept are the newest `keep_last`, the steps that are multiples of `keep_every` (0: none), and those of `pin`.
    Opening one removes what unfinished saves have left: anything that looks at the directory while
    the run may be writing to it passes `read_only`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        self.directory = epath.Path(directory).absolute()
        self._read_only = read_only
        self._pinned: set[int | None] = set()
        keep = [ocp.checkpoint_managers.LatestN(keep_last), _Pinned(lambda: self._pinned)]
        if keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            # Otherwise the metadata of every step is read here, and a damaged one raises.
            lightweight_initialize=True,
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
            # Called on process 0 when all files are there, before the step is committed.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._saving: int | None = None
        self._threads: set[threading.Thread] = set()
        with self._writing():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, in order, the one that is being written included."""
        return sorted(self._manager.all_steps())

    def pin(self, *steps: int | None) -> None:
        """Keeps the checkpoints of `steps`, which may be saved after this, and no longer those of an earlier call.

        What is kept is decided when a step is saved. None stands for no step.
        """
        self._pinned = set(steps)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to save `state` with the record `meta`; the state may be donated on return.

        Waits for the save before this one, and raises if that failed. A step that has a checkpoint
        is not saved again.
        """
        self.wait()
        if step in self.all_steps():
            return
        record = {
            **meta,
            "format_version": FORMAT_VERSION,
            "step": step,
            "shapes": _shapes(state),
            "digests": digest(state),
            "versions": versions(),
        }
        args = {item: ocp.args.StandardSave(tree) for item, tree in _items(state).items()}
        # Through JSON and back: it is written in the background, and the caller may change `meta`.
        args["meta"] = ocp.args.JsonSave(json.loads(json.dumps(record)))
        before = set(threading.enumerate())
        with self._writing():
            self._saving = step
            try:
                self._manager.save(step, args=ocp.args.Composite(**args), force=True)
            finally:
                self._threads = set(threading.enumerate()) - before

    def wait(self) -> None:
        """Waits until the last save is on disk, and raises if it failed."""
        with self._writing():
            try:
                self._manager.wait_until_finished()
                if self._saving is not None:
                    self._threads = set()
                    if jax.process_index() == 0:
                        _complete_manifest(self.directory / str(self._saving))
            finally:
                self._saving = None

    def close(self) -> None:
        """Waits like `wait`, and ends the threads: nothing is written afterwards, after a failure too."""
        try:
            self.wait()
        finally:
            self._manager.close()
            # Orbax gives up at the first of its threads that fails, while the others go on writing, and it has no
            # function that waits for them: the threads that a save has started are found by comparison.
            deadline = time.monotonic() + 60
            while self._threads & set(threading.enumerate()) and time.monotonic() < deadline:
                time.sleep(0.01)

    def restore(self, abstract_state: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict] | None:
        """The newest intact checkpoint, or that of `step`, laid out as `abstract_state` says, and its record.

        None if there is no checkpoint. A damaged one is named in a warning and passed over; when an
        older one has been restored, it is renamed to STEP.damaged. CheckpointError, and nothing is
        renamed, if all are damaged or if the newest intact one is of another model. Nothing is
        renamed under `read_only` either. Versions that are not those of the record are named in a
        warning, since the run goes on with them; nothing goes on under `read_only`.
        """
        self.wait()
        steps = [s for s in self.all_steps() if step in (None, s)]
        if not steps:
            return None
        used, state, meta = self._newest(steps, abstract_state)
        if not self._read_only:
            self._move_aside([step for step in steps if step > used])
            if changed := changed_versions(meta["versions"]):
                log.warning("%s was saved with %s: rounding may differ from here on", self._path(used), changed)
        return state, meta

    def restore_ema(self, abstract: Any = None, step: int | None = None) -> tuple[Any, dict]:
        """The `ema` of the newest intact checkpoint, or of `step`, and the record.

        Reads nothing of `train`, which may be gone, and changes nothing. Without `abstract`, every
        leaf is replicated over all devices. CheckpointError if there is no intact checkpoint.
        """
        self.wait()
        steps = [s for s in self.all_steps() if step in (None, s)]
        if not steps:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.directory}: {what}; there are {self.all_steps()}")
        _, state, meta = self._newest(steps, {"ema": abstract})
        return state["ema"], meta

    def read_meta(self, step: int) -> dict:
        """The record of a step: what `save` got, and format_version, shapes, digests, versions."""
        self._check_files(step, {"meta"})
        item = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=item).meta
        if meta["format_version"] not in READABLE:
            found, readable = meta["format_version"], " and ".join(map(str, READABLE))
            raise CheckpointError(
                f"{self._path(step)} has format {found}, but this version of sddit_jax reads {readable}: read it "
                f"with the version that wrote it ({meta.get('versions', {}).get('sddit-jax', 'unknown')})"
            )
        return meta

    def _newest(self, steps: list[int], abstract: Mapping[str, Any]) -> tuple[int, dict, dict]:
        faults = []
        for step in reversed(steps):
            try:
                return step, *self._restore(step, abstract)
            except _DamagedError as fault:
                log.warning("passing over a damaged checkpoint: %s", fault)
                faults.append(str(fault))
        raise CheckpointError(f"no checkpoint in {self.directory} is intact: {'; '.join(faults)}")

    def _restore(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict, dict]:
        items = set(_items(abstract))
        self._check_files(step, items)
        meta = self.read_meta(step)
        shapes, digests = ({path: x for path, x in meta[key].items() if _item(path) in items} for key in _BY_PATH)
        stored = _as_stored(abstract, shapes, meta["format_version"])
        if other := _difference(shapes, _shapes(stored)):
            raise CheckpointError(
                f"{self._path(step)} is of another model: {other}; configs/finetune.py starts from its weights"
            )
        args = {item: ocp.args.StandardRestore(tree) for item, tree in _items(stored).items()}
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        state = {**restored.get("train", {}), "ema": restored["ema"]}
        state = jax.tree.unflatten(jax.tree.structure(stored), jax.tree.leaves(state))
        if changed := _difference(digests, digest(state)):
            raise _DamagedError(f"{self._path(step)}: {changed}")
        if meta["format_version"] == 2:
            state = from_format_2(state, abstract)
            moved = {key: {path_from_format_2(path): x for path, x in meta[key].items()} for key in _BY_PATH}
            meta = {**meta, **moved}
        return state, meta

    def _check_files(self, step: int, items: set[str]) -> None:
        fault = _fault(self._path(step), items) if jax.process_index() == 0 else ""
        if multihost_utils.broadcast_one_to_all(np.int32(fault != "")):
            raise _DamagedError(f"{self._path(step)}: {fault or 'process 0 tells why'}")

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        with self._writing():
            for step in steps if jax.process_index() == 0 else []:
                aside = self.directory / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                self._path(step).rename(aside)
            multihost_utils.sync_global_devices("damaged checkpoints are moved aside")
            self._manager.reload()

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _write_manifest(self) -> None:
        # A file system with an atomic rename has a temporary folder until the commit, others don't.
        temporary = list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        folder = temporary[0] if temporary else self._path(self._saving)
        names = _files(folder) - _COMMIT_FILES
        write_whole(folder / MANIFEST, _lines(_hashes(folder, names)).encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            # Of another process, not of the disk.
            raise
        except Exception as error:
            # Full disks come as OSError or as ValueError, from a background thread or from a call.
            raise CheckpointError(f"{self.directory} could not be written: {error}") from error


class _Pinned(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a function returns."""

    def __init__(self, pinned: Callable[[], set[int | None]]) -> None:
        self._pinned = pinned

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints to keep."""
        del context
        return [checkpoint.step in self._pinned() for checkpoint in checkpoints]


def _items(state: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a state; a state of `ema` alone has no `train`.

    Dicts without a leaf, such as the state of an objective that has none, are not saved: a run may go on with more
    or fewer of them.
    """

    def with_leaves(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {key: with_leaves(child) for key, child in tree.items() if jax.tree.leaves(child)}

    train = with_leaves({key: tree for key, tree in state.items() if key != "ema"})
    return {"ema": state["ema"], "train": train} if train else {"ema": state["ema"]}


def _as_stored(abstract: Mapping[str, Any], shapes: Mapping[str, str], format_version: int) -> Mapping[str, Any]:
    """An abstract state as a checkpoint of a format lays it out; without an `ema`, all of its leaves, replicated."""
    if abstract["ema"] is None:
        return {**abstract, **_replicated(shapes)}
    if format_version != 2:
        return abstract
    ema = _replicated({path: shape for path, shape in shapes.items() if path.startswith("ema/default/head/")})
    return as_format_2(abstract, ema["ema"]["default"]["head"] if ema else {})


def _item(path: str) -> str:
    return "ema" if path.startswith("ema/") else "train"


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, str]:
    return {path: f"{x.dtype.name}[{','.join(map(str, x.shape))}]" for path, x in _leaves(tree).items()}


def _replicated(shapes: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `_shapes` for nested dicts, each leaf replicated over all devices."""
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    leaves = {}
    for path, shape in shapes.items():
        dtype, _, sizes = shape.removesuffix("]").partition("[")
        sizes = tuple(int(n) for n in sizes.split(",") if n)
        leaves[tuple(path.split("/"))] = jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
    return flax.traverse_util.unflatten_dict(leaves)


def _difference(saved: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first three leaves that differ, in words; "" if none does."""
    paths = [path for path in {**saved, **found} if saved.get(path) != found.get(path)]
    words = [f"{p} was saved as {saved.get(p)}, here it is {found.get(p)}" for p in paths[:3]]
    return ", ".join([*words, f"and {len(paths) - 3} more leaves"] if len(paths) > 3 else words)


def _files(folder: epath.Path) -> set[str]:
    """The files under a folder, but for the manifest and hidden ones (.nfs*, .DS_Store)."""
    files = {root / name for root, _, names in folder.walk() for name in names if name[0] != "."}
    return {str(file.relative_to(folder)) for file in files} - {MANIFEST}


def _hashes(folder: epath.Path, names: set[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: sha256_of(folder / name), sorted(names))
        return dict(zip(sorted(names), hashes, strict=True))


def _lines(hashes: Mapping[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in hashes.items())


def _complete_manifest(folder: epath.Path) -> None:
    """Adds the files of the commit; a process killed before that leaves a manifest without them."""
    text = (folder / MANIFEST).read_text() + _lines(_hashes(folder, _COMMIT_FILES))
    write_whole(folder / MANIFEST, text.encode())


def _fault(folder: epath.Path, items: set[str]) -> str:
    """The first file of the items, or beside them, that is not as it was saved; "" if all are."""
    try:
        text = (folder / MANIFEST).read_text().removesuffix("\n")
        listed = {name: value for value, name in (line.split("  ", 1) for line in text.split("\n"))}
        present = _files(folder)
        names = {n for n in listed.keys() | present if "/" not in n or n.split("/")[0] in items}
        for name in sorted(names):
            if name not in present:
                return f"{name}, named in {MANIFEST}, is missing"
            if name not in listed and name not in _COMMIT_FILES:
                return f"{name} is not in {MANIFEST}"
        for name, value in _hashes(folder, names & listed.keys()).items():
            if value != listed[name]:
                return f"{name} is not as {MANIFEST} has it"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} or a file it names cannot be read: {error}"
    return ""

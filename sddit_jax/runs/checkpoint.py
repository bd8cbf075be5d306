"""Checkpoints that are written whole, in the background, and verified before they are used.

A step is a folder with three items: `ema` (all that sampling needs), `train` (the rest of the state) and `meta` (JSON:
the caller's record, the shape and the digest of every leaf, and versions). Orbax writes it, but restores damaged bytes
without an error. Two checks find them. A manifest, which `sha256sum -c MANIFEST.sha256` reads, covers the files;
process 0 checks it for all processes before Orbax opens a file, since an error of one process would leave the others in
a barrier. The digests cover the values on their way from the devices that saved them to the devices that restore them.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
# The entries of a record that have a value for each leaf, by its path.
_BY_PATH = ("shapes", "digests")
# Orbax writes these files while it commits a step, after the manifest.
_COMMIT_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def digest(tree: Any) -> dict[str, str]:
    """The digest of each leaf of a tree of arrays: {path: 16 hexadecimal digits}; dtype and shape are not covered.

    The elements as unsigned integers u_i give two sums over i of mix(u_i ^ key_i) modulo 2^32, with pseudo-random keys
    that depend on the flat index i. Integer sums are exact in any order, so that the digest does not depend on the
    sharding and each device reads only its own part. `mix` is a bijection, so a change within one element, such as a
    flipped bit, always changes the sum. Other changes, such as exchanged elements, keep it with probability 2^-64.
    """
    # One call for each leaf: they may lie on different devices, and leaves of one shape share a program.
    sums = {}
    for path, leaf in _leaves(tree).items():
        sums[path] = _sums(leaf)
        if jax.default_backend() == "cpu":
            # With many collectives in flight, simulated devices on few cores can deadlock.
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
    # The flat index is built in the shape of the leaf: a reshape could gather the leaf.
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    keys = _mix(index + jnp.uint32(0x9E3779B9)), _mix(index + jnp.uint32(0x7F4A7C15))
    # Two scalars, not one array: XLA replicates scalars, so every process can read them.
    return tuple(jnp.sum(_mix(words ^ key), dtype=jnp.uint32) for key in keys)


def _mix(u: jax.Array) -> jax.Array:
    """A bijection of the 32-bit integers in which each bit affects all bits (MurmurHash3's finaliser)."""
    u = (u ^ (u >> 16)) * jnp.uint32(0x85EBCA6B)
    u = (u ^ (u >> 13)) * jnp.uint32(0xC2B2AE35)
    return u ^ (u >> 16)


class _DamagedError(CheckpointError):
    """A checkpoint that differs from what was saved."""


class Checkpointer:
    """The checkpoints of one run. All processes make the same calls; CheckpointError if the disk refuses a write.

    It keeps the newest `keep_last` steps, the multiples of `keep_every` (0: none), and the steps of `pin`. Opening it
    deletes unfinished saves, so code that reads the folder of a run that may be training passes `read_only`.

        checkpointer = Checkpointer(workdir / "checkpoints")
        checkpointer.save(step, state, meta)
        state, meta = checkpointer.restore(abstract_state)
        checkpointer.close()
    """

    def __init__(
        self, directory: epath.PathLike, *, keep_last: int = 2, keep_every: int = 0, read_only: bool = False
    ) -> None:
        self.directory = epath.Path(directory).absolute()
        self._read_only = read_only
        self._pinned = _Pinned()
        keep = [ocp.checkpoint_managers.LatestN(keep_last), self._pinned]
        if keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            # Without this Orbax reads the metadata of every step here, and raises for a damaged one.
            lightweight_initialize=True,
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
            # Orbax calls it on process 0 when all files of a step are written, before it commits the step.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._saving: int | None = None
        self._threads: set[threading.Thread] = set()
        with self._writing():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order, with the one that is being written."""
        return sorted(self._manager.all_steps())

    def pin(self, *steps: int | None) -> None:
        """Keeps the checkpoints of `steps`, and no longer those of an earlier call, from the next save on."""
        self._pinned.steps = steps

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to save `state` and the JSON value `meta`. On return the caller may donate the state.

        First waits for the save before, and raises if that failed. Does nothing if the step has a checkpoint.
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
        # A copy, since Orbax writes it in the background and the caller may change `meta`.
        args["meta"] = ocp.args.JsonSave(json.loads(json.dumps(record)))
        before = set(threading.enumerate())
        with self._writing():
            self._saving = step
            try:
                self._manager.save(step, args=ocp.args.Composite(**args), force=True)
            finally:
                self._threads = set(threading.enumerate()) - before

    def wait(self) -> None:
        """Waits until the last save is on the disk; raises if it failed."""
        with self._writing():
            try:
                self._manager.wait_until_finished()
                if self._saving is not None:
                    self._threads = set()
                    if jax.process_index() == 0:
                        # A process that is killed before this leaves a manifest without the files of the commit.
                        manifest = self._path(self._saving) / MANIFEST
                        lines = _lines(_hashes(manifest.parent, _COMMIT_FILES))
                        write_whole(manifest, (manifest.read_text() + lines).encode())
            finally:
                self._saving = None

    def close(self) -> None:
        """Waits as `wait` does, then ends Orbax's threads: after this, and after a failure, nothing is written."""
        try:
            self.wait()
        finally:
            self._manager.close()
            # If one of its threads fails, Orbax returns while the others still write, and it has no function that waits
            # for them. `save` has noted which threads started.
            deadline = time.monotonic() + 60
            while self._threads & set(threading.enumerate()) and time.monotonic() < deadline:
                time.sleep(0.01)

    def restore(self, abstract_state: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict] | None:
        """The newest intact checkpoint, or that of `step`: the state, and its record; None if there is none.

        abstract_state: a tree of `jax.ShapeDtypeStruct`s with shardings. A damaged checkpoint is named in a warning; if
        an older one is intact, that is restored, and the damaged one is renamed to STEP.damaged. A warning names
        versions of packages that differ from the record's. With `read_only` nothing is renamed or said of versions.

        Raises CheckpointError if all are damaged, or if the newest intact one is of another model.
        """
        found = self._newest(step, abstract_state)
        if found is None:
            return None
        used, state, meta = found
        if not self._read_only:
            if damaged := [s for s in self.all_steps() if step is None and s > used]:
                self._move_aside(damaged)
            if changed := changed_versions(meta["versions"]):
                log.warning("%s was saved with %s: rounding may differ from here on", self._path(used), changed)
        return state, meta

    def restore_ema(self, abstract: Any = None, step: int | None = None) -> tuple[Any, dict]:
        """The item `ema` of the newest intact checkpoint, or of that of `step`, and its record. Changes no file.

        Reads no file of `train`, which may be deleted. abstract: as for `restore`; None replicates every leaf over all
        devices. Raises CheckpointError if there is no intact checkpoint.
        """
        found = self._newest(step, {"ema": abstract})
        if found is None:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.directory}: {what}; there are {self.all_steps()}")
        _, state, meta = found
        return state["ema"], meta

    def read_meta(self, step: int) -> dict:
        """The record of a step: the `meta` of `save`, and step, format_version, shapes, digests and versions."""
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

    def _newest(self, step: int | None, abstract: Mapping[str, Any]) -> tuple[int, dict, dict] | None:
        """Step, state and record of the newest intact checkpoint, or of that of `step`; None if there is none."""
        self.wait()
        faults = []
        for each in reversed([s for s in self.all_steps() if step in (None, s)]):
            try:
                return each, *self._restore(each, abstract)
            except _DamagedError as fault:
                log.warning("passing over a damaged checkpoint: %s", fault)
                faults.append(str(fault))
        if faults:
            raise CheckpointError(f"no checkpoint in {self.directory} is intact: {'; '.join(faults)}")
        return None

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
        # On a file system with an atomic rename Orbax writes to a temporary folder until the commit.
        temporary = list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        folder = temporary[0] if temporary else self._path(self._saving)
        names = _files(folder) - _COMMIT_FILES
        write_whole(folder / MANIFEST, _lines(_hashes(folder, names)).encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            # It is about another process, not about the disk.
            raise
        except Exception as error:
            # A full disk raises OSError or ValueError, in a background thread or in a call.
            raise CheckpointError(f"{self.directory} could not be written: {error}") from error


class _Pinned(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints of `steps`."""

    steps: Sequence[int | None] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of the checkpoints."""
        del context
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


def _items(state: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a state; without `train` if it has only `ema`.

    Leaves out dicts without a leaf, such as the state of an objective that has none, so that a run may continue with
    more or fewer such objectives.
    """

    def with_leaves(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {key: with_leaves(child) for key, child in tree.items() if jax.tree.leaves(child)}

    train = with_leaves({key: tree for key, tree in state.items() if key != "ema"})
    return {"ema": state["ema"], "train": train} if train else {"ema": state["ema"]}


def _as_stored(abstract: Mapping[str, Any], shapes: Mapping[str, str], format_version: int) -> Mapping[str, Any]:
    """An abstract state in the layout of `format_version`; if its `ema` is None, the saved leaves, replicated."""
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
    """The abstract nested dict that `_shapes` describes, with each leaf replicated over all devices."""
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    leaves = {}
    for path, shape in shapes.items():
        dtype, _, sizes = shape.removesuffix("]").partition("[")
        sizes = tuple(int(n) for n in sizes.split(",") if n)
        leaves[tuple(path.split("/"))] = jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
    return flax.traverse_util.unflatten_dict(leaves)


def _difference(saved: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Names the first three leaves that differ; "" if none differs."""
    paths = [path for path in {**saved, **found} if saved.get(path) != found.get(path)]
    words = [f"{p} was saved as {saved.get(p)}, here it is {found.get(p)}" for p in paths[:3]]
    return ", ".join([*words, f"and {len(paths) - 3} more leaves"] if len(paths) > 3 else words)


def _files(folder: epath.Path) -> set[str]:
    """The paths of the files under a folder, without the manifest and hidden files (.nfs*, .DS_Store)."""
    files = {root / name for root, _, names in folder.walk() for name in names if name[0] != "."}
    return {str(file.relative_to(folder)) for file in files} - {MANIFEST}


def _hashes(folder: epath.Path, names: set[str]) -> dict[str, str]:
    paths = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(lambda path: sha256_of(folder / path), paths), strict=True))


def _lines(hashes: Mapping[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in hashes.items())


def _fault(folder: epath.Path, items: set[str]) -> str:
    """Names the first damaged file in the folders of `items` or beside them; "" if all are as they were saved."""
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

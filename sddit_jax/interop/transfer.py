"""Exports the weights of a run to a file for PyTorch, and imports such a file as a new run."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from sddit_jax.config import border
from sddit_jax.config.parts import make_network, make_parts
from sddit_jax.config.schema import Config, ParallelConfig
from sddit_jax.errors import CheckpointError, ConfigError, UserError, WeightsError
from sddit_jax.files import explained, json_object, sha256_of, whole
from sddit_jax.interop.layouts import DIT, MASKDIT, OWN, Layout, few, fit, homeless, shapes_of
from sddit_jax.interop.state_dict import from_state_dict, places, to_state_dict
from sddit_jax.method.state import State
from sddit_jax.models.transformer import Network
from sddit_jax.parallel import sharding
from sddit_jax.parallel.sharding import abstract_state
from sddit_jax.runs.checkpoint import Checkpointer
from sddit_jax.runs.folder import CHECKPOINTS, open_checkpoints, restore_run, write_config
from sddit_jax.weights.files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, import_torch, open_checkpoint

log = logging.getLogger("sddit_jax")


def export(layout: Layout, workdir: Path, output: Path, weights: str | None, step: int | None = None) -> None:
    """Writes the weights of a run's checkpoint to the file `output`, whole or not at all.

    `OWN` is a safetensors file with one set of weights, and the configuration in its metadata. `DIT` and `MASKDIT` are
    files of torch.save: one set of weights, as DiT publishes it, or a dict of "model" (the trained parameters) and
    "ema".

    weights: "ema", "params" (as trained) or "both"; None: "both" for MaskDiT and "ema" for the others. step: of the
    checkpoint; None: the newest that is intact.

    Raises:
      UserError: the file's name or `weights` is wrong for the layout, or the file cannot be written.
      WeightsError: the layout cannot hold this network.
      CheckpointError: the run has no such checkpoint.
    """
    weights = weights or ("both" if layout is MASKDIT else "ema")
    suffixes = (SAFETENSORS_SUFFIX,) if layout is OWN else TORCH_SUFFIXES
    if output.suffix not in suffixes:
        raise UserError(f"--output={output} should end in {' or '.join(suffixes)}")
    if layout is OWN and weights == "both":
        raise UserError("--weights=both: a safetensors file holds one set of weights; choose ema or params")
    config, trees, meta = _read_weights(workdir, weights, step)
    if layout is DIT and config.model.num_classes and config.model.null_label == "zero":
        config, trees = _with_null_row(config, trees)
    network = make_network(config)
    entries = layout.entries(network)
    if without := homeless(layout, network):
        raise WeightsError(f"{layout.name}'s code has no place for {few(without)} of this network")
    for difference in _differences(layout, network, config):
        log.warning("%s's code will compute something else: %s", layout.name, difference)
    files = {}
    for name, tree in trees.items():
        arrays = to_state_dict(tree, network)
        files[name] = {key: entry.to_file(arrays) for key, entry in entries.items()}
    # For a full disk torch raises RuntimeError, and safetensors SafetensorError.
    with explained(f"--output={output}", UserError, RuntimeError, safetensors.SafetensorError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole(output) as file:
            if layout is OWN:
                # The configuration is complete, so that pytorch.py needs no defaults of its own.
                record = {"config": border.to_dict(config), "codec": meta["codec"]}
                metadata = {"format": "pt", "weights": weights, "step": str(meta["step"])}
                metadata |= {key: json.dumps(value) for key, value in record.items()}
                safetensors.numpy.save_file(next(iter(files.values())), file.name, metadata=metadata)
            else:
                _save_torch(file.name, files, layout.prefix)
    log.info("wrote %s of step %d to %s: %d tensors each", " and ".join(files), meta["step"], output, len(entries))


def import_(layout: Layout, file: Path, workdir: Path, config: Any = None, partial: bool = False) -> None:
    """Makes a file of weights a run at step 0, or leaves no workdir. The decay of the run's EMA has no warm-up.

    config: a ConfigDict of the network to import into; None: the network that follows from the file. partial: imports
    the tensors that fit; the others of the network are freshly initialised.

    Raises:
      WeightsError: the file cannot be read, or does not fit the network.
      CheckpointError: the workdir is not empty, or cannot be written.
      ConfigError: the configuration cannot be run.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise CheckpointError(f"--workdir={workdir} is not empty; weights are imported into a new folder")
    groups, skipped, metadata = open_checkpoint(file)
    found = ", ".join(f"{name or 'weights'} ({len(tensors)} tensors)" for name, tensors in groups.items())
    log.info("%s has %s%s", file, found, f"; skipped: {', '.join(skipped)}" if skipped else "")
    named = [name for name in ("model", "ema", "") if name in groups]
    if not named:
        raise WeightsError(f"{file} has tensors under {', '.join(groups)}, but none under model or ema")
    params, ema = named[0], "ema" if "ema" in groups else named[0]
    if config is not None:
        config = border.resolve(config)
    elif layout is OWN:
        config = _own_config(file, metadata)
    else:
        config = border.resolve(layout.infer(shapes_of(groups[ema])))
    config = dataclasses.replace(config, ema=dataclasses.replace(config.ema, warmup=False))
    network = make_network(config)
    names = places(network)

    def tree(group: str) -> Any:
        where = f"{file}, {group}" if group else str(file)
        tensors = groups[group]
        if layout is OWN:
            # Files of earlier versions have the projection head too.
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        arrays, faults = fit(layout, network, tensors, where, partial=partial)
        for fault in faults:
            log.warning("%s: %s", where, fault)
        if names.keys() - arrays.keys():
            fresh = to_state_dict(jax.jit(network.init)(jax.random.key(config.seed)), network)
            count = len(names) - len(arrays)
            log.warning("%s: %d of the network's %d tensors are freshly initialised", where, count, len(names))
            arrays = fresh | arrays
        return from_state_dict(arrays, network)

    source = {"file": file.name, "sha256": sha256_of(file), "layout": layout.name}
    _write_run(workdir, config, tree(params), None if ema == params else tree(ema), source)
    log.info("imported %s into %s as a run at step 0", file.name, workdir)


def _own_config(file: Path, metadata: Mapping[str, str]) -> Config:
    if "config" not in metadata:
        raise WeightsError(f"{file} has no configuration in its metadata; --config must say which network this is")
    try:
        return border.resolve(json_object(metadata["config"]))
    except ValueError as error:
        raise WeightsError(f"{file}: the configuration in its metadata is no JSON: {error}") from error
    except ConfigError as error:
        raise WeightsError(f"{file}: the configuration in its metadata cannot be used: {error}") from error


def _differences(layout: Layout, network: Network, config: Config) -> list[str]:
    """Keys of the configuration in which a public code that reads a file of this layout differs from the network."""
    if layout.infer is None:
        return []
    try:
        theirs = border.resolve(layout.infer({name: e.shape for name, e in layout.entries(network).items()}))
    except WeightsError as error:
        return [str(error)]
    computed = ("model.heads", "model.decoder_heads", "diffusion.", "codec.")
    lines = border.identity_differences(config, theirs)
    return [line for line in lines if line.startswith(computed) and not line.startswith("diffusion.edm.log_sigma")]


def _read_weights(workdir: Path, weights: str, step: int | None) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """A checkpoint's configuration, its weights ("model": as trained; "ema"; or both), and its record."""
    if weights == "ema":
        ema, meta = open_checkpoints(workdir).restore_ema(step=step)
        return border.resolve(meta["config"]), {"ema": ema["default"]}, meta
    config, state, meta = restore_run(workdir, _mesh(), step)
    trees = {"model": state["params"]["network"], "ema": state["ema"]["default"]}
    return config, trees if weights == "both" else {"model": trees["model"]}, meta


def _write_run(workdir: Path, config: Config, params: Any, ema: Any, source: Mapping[str, str]) -> None:
    """Writes a run at step 0, whole or not at all. ema: None: the parameters."""
    parts = make_parts(config)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(parts, _mesh()))
    network = jax.device_put(params, layout["params"]["network"])
    ema = None if ema is None else jax.device_put(ema, layout["ema"]["default"])

    def start(key: jax.Array, network: Any, ema: Any) -> State:
        return parts.state_from(parts.init_params(key) | {"network": network}, ema)

    state = jax.jit(start, out_shardings=layout)(jax.random.key(config.seed), network, ema)
    meta = {"config": border.to_dict(config), "codec": parts.codec.record(), "imported": dict(source)}
    temporary = workdir.with_name(f".{workdir.name}.tmp")
    with explained(f"--workdir={workdir}", CheckpointError, CheckpointError):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_config(temporary, config)
            with closing(Checkpointer(temporary / CHECKPOINTS)) as checkpointer:
                checkpointer.save(0, state, meta)
            temporary.replace(workdir)
        except BaseException:
            # TensorStore's threads cannot be joined, and may make the folder again while they write.
            for _ in range(50):
                shutil.rmtree(temporary, ignore_errors=True)
                time.sleep(0.2)
                if not temporary.exists():
                    break
            raise


def _mesh() -> jax.sharding.Mesh:
    """A mesh that splits the parameters over all devices: a train state may not fit on one."""
    return sharding.make_mesh(ParallelConfig(data=1, fsdp=-1))


def _with_null_row(config: Config, trees: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The configuration and the parameters with a row of zeros as the null label's."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, null_label="row"))

    def with_row(tree: Any) -> Any:
        label = {"table": np.pad(np.asarray(tree["encoder"]["label"]["table"]), ((0, 1), (0, 0)))}
        return {**tree, "encoder": {**tree["encoder"], "label": label}}

    return config, {name: with_row(tree) for name, tree in trees.items()}


def _save_torch(path: str, files: Mapping[str, Mapping[str, np.ndarray]], prefix: str) -> None:
    torch = import_torch()
    content = {
        name: {prefix + key: torch.from_numpy(np.require(array, requirements="W")) for key, array in arrays.items()}
        for name, arrays in files.items()
    }
    torch.save(content if len(content) > 1 or prefix else next(iter(content.values())), path)

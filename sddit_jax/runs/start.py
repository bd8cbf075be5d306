"""The start of a run: it checks the run's folder, and can take the weights of another run."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sddit_jax.config import border
from sddit_jax.config.schema import Config
from sddit_jax.errors import CheckpointError
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import Parts, State
from sddit_jax.runs.folder import CONFIG, read_config, restore_run

log = logging.getLogger("sddit_jax")


def check_identity(workdir: Path, config: Config) -> None:
    """Warns of each key by which `config` changes the run in workdir. Raises CheckpointError if its model differs."""
    if not (workdir / CONFIG).exists():
        return
    saved = read_config(workdir)
    differences = border.identity_differences(saved, config)
    if any(line.startswith("model.") for line in differences):
        raise CheckpointError(f"{workdir} holds another model ({', '.join(differences)}); use another --workdir")
    for line in differences:
        log.warning("continuing %s with a changed %s", workdir, line)


def state_from_run(run: Path, config: Config, parts: Parts, codec: dict[str, Any], mesh: Mesh, layout: Any) -> State:
    """A state at step 0 with the network and the EMA of the newest checkpoint of another run, `run`.

    The parameters of an objective are taken too if they have the same shapes; otherwise they are fresh. layout: the
    sharding of each array of the state. Raises CheckpointError if `run` has no checkpoint or another model.
    """
    theirs, state, meta = restore_run(run, mesh)
    check_codec(f"the network of {run}", meta["codec"], "the data of this run", codec)
    if differences := [line for line in border.identity_differences(theirs, config) if line.startswith("model.")]:
        raise CheckpointError(f"init_from {run} holds another model: {', '.join(differences)}")
    log.info("starting from the weights of %s at step %d", run, meta["step"])
    shapes = jax.tree.map(np.shape, jax.eval_shape(parts.init_params, jax.random.key(0)))
    taken = {name: tree for name, tree in state["params"].items() if jax.tree.map(np.shape, tree) == shapes.get(name)}
    if "network" not in taken:
        raise CheckpointError(f"init_from {run} holds another network; masking.fill must be the same too")
    if fresh := shapes.keys() - taken.keys():
        log.info("fresh parameters, since %s has none of their shapes: %s", run, ", ".join(sorted(fresh)))

    def start(key: jax.Array, taken: Any, ema: Any) -> State:
        return parts.state_from(parts.init_params(key) | taken, ema)

    return jax.jit(start, out_shardings=layout)(jax.random.key(config.seed), taken, state["ema"]["default"])

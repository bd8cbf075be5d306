"""Where a run starts: in a folder that is its own, and from the weights of another run."""

import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sddit_jax.config import border
from sddit_jax.config.schema import Config
from sddit_jax.errors import CheckpointError
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import Parts, State
from sddit_jax.runs.folder import CONFIG, read_config, restore_run

log = logging.getLogger("sddit_jax")


def check_identity(workdir: Path, config: Config) -> None:
    """Where workdir has a run's config.json, prints what differs. Raises CheckpointError for another model."""
    if not (workdir / CONFIG).exists():
        return
    saved = read_config(workdir)
    differences = border.identity_differences(saved, config)
    if any(line.startswith("model.") for line in differences):
        raise CheckpointError(f"{workdir} holds another model ({', '.join(differences)}); use another --workdir")
    for line in differences:
        log.warning("continuing %s with a changed %s", workdir, line)


def state_from_run(run: Path, config: Config, parts: Parts, codec: dict[str, Any], mesh: Mesh, layout: Any) -> State:
    """A state at step 0 with the parameters and the EMA of another run's newest checkpoint.

    What objectives own is taken from there too, where it has the same shapes; otherwise it is fresh. layout: the
    sharding of each array of the state. Raises CheckpointError if the run has none, or another model.
    """
    theirs, state, meta = restore_run(run, mesh)
    check_codec(f"the network of {run}", meta["codec"], "the data of this run", codec)
    if theirs.model != config.model:
        differences = [line for line in border.identity_differences(theirs, config) if "model." in line]
        if differences:
            raise CheckpointError(f"init_from {run} holds another model: {', '.join(differences)}")
    log.info("starting from the weights of %s at step %d", run, meta["step"])
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    taken = {name: tree for name, tree in state["params"].items() if name in shapes and _alike(tree, shapes[name])}
    if "network" not in taken:
        raise CheckpointError(f"init_from {run} holds another network; masking.fill must agree too")
    if fresh := shapes.keys() - taken.keys():
        log.info("fresh, since %s has none of these shapes: %s", run, ", ".join(sorted(fresh)))

    def start(key: jax.Array, taken: Any, ema: Any) -> State:
        return parts.state_from(parts.init_params(key) | taken, ema)

    return jax.jit(start, out_shardings=layout)(jax.random.key(config.seed), taken, state["ema"]["default"])


def _alike(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure and shapes."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.shape == y.shape for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

"""What other code reads from a run's folder: its config and its newest checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sddit_jax.config import border
from sddit_jax.config.checks import check_guide
from sddit_jax.config.parts import make_network, make_parts
from sddit_jax.config.schema import Config
from sddit_jax.errors import CheckpointError, ConfigError
from sddit_jax.files import read_json, write_json
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import State
from sddit_jax.models.transformer import Network
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import abstract_state
from sddit_jax.runs.checkpoint import Checkpointer

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def write_config(workdir: Path, config: Config) -> None:
    """Writes WORKDIR/config.json, whole or not at all."""
    write_json(workdir / CONFIG, border.to_dict(config))


def read_config(workdir: Path) -> Config:
    """Reads WORKDIR/config.json. Raises CheckpointError if it cannot be read."""
    path = workdir / CONFIG
    try:
        return border.resolve(read_json(path, CheckpointError, ending="; use another --workdir"))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is not the config of a run: {error}; use another --workdir") from error


def open_checkpoints(workdir: Path) -> Checkpointer:
    """Opens the checkpoints of a run to read them. Raises CheckpointError if there is no such folder."""
    if not (workdir / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{workdir} has no checkpoints: name the folder of a run")
    return Checkpointer(workdir / CHECKPOINTS, read_only=True)


def restore_run(
    workdir: Path, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Config, State, dict[str, Any]]:
    """Config, train state and record of a run's newest intact checkpoint, or of that of `step`.

    Raises CheckpointError if there is none.
    """
    checkpointer = open_checkpoints(workdir)
    restored = checkpointer.restore(abstract_state(make_parts(read_config(workdir)), mesh), step)
    if restored is None:
        of_step = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{workdir} has no checkpoint{of_step}; there are {checkpointer.all_steps()}")
    state, meta = restored
    return border.resolve(meta["config"]), state, meta


def restore_guide(
    workdir: Path, config: Config, codec: Mapping[str, Any], mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Network, Any, dict[str, Any]]:
    """Network, EMA weights and record of a run that guides the samples of another network.

    config, codec: those of the other network. step: None takes the newest intact checkpoint. Raises UserError if the
    run cannot guide that network.
    """
    ema, meta = open_checkpoints(workdir).restore_ema(step=step)
    guide = border.resolve(meta["config"])
    check_guide(config, guide)
    check_codec(f"the guide {workdir}", meta["codec"], "what the network that it is to guide learnt", codec)
    return make_network(guide, make_hooks(mesh, guide.model, whole=True, trained=True)), ema["default"], meta


def weights_record(workdir: str, meta: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """A record of where weights are from: the run, the step, and the digests of the leaves under `paths`."""
    digests = {path: value for path, value in meta["digests"].items() if path.startswith(paths)}
    return {"workdir": workdir, "checkpoint_step": meta["step"], "checkpoint_digests": digests}

"""The config of a run, as it was saved: tests/configs/saved.py:RUN."""

from pathlib import Path

import ml_collections

from sddit_jax.config.border import to_dict
from sddit_jax.runs.folder import read_config


def get_config(run: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(to_dict(read_config(Path(run)))).lock()

"""Goes on from a run or from imported weights, with another schedule, loss or data.

    python -m sddit_jax.convert from-maskdit imagenet256.pt --workdir=runs/maskdit
    python -m sddit_jax.main --config=configs/finetune.py:runs/maskdit --workdir=runs/maskdit \
        --config.steps=100000 --config.optimizer.learning_rate=5e-5 --config.masking.ratio=0.0 \
        --config.objectives.reconstruction.weight=0.0

The argument is the folder of the run; all that is not changed on the command line is as it was there.
"""

from pathlib import Path

import ml_collections

from sddit_jax.config import to_dict
from sddit_jax.errors import ConfigError
from sddit_jax.reporting import read_config


def get_config(workdir: str = "") -> ml_collections.ConfigDict:
    if not workdir:
        raise ConfigError("configs/finetune.py needs the folder of a run, as in --config=configs/finetune.py:runs/a")
    return ml_collections.ConfigDict(to_dict(read_config(Path(workdir).expanduser()))).lock()

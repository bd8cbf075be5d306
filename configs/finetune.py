"""Starts a run from the weights of another run, trained here or imported, with other settings.

    python -m sddit_jax.main --config=configs/finetune.py:runs/maskdit --workdir=runs/tuned \
        --config.steps=100000 --config.optimizer.learning_rate=5e-5 --config.masking.ratio=0.0 \
        --config.objectives.reconstruction.weight=0.0

The argument is the folder of the other run, alone or as run=FOLDER; that folder is not changed. The new run starts at
step 0 with the parameters, the EMA and the settings of the other run, except for settings given on the command line.
"""

from pathlib import Path

import ml_collections

from sddit_jax.config.arguments import parse_arguments
from sddit_jax.config.border import to_dict
from sddit_jax.errors import ConfigError
from sddit_jax.runs.folder import read_config


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    run = parse_arguments(arguments, {"run": ""}, short="run", path=True)["run"]
    if not run:
        raise ConfigError("configs/finetune.py needs the folder of a run: --config=configs/finetune.py:runs/digits")
    config = ml_collections.ConfigDict(to_dict(read_config(Path(run).expanduser())))
    config.init_from = run
    config.ema.warmup = False
    return config.lock()

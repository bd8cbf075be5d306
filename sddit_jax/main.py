"""Trains: python -m sddit_jax.main --config=configs/digits.py --workdir=DIR."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sddit_jax import cli, process_flags
from sddit_jax.config.border import resolve
from sddit_jax.config.reference import help_text
from sddit_jax.errors import UserError
from sddit_jax.train import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(); --config.KEY=VALUE changes a key.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, samples. Continued if it has any."
)
HELP_CONFIG = flags.DEFINE_string(
    "help_config",
    None,
    "Prints the config keys whose name or meaning contains this text, and ends; empty: all keys. With --config=FILE it "
    "also prints the file's values.",
)
flags.adopt_module_key_flags(process_flags)


def main() -> None:
    """Trains what --config says, in --workdir; or prints what --help_config asks for."""
    if CONFIG.value is not None:
        file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        if not Path(file).is_file():
            raise UserError(f"--config={file}: no such file")
    if HELP_CONFIG.value is not None:
        print(help_text(HELP_CONFIG.value, None if CONFIG.value is None else resolve(CONFIG.value)))
        return
    if CONFIG.value is None or not WORKDIR.value:
        raise UserError("--config=FILE and --workdir=DIR are needed, as in --config=configs/digits.py --workdir=runs/a")
    if "://" in WORKDIR.value:
        raise UserError(f"--workdir={WORKDIR.value}: it should be a folder that all processes see; mount the bucket")
    config = resolve(CONFIG.value)
    process_flags.start_processes()
    train(config, Path(WORKDIR.value).expanduser())


if __name__ == "__main__":
    cli.run(main)

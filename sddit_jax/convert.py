"""Takes weights to PyTorch and in: python -m sddit_jax.convert COMMAND ...

    to-torch      --workdir=RUN --output=model.safetensors      for sddit_jax.interop.pytorch
    to-maskdit    --workdir=RUN --output=0400000.pt             for the public MaskDiT code
    to-dit        --workdir=RUN --output=model.pt               for the public DiT code
    from-torch    model.safetensors --workdir=NEW
    from-maskdit  imagenet256.pt --workdir=NEW
    from-dit      DiT-XL-2-256x256.pt --workdir=NEW

An imported workdir is like one that main trained, at step 0: sample from it, or train further with
--config=configs/finetune.py:NEW --workdir=TUNED. A file that does not fit its network is refused, with all that is
missing, surplus or of another shape; --partial loads what fits. Nothing in a file is executed.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sddit_jax import cli
from sddit_jax.errors import UserError
from sddit_jax.interop.layouts import DIT, MASKDIT, OWN
from sddit_jax.interop.transfer import export, import_

WORKDIR = flags.DEFINE_string("workdir", None, "Run to export, or a new folder to import into.")
OUTPUT = flags.DEFINE_string("output", None, "File to write.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "params", "both"],
    "The EMA (the default), the parameters as trained, or for MaskDiT and DiT both (the default for MaskDiT).",
)  # fmt: skip
STEP = flags.DEFINE_integer("checkpoint_step", None, "Step of the checkpoint. Left out: the newest that is intact.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The network to import into, as for main. Left out: what the file itself tells.", lock_config=True
)
PARTIAL = flags.DEFINE_bool("partial", False, "Import what fits; the rest of the network is fresh.")


def main(command: str = "", file: str = "") -> None:
    """Does what the first word says."""
    layouts = {"torch": OWN, "maskdit": MASKDIT, "dit": DIT}
    direction, _, name = command.partition("-")
    if direction not in ("to", "from") or name not in layouts:
        known = ", ".join(f"{way}-{layout}" for way in ("to", "from") for layout in layouts)
        raise UserError(f"{command!r} is not one of {known}; --help shows examples")
    if not WORKDIR.value:
        raise UserError("--workdir=DIR is needed")
    workdir = Path(WORKDIR.value).expanduser()
    if direction == "to":
        if not OUTPUT.value or file or CONFIG.value or PARTIAL.value:
            raise UserError(
                f"{command} is written {command} --workdir=RUN --output=FILE [--weights] [--checkpoint_step]"
            )
        export(layouts[name], workdir, Path(OUTPUT.value).expanduser(), WEIGHTS.value, STEP.value)
    else:
        if not file or OUTPUT.value or WEIGHTS.value or STEP.value:
            raise UserError(f"{command} is written {command} FILE --workdir=NEW [--config] [--partial]")
        import_(layouts[name], Path(file).expanduser(), workdir, CONFIG.value, PARTIAL.value)


if __name__ == "__main__":
    cli.run(main, words=2)

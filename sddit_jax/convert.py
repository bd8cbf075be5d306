"""Converts weights to and from PyTorch: python -m sddit_jax.convert COMMAND ...

    to-torch      --workdir=RUN --output=model.safetensors      for sddit_jax.interop.pytorch
    to-maskdit    --workdir=RUN --output=0400000.pt             for the public MaskDiT code
    to-dit        --workdir=RUN --output=model.pt               for the public DiT code
    from-torch    model.safetensors --workdir=NEW
    from-maskdit  imagenet256.pt --workdir=NEW
    from-dit      DiT-XL-2-256x256.pt --workdir=NEW

An import makes a workdir like that of a run at step 0. Sample from it, or train it further with
--config=configs/finetune.py:NEW --workdir=TUNED. If a file does not fit the network, the message lists the tensors that
are missing, surplus or of another shape, and nothing is written; --partial loads the tensors that fit. No code in a
file is executed.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sddit_jax import cli
from sddit_jax.errors import UserError
from sddit_jax.interop.layouts import DIT, MASKDIT, OWN
from sddit_jax.interop.transfer import export, import_

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to export, or new folder to import into.")
OUTPUT = flags.DEFINE_string("output", None, "File to write: .safetensors for to-torch, .pt or .pth for the others.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "params", "both"],
    "Weights to export: ema, params (as trained) or both. Left out: both for to-maskdit, ema for the others.",
)  # fmt: skip
STEP = flags.DEFINE_integer("checkpoint_step", None, "Step of the checkpoint. Left out: the newest intact one.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the network to import into, as for main. Left out: as the file says.", lock_config=True
)
PARTIAL = flags.DEFINE_bool("partial", False, "Import the tensors that fit; the others of the network are fresh.")


def main(command: str = "", file: str = "") -> None:
    """Exports or imports, as the first argument says."""
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

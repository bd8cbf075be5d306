"""Prints which settings of the discrimination objective learn on digits: the table of docs/discrimination.md.

    python benchmarks/discrimination.py --workdir=runs/discrimination --steps=1000 --only=ibot,default

Each row is a run of configs/digits.py with other settings: two minutes on two cores. Finished runs are not repeated.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from sddit_jax import cli
from sddit_jax.config.border import resolve
from sddit_jax.errors import UserError
from sddit_jax.train import train

CONFIG = config_flags.DEFINE_config_file("config", str(Path(__file__).parents[1] / "configs" / "digits.py"))
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs.")
STEPS = flags.DEFINE_integer("steps", 1000, "Training steps of each run.", lower_bound=1)
ONLY = flags.DEFINE_list("only", [], "Names of the rows to run; none: all rows.")

IBOT = {"centering": "mean", "standardise": False, "teacher_temperature": (0.04, 0.07), "center_momentum": 0.9}
RELATIVE = {"standardise": True, "teacher_temperature": (0.5, 0.5)}
VARIANTS = {
    "ibot": IBOT,
    "ibot_sharp": IBOT | {"teacher_temperature": (0.02, 0.02)},
    "ibot_32_prototypes": IBOT | {"prototypes": 32},
    "ibot_fast_center": IBOT | {"center_momentum": 0.5},
    "standardise": IBOT | RELATIVE,
    "condition": IBOT | {"centering": "condition"},
    "condition_sharp": IBOT | {"centering": "condition", "teacher_temperature": (0.02, 0.02)},
    "condition_standardise": IBOT | RELATIVE | {"centering": "condition"},
    "preset": {},
}
COLUMNS = {
    "patch I": "eval/patch/information",
    "CLS I": "eval/cls/information",
    "CLS H(mean)": "teacher/cls/mean_entropy",
    "CLS loss": "train/discrimination/cls",
    "1-NN": "eval/probe_cls",
    "untrained": "eval/probe_cls_untrained",
}


def last_row(workdir: Path) -> dict[str, float]:
    """The metrics of the run's last step, of training and evaluation."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {key: value for row in rows if row["step"] == STEPS.value for key, value in row.items()}


def run(config: ConfigDict, settings: dict, workdir: Path) -> dict[str, float]:
    """Trains with the settings unless the run is done, and returns the metrics of its last step."""
    if "eval/patch/information" not in last_row(workdir):
        config.steps = STEPS.value
        config.objectives.discrimination.update(settings)
        config.sampling.every = 0
        config.eval.update(draws=1, num_samples=100)
        config.checkpoint.every = STEPS.value
        train(resolve(config), workdir)
    return last_row(workdir)


def main() -> None:
    """Runs the rows and prints the table."""
    if not WORKDIR.value:
        raise UserError("--workdir=DIR is needed: the folder for the runs")
    names = ONLY.value or list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        raise UserError(f"--only has {', '.join(sorted(unknown))}, but the rows are {', '.join(VARIANTS)}")
    table = {}
    for name in names:
        config = CONFIG.value.copy_and_resolve_references()
        table[name] = run(config, VARIANTS[name], Path(WORKDIR.value) / f"{name}_{STEPS.value}")
    print("| settings | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.2f}" for key in COLUMNS.values()) + " |")


if __name__ == "__main__":
    cli.run(main)

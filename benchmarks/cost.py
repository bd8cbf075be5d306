"""Prints the time of a training step beside its FLOPs (sddit_jax/cost/flops.py), for steps of several sizes.

    python benchmarks/cost.py --table=discrimination --batch_size=16

Tables: discrimination, SD-DiT with and without the discrimination, its teacher and its head; tokens, SD-DiT-S/2 with 64
to 1,024 tokens; masks, SD-DiT-S/2 with mask ratios from 0 to 0.75; sizes, S/4, B/4 and L/4. A step is in float32 on
CPUs, in bfloat16 elsewhere. If only matrix products took time, the time would grow as the FLOPs do.
"""

import harness
import models
from absl import flags

from sddit_jax.cost import flops

TABLE = flags.DEFINE_enum("table", "discrimination", ["discrimination", "tokens", "masks", "sizes"], "Which table.")
WITHOUT = {"objectives.discrimination.weight": 0.0}

# For each row its name, the model, and the keys of its config that differ.
CASES = {
    "discrimination": [
        (f"{model}{', no discrimination' if changes else ''}", model, changes)
        for model in ("digits", "S/2")
        for changes in ({}, WITHOUT)
    ],
    "tokens": [(f"{(size // 2) ** 2} tokens", "S/2", {"model.image_size": size}) for size in (16, 32, 64)],
    "masks": [(f"mask {ratio}", "S/2", {"masking.ratio": ratio}) for ratio in (0.0, 0.2, 0.5, 0.75)],
    "sizes": [(size, size, {}) for size in ("S/4", "B/4", "L/4")],
}


def main() -> None:
    """Prints the table."""
    kept = models.fastest() if TABLE.value == "discrimination" else {}
    configs = {
        name: models.configuration(model, "sd_dit", kept | changes) for name, model, changes in CASES[TABLE.value]
    }
    ways = {name: models.train_step(config, models.random_batch(config)) for name, config in configs.items()}
    times = harness.measure(ways, harness.REPETITIONS.value)
    rows = []
    for name, config in configs.items():
        gflop = config.batch_size * sum(flops.training(config).values()) / 1e9
        cells = {"step": name, "s": times[name], "GFLOP": gflop, "GFLOP/s": gflop / times[name].median}
        rows.append(cells | {"s, with / without": "", "GFLOP, with / without": ""})
        if name.endswith(", no discrimination"):
            whole = rows[-2]
            whole["s, with / without"] = whole["s"].median / cells["s"].median
            whole["GFLOP, with / without"] = whole["GFLOP"] / gflop
    harness.show(rows)


if __name__ == "__main__":
    harness.run(main)

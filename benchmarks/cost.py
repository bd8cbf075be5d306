"""What a training step costs against size: prints a table.

    python benchmarks/cost.py [--table=discrimination] [--batch_size=16]

--table=discrimination: SD-DiT beside the same network without the discrimination, its teacher and its head; time should
grow as the arithmetic does. --table=tokens, --table=masks and --table=sizes: SD-DiT-S/2 with 64 to 1,024 tokens, with
mask ratios from 0 to 0.75, and S to L with patches of 4. In float32 on CPUs, in bfloat16 elsewhere.
"""

import harness
import models
from absl import flags

from sddit_jax.cost import flops

TABLE = flags.DEFINE_enum("table", "discrimination", ["discrimination", "tokens", "masks", "sizes"], "Which table.")
WITHOUT = {"objectives.discrimination.weight": 0.0}

# Of each row its name, the model, and what is changed in its configuration.
CASES = {
    "discrimination": [
        (f"{model}{' without' if changes else ''}", model, changes)
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
        rows.append(cells | {"branch, time": "", "branch, arithmetic": ""})
        if name.endswith(" without"):
            whole = rows[-2]
            whole["branch, time"] = whole["s"].median / cells["s"].median
            whole["branch, arithmetic"] = whole["GFLOP"] / gflop
    harness.show(rows)


if __name__ == "__main__":
    harness.run(main)

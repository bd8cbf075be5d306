"""What a training step costs against size: prints a table.

    python benchmarks/cost.py [--table=discrimination] [--batch_size=16]

--table=discrimination: SD-DiT beside the same network without the discrimination, its teacher and its head; time should
grow as the arithmetic does. --table=tokens, --table=masks and --table=sizes: SD-DiT-S/2 with 64 to 1,024 tokens, with
mask ratios from 0 to 0.75, and S to L with patches of 4. In float32, on the machine's devices.
"""

from typing import Any

import harness
import jax
import models
from absl import flags

from sddit_jax import cli, flops, schema
from sddit_jax.state import make_parts
from sddit_jax.train_step import make_train_step

TABLE = flags.DEFINE_enum("table", "discrimination", ["discrimination", "tokens", "masks", "sizes"], "Which table.")
WITHOUT = {"objectives.discrimination.weight": 0.0}

CASES = {
    "discrimination": [
        (f"{model}{' without' if changes else ''}", models.configuration, (model, "sd_dit", changes))
        for model in ("digits", "S/2")
        for changes in ({}, WITHOUT)
    ],
    "tokens": [
        (f"{(size // 2) ** 2} tokens", models.configuration, ("S/2", "sd_dit", {"model.image_size": size}))
        for size in (16, 32, 64)
    ],
    "masks": [
        (f"mask {ratio}", models.configuration, ("S/2", "sd_dit", {"masking.ratio": ratio}))
        for ratio in (0.0, 0.2, 0.5, 0.75)
    ],
    "sizes": [(size, models.configuration, (size, "sd_dit")) for size in ("S/4", "B/4", "L/4")],
}


def step_of(config: schema.Config) -> Any:
    """A way to call the step again and again."""
    parts = make_parts(config)
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    batch, state = models.random_batch(config), jax.jit(parts.init_state)(jax.random.key(0))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run


def main() -> None:
    """Prints the table, each row beside the first one of its model."""
    configs = {name: make(*arguments) for name, make, arguments in CASES[TABLE.value]}
    times = harness.measure({name: step_of(config) for name, config in configs.items()}, harness.REPETITIONS.value)
    rows = []
    for name, config in configs.items():
        gflop = config.batch_size * sum(flops.training(config).values()) / 1e9
        cells = {"step": name, "s": times[name], "GFLOP": gflop, "GFLOP/s": gflop / times[name].median}
        rows.append(cells | {"branch, time": "", "branch, arithmetic": ""})
        if name.endswith(" without"):
            whole = rows[-2]
            rows[-2]["branch, time"] = whole["s"].median / cells["s"].median
            rows[-2]["branch, arithmetic"] = whole["GFLOP"] / gflop
    harness.show(rows)


if __name__ == "__main__":
    cli.run(main)

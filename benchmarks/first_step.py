"""Prints the seconds until the first step is done, without and with a cache of compiled programs.

    python benchmarks/first_step.py --models=digits,XL/2

Each row is measured in a process of its own. "first step, s" is the time from before the state is made to the end of
step 1. Models other than digits are only traced and lowered.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import harness
import jax
import models
from absl import flags

from sddit_jax import cli
from sddit_jax.config.parts import make_parts
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel import cpu
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import make_mesh

MODELS = flags.DEFINE_list("models", ["digits", "XL/2"], "digits, or sizes for latents of 256-pixel images.")
METHODS = flags.DEFINE_list("methods", ["dit", "maskdit", "sd_dit"], "Methods.")
CHILD = flags.DEFINE_bool("child", False, "Measure in this process; only the benchmark itself sets it.")


def measure(model: str, method: str) -> dict[str, float]:
    """The seconds of each part of a first step."""
    config = models.configuration(model, method)
    parts = make_parts(config, make_hooks(make_mesh(config.parallel, jax.devices()[:1]), config.model))
    batch = models.random_batch(config)
    began = time.monotonic()
    make_state = jax.jit(parts.init_state, compiler_options=cpu.init_compiler_options())
    state = make_state(jax.random.key(0)) if model == "digits" else jax.eval_shape(make_state, jax.random.key(0))
    made = time.monotonic()
    lowered = jax.jit(make_train_step(parts), donate_argnums=0).lower(state, batch)
    seconds = {"trace and lower, s": time.monotonic() - made}
    if model == "digits":
        step = lowered.compile()
        seconds["compile, s"] = time.monotonic() - made - seconds["trace and lower, s"]
        jax.block_until_ready(step(state, batch))
        seconds["first step, s"] = time.monotonic() - began
    return seconds


def child(model: str, method: str, cache: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", f"--models={model}", f"--methods={method}"]
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    done = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    if CHILD.value:
        cpu.keep_working_memory()
        print(json.dumps(measure(MODELS.value[0], METHODS.value[0])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS.value:
            for method in METHODS.value:
                # The process with the filled cache loads what the one with the empty cache compiled.
                caches = {"none": "", "empty": folder, "filled": folder} if model == "digits" else {"none": ""}
                for name, cache in caches.items():
                    seconds = child(model, method, cache)
                    cells = {"model": model, "method": method, "cache": name}
                    columns = ("trace and lower, s", "compile, s", "first step, s")
                    rows.append(cells | {column: seconds.get(column, "") for column in columns})
    harness.show(rows)


if __name__ == "__main__":
    cli.run(main)

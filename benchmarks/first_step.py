"""How long the first step takes: tracing, compiling, running; without and with a compilation cache.

    python benchmarks/first_step.py [--models=digits,XL/2]

Each measurement is a process of its own. `first step` is from before the state is made to the end of step 1. Models but
digits are traced and lowered only.
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

MODELS = flags.DEFINE_list("models", ["digits", "XL/2"], "digits, or sizes of latents of 256 pixels.")
METHODS = flags.DEFINE_list("methods", ["dit", "maskdit", "sd_dit"], "Methods.")
CHILD = flags.DEFINE_bool("child", False, "Measure here, and print the seconds; for the benchmark's own use.")


def measure(model: str, method: str) -> dict[str, float]:
    """Seconds of each part."""
    config = models.configuration(model, method)
    parts = make_parts(config, make_hooks(make_mesh(config.parallel, jax.devices()[:1]), config.model))
    batch = models.random_batch(config)
    began = time.monotonic()
    make_state = jax.jit(parts.init_state, compiler_options=cpu.init_compiler_options())
    state = make_state(jax.random.key(0)) if model == "digits" else jax.eval_shape(make_state, jax.random.key(0))
    made = time.monotonic()
    lowered = jax.jit(make_train_step(parts), donate_argnums=0).lower(state, batch)
    seconds = {"trace and lower": time.monotonic() - made}
    if model == "digits":
        step = lowered.compile()
        seconds["compile"] = time.monotonic() - made - seconds["trace and lower"]
        jax.block_until_ready(step(state, batch))
        seconds["first step"] = time.monotonic() - began
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
                # The second process with a cache finds what the first has compiled.
                caches = {"none": "", "empty": folder, "filled": folder} if model == "digits" else {"none": ""}
                for name, cache in caches.items():
                    seconds = child(model, method, cache)
                    cells = {"model": model, "method": method, "cache": name}
                    rows.append(cells | {k: seconds.get(k, "") for k in ("trace and lower", "compile", "first step")})
    harness.show(rows)


if __name__ == "__main__":
    cli.run(main)

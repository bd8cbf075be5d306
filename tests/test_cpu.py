"""What the commands ask of XLA and glibc where there is no accelerator."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_parts

from sddit_jax import cpu

# Runs a program with 64 MiB of working memory ten times, and prints how many pages came anew in each.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from sddit_jax import cpu

if sys.argv[1] == "kept":
    cpu.keep_working_memory()

@jax.jit
def program(x):
    return jnp.sort(jnp.outer(x[:4], x), axis=0).sum()

x = jnp.ones(2**22)
for _ in range(3):
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    program(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_working_memory_is_kept_between_executions():
    """Without it each execution gets its memory from the system again, in pages of 4 KiB."""
    pages = {
        name: float(subprocess.run([sys.executable, "-c", PROGRAM, name], check=True, capture_output=True).stdout)
        for name in ("as it is", "kept")
    }
    assert pages["as it is"] > 2**13
    assert pages["kept"] < pages["as it is"] / 4


# Compiles a step of Adam, and prints into how many kernels.
UPDATE = """
import jax, jax.numpy as jnp, optax
from sddit_jax import cpu

if {fused}:
    cpu.fuse_outputs()

adam = optax.adam(1e-3)

def update(gradient, state, x):
    updates, state = adam.update(gradient, state)
    return optax.apply_updates(x, updates), state

x = jnp.ones((256, 512))
print(jax.jit(update).lower(x, adam.init(x), x).compile().as_text().count(" fusion("))
"""


def test_results_of_the_same_arrays_share_a_kernel():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    kernels = {
        fused: int(
            subprocess.run(
                [sys.executable, "-c", UPDATE.format(fused=fused)], env=environment, check=True, capture_output=True
            ).stdout
        )
        for fused in (False, True)
    }
    assert kernels[True] < kernels[False]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", cpu.MULTI_OUTPUT_FUSION),
        # The last one counts.
        (" --xla_backend_extra_options=a=b", f"{cpu.MULTI_OUTPUT_FUSION} --xla_backend_extra_options=a=b"),
        (f"{cpu.MULTI_OUTPUT_FUSION} --xla_dump_to=x", f"{cpu.MULTI_OUTPUT_FUSION} --xla_dump_to=x"),
        ("/etc/xla_flags", "/etc/xla_flags"),
    ],
)
def test_flags_that_the_user_has_set_stay(monkeypatch, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    cpu.fuse_outputs()
    assert os.environ["XLA_FLAGS"] == after


def test_a_quick_initialisation_gives_the_same_bits():
    parts = tiny_parts("sd_dit")
    states = [
        jax.jit(parts.init_state, compiler_options=options)(jax.random.key(3))
        for options in (None, cpu.init_compiler_options())
    ]
    assert cpu.init_compiler_options()
    jax.tree.map(np.testing.assert_array_equal, *states)

"""What the commands ask of XLA and glibc where there is no accelerator."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_parts

from sddit_jax.parallel import cpu

# XLA's own choice, which conftest.py lowers.
FULL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

# Runs a program with 64 MiB of working memory ten times, and prints how many pages came anew in each.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from sddit_jax.parallel import cpu

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_working_memory_is_kept_between_executions():
    """Without it each execution gets its memory from the system again, in pages of 4 KiB."""

    def pages_of(name):
        command, environment = [sys.executable, "-c", PROGRAM, name], os.environ | {"XLA_FLAGS": ""}
        return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    pages = {name: pages_of(name) for name in ("as it is", "kept")}
    assert pages["as it is"] > 2**13
    assert pages["kept"] < pages["as it is"] / 4


@pytest.mark.slow
def test_a_quick_initialisation_gives_the_same_bits():
    parts = tiny_parts("sd_dit")
    states = [
        jax.jit(parts.init_state, compiler_options=options)(jax.random.key(3))
        for options in (FULL, cpu.init_compiler_options())
    ]
    assert cpu.init_compiler_options()
    jax.tree.map(np.testing.assert_array_equal, *states)

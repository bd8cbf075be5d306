"""Eight CPU devices on any machine and no broadcasting between ranks, in subprocesses too; and what they share."""

import atexit
import os
import shutil
import tempfile

# Read by jax when it is imported, so this stays ahead of any import of it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Commands in subprocesses, of which many compile the same, share one cache; pytest's own workers inherit its name.
if "SDDIT_TEST_CACHE" not in os.environ:
    os.environ["SDDIT_TEST_CACHE"] = tempfile.mkdtemp(prefix="sddit_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["SDDIT_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["SDDIT_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax

# Tests look into what this process compiles, and a program from a cache has less to show.
jax.config.update("jax_enable_compilation_cache", False)
# The first example of a property compiles.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")

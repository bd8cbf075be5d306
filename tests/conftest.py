"""Eight CPU devices on any machine and no broadcasting between ranks, in subprocesses too; and what they share."""

import atexit
import os
import shutil
import tempfile

# Read by jax when it is imported, so this stays ahead of any import of it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Most programs of tests compute for microseconds and compile for seconds, so little is optimised.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# All processes, of which many compile the same, share one cache; pytest's own workers inherit its name.
if "SDDIT_TEST_CACHE" not in os.environ:
    os.environ["SDDIT_TEST_CACHE"] = tempfile.mkdtemp(prefix="sddit_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["SDDIT_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["SDDIT_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from collections.abc import Iterator

import commands
import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# The first example of a property compiles.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")


@pytest.fixture
def uncached() -> Iterator[None]:
    """For tests that read compiled programs: one from the cache may have less to show."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def command() -> Iterator[commands.Commands]:
    """command(name, *arguments, cwd=ROOT): `python -m sddit_jax.name arguments` on one device, ended."""
    with commands.serving() as run:
        yield run

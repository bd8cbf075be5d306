"""Eight CPU devices on any machine and no broadcasting between ranks, in subprocesses too."""

import os

# Read by jax when it is imported, so this stays ahead of any import of it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis

# The first example of a property compiles.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")

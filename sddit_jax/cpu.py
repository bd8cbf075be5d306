"""Training on CPUs: kernels with several results, and memory that is kept from step to step."""

import ctypes
import os

import jax

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Of XLA, which other backends do not read.
MULTI_OUTPUT_FUSION = "xla_cpu_use_multi_output_fusion=true"


def fuse_outputs() -> None:
    """XLA's CPU compiler makes one kernel of several results of the same arrays, as it does on TPU and GPU.

    Above all of a parameter, its moments and its means at the end of a step: half as many kernels to compile, and less
    to read. To be called before a JAX backend is touched; options in XLA_FLAGS that set this field stay as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options={MULTI_OUTPUT_FUSION}".lstrip()


def keep_working_memory() -> None:
    """Where there is no accelerator, the memory that a step has freed stays for the next one.

    XLA's CPU client takes the working memory of a program from malloc as one block at each execution, and glibc gives
    a block of that size back to the system at once; the next step waits for its pages to come anew. Kept are blocks of
    the main thread, so programs are executed in the thread that calls them, unless a JAX backend has been touched
    before, as several processes do to meet. Without glibc nothing is kept.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)

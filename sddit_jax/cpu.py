"""Running on CPUs: kernels with several results, memory that is kept from step to step, and a quick initialisation."""

import ctypes
import os

import jax

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Of XLA; other backends do not read it.
MULTI_OUTPUT_FUSION = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"


def fuse_outputs() -> None:
    """XLA's CPU compiler makes one kernel of several results of the same arrays, as it does on TPU and GPU.

    Above all of a parameter, its moments and its means at the end of a step: half as many kernels to compile, and less
    to read. To be called before a JAX backend is touched. What XLA_FLAGS says of the same option counts for more; an
    XLA_FLAGS that names a file stays as it is.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if MULTI_OUTPUT_FUSION not in flags and (not flags or flags.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{MULTI_OUTPUT_FUSION} {flags}".strip()


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


def init_compiler_options() -> dict[str, int] | None:
    """For jax.jit of what makes a run's first state, once: on CPUs less optimisation, in half the time.

    The numbers are the same bits. XLA's GPU compiler knows no such level.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

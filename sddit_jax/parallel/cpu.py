"""Settings for CPUs: working memory that stays allocated between steps, and faster compilation of the first state."""

import ctypes

import jax

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_working_memory() -> None:
    """Without an accelerator, keeps the memory that a step frees for the next step. Does nothing without glibc.

    XLA's CPU client allocates a program's working memory by one malloc at each execution. glibc returns a block of that
    size to the system when it is freed, and the next step waits for new pages. mallopt changes that for the main thread
    only, so this function also makes JAX execute programs in the thread that calls them. That setting has no effect if
    a JAX backend is in use already, as it is in a run of several processes.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def init_compiler_options() -> dict[str, int] | None:
    """Compiler options for jax.jit of a run's first state: on CPUs less optimisation, which takes half the time.

    The state has the same bits. XLA's GPU compiler does not know this option.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

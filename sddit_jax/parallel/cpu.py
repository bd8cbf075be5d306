"""Running on CPUs: memory that is kept from step to step, and a quick initialisation."""

import ctypes

import jax

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


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

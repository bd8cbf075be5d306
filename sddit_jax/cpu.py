"""Training on CPUs: memory that is kept from step to step."""

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

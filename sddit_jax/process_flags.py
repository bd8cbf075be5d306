"""The flags of commands that run on one process or on several."""

from absl import flags

from sddit_jax.parallel import cpu, distributed

DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "How the processes of a run find each other. off: there is one process; auto: as Cloud TPU, GKE, SLURM or Open MPI "
    "say; HOST:PORT: process 0 runs on HOST and listens at PORT.",
)
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "For HOST:PORT: number of this process, from 0.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "For HOST:PORT: number of processes.")
WAIT = flags.DEFINE_integer("wait_seconds", 300, "Seconds that the processes wait for each other at the start.", 1)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "After so many silent seconds a process counts as dead, and the others end.", 1
)


def start_processes() -> None:
    """Connects the processes of a run as the flags say; call it before anything touches a JAX backend."""
    distributed.start(DISTRIBUTED.value, PROCESS_INDEX.value, PROCESS_COUNT.value, WAIT.value, HEARTBEAT.value)
    cpu.keep_working_memory()

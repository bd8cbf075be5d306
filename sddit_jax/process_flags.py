"""The flags of the commands that several processes can run as one."""

from absl import flags

from sddit_jax.parallel import cpu, distributed

DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "Several processes as one run: off; auto on Cloud TPU, GKE and SLURM; or HOST:PORT, where process 0 runs.",
)
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "For HOST:PORT: which of the processes this is, from 0.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "For HOST:PORT: how many processes there are.")
WAIT = flags.DEFINE_integer("wait_seconds", 300, "How long the processes wait for each other at the start.", 1)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "A process not heard of for so long counts as dead, and the others end.", 1
)


def start_processes() -> None:
    """Does what the flags say; see `distributed.start` and `cpu.keep_working_memory`."""
    distributed.start(
        DISTRIBUTED.value,
        PROCESS_INDEX.value,
        PROCESS_COUNT.value,
        wait_seconds=WAIT.value,
        heartbeat_seconds=HEARTBEAT.value,
    )
    cpu.keep_working_memory()

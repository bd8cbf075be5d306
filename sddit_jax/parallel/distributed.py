"""Several processes that train or sample as one run: how they connect, agree, and end.

Before JAX connects them, the processes meet over sockets of this module: process 0 listens, the others report to it,
and process 0 tells all of them what is wrong. `jax.distributed.initialize` does not check: in JAX 0.10 and 0.12 it
aborts the process if another one is missing or the port is taken, and starts if they disagree on their number.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import multihost

from sddit_jax.errors import CommandError, Unreachable, UserError
from sddit_jax.parallel.signals import stop_signals

log = logging.getLogger("sddit_jax")

# The processes that have reported to process 0: the index of each, and the connection on which it waits for the answer.
Waiting = list[tuple[int, socket.socket]]
# A process that ends with an error waits so long for the others to end too.
LEAVING_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """The number of a process, `index`, among `count` processes; process 0 listens at host:port."""

    host: str
    port: int
    index: int
    count: int
    local_device_ids: Sequence[int] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT; an IPv6 host stands in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def start(
    distributed: str,
    process_index: int | None = None,
    process_count: int | None = None,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Makes this process one of several. Call it before anything touches a JAX backend.

    Args:
      distributed: "off": there is one process. "auto": JAX finds number, count and address, on Cloud TPU, GKE, SLURM
        and Open MPI. HOST:PORT: process 0 runs on HOST, where PORT is free.
      process_index: number of this process, from 0; for HOST:PORT only.
      process_count: number of processes; for HOST:PORT only.
      wait_seconds: how long the processes wait for each other.
      heartbeat_seconds: JAX counts a process as dead after so many silent seconds, and ends the others.

    Raises:
      UserError: the arguments are wrong, or the processes have different ones.
      Unreachable: a process did not come in time, or the port is in use.
    """
    if distributed in ("off", "auto") and (process_index, process_count) != (None, None):
        raise UserError(
            f"--distributed={distributed}, but --process_index and --process_count are for --distributed=HOST:PORT; "
            "leave them out"
        )
    if distributed == "off":
        return
    deadline = time.monotonic() + wait_seconds
    place = _detect(wait_seconds) if distributed == "auto" else _explicit(distributed, process_index, process_count)
    if place.index == 0:
        _receive(place, wait_seconds, deadline)
    else:
        _join(place, wait_seconds, deadline)
        log.setLevel(logging.ERROR)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=wait_seconds,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    if jax.process_count() > 1:
        _connect_devices()
    log.info("%d processes with %d devices", place.count, len(jax.devices()))


@contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Gives stopped() -> the name of the SIGTERM or SIGINT that this run got, or "". A second Ctrl-C ends at once.

    All processes have to call stopped() equally often. When one of them gets a signal, JAX, which handles SIGTERM in a
    run of several processes, chooses the call at which stopped() tells all of them.
    """
    if not jax.distributed.is_initialized():
        with stop_signals() as received:
            yield lambda: received[0] if received else ""
        return

    def as_sigterm(number: int, frame: Any) -> None:
        del frame
        signal.signal(number, previous)
        signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, as_sigterm)
    questions = itertools.count()
    try:
        yield lambda: "SIGTERM" if multihost_utils.reached_preemption_sync_point(next(questions)) else ""
    finally:
        signal.signal(signal.SIGINT, previous)


def decided_by_primary(decide: Callable[[], Any]) -> Any:
    """Calls decide() on process 0 alone, and returns its result, a JSON value, on every process.

    The other processes wait for it. Raises on every process the UserError that decide() raises on process 0.
    """
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except UserError as error:
            if jax.process_count() == 1:
                raise
            answer = {"error": str(error)}
    if jax.process_count() > 1:
        content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
        content = content if jax.process_index() == 0 else np.zeros(size, np.uint8)
        answer = json.loads(multihost_utils.broadcast_one_to_all(content).tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def leave(exit_code: int) -> None:
    """Ends this process with `exit_code`, after an error, if it is one of several; returns if it is alone.

    One signal or one mistake usually ends all processes, and then they disconnect together. If the others do not end
    within LEAVING_SECONDS, this process exits without them, because JAX's shutdown would wait for them and abort. They
    end when they miss its heartbeat.
    """
    if not jax.distributed.is_initialized():
        return
    if error := sys.exception():
        traceback.print_exception(error)
    with contextlib.suppress(RuntimeError):
        multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=1000 * LEAVING_SECONDS)
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # sys.exit would wait for threads, and these may wait for other processes.
    os._exit(exit_code)


def _connect_devices() -> None:
    """Computes a sum over all devices: they connect at their first collective.

    CPU devices give up if another process comes to that collective half a minute late. Here none is late; later, one
    may still be compiling.
    """
    devices = Mesh(jax.devices(), "all")
    ones_N = jax.make_array_from_callback(
        (devices.size,), NamedSharding(devices, jax.P("all")), lambda _: np.ones(1, np.float32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(devices, jax.P()))(ones_N))


def _explicit(address: str, index: int | None, count: int | None) -> ProcessPlace:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--distributed={address}: it should be off, auto or HOST:PORT, such as 10.0.0.1:1234")
    if index is None or count is None:
        raise UserError(f"--distributed={address} needs --process_index=I and --process_count=N")
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} --process_count={count}: processes are numbered 0 to {count - 1}")
    return ProcessPlace(host.removeprefix("[").removesuffix("]"), int(port), index, count)


def _detect(wait_seconds: int) -> ProcessPlace:
    """What `jax.distributed.initialize()` would detect; JAX has no public function that tells it."""
    from jax._src.clusters import ClusterEnv

    known = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, count, index, device_ids = ClusterEnv.auto_detect_unset_distributed_params(
            known, None, None, None, None, wait_seconds
        )
    except (OSError, RuntimeError) as error:
        raise Unreachable(f"--distributed=auto: {error}") from error
    if address is None or count is None or index is None:
        raise UserError(
            "--distributed=auto: this is none of Cloud TPU, GKE, SLURM and Open MPI; give the address of process 0, as "
            "in --distributed=10.0.0.1:1234 --process_index=0 --process_count=2"
        )
    host, _, port = address.rpartition(":")
    return ProcessPlace(host.removeprefix("[").removesuffix("]"), int(port), index, count, device_ids)


def _receive(place: ProcessPlace, wait_seconds: int, deadline: float) -> None:
    """Process 0: waits for a message from each other process, then tells all of them that all are there, or why not."""
    try:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", place.port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            backlog=place.count,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"process 0 cannot listen at port {place.port} of {place.host}: {error}") from error
        raise Unreachable(
            f"port {place.port} of {place.host} is in use: by another run, by an earlier run that has not ended, or by "
            f"a second process with --process_index=0; give each run its own port"
        ) from error
    waiting: Waiting = []
    answer = {}
    try:
        with server:
            while len(_still_here(waiting)) < place.count - 1:
                _admit(server, place, waiting, wait_seconds, deadline)
    except CommandError as error:
        answer = {"error": str(error), "mistake": isinstance(error, UserError)}
        raise
    finally:
        for _, connection in waiting:
            with contextlib.suppress(OSError), connection:
                connection.sendall(json.dumps(answer).encode() + b"\n")


def _admit(server: socket.socket, place: ProcessPlace, waiting: Waiting, wait_seconds: int, deadline: float) -> None:
    """Accepts one process, and adds it to `waiting`."""
    server.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        connection, _ = server.accept()
    except TimeoutError as error:
        missing = set(range(1, place.count)) - {index for index, _ in waiting}
        raise Unreachable(
            f"of {place.count} processes {', '.join(map(str, sorted(missing)))} did not come to {place.address} within "
            f"{wait_seconds} s; start each of them, on a machine that can reach this address"
        ) from error
    try:
        connection.settimeout(5)
        message = json.loads(connection.makefile("rb").readline(1000))
        index, count = int(message["index"]), int(message["count"])
    except (OSError, ValueError, TypeError, KeyError):
        # Not a process of this run: perhaps a port scan.
        connection.close()
        return
    _still_here(waiting).append((index, connection))
    if count != place.count:
        raise UserError(f"process {index} has --process_count={count}, but process 0 has {place.count}")
    if index == 0 or [i for i, _ in waiting].count(index) > 1:
        raise UserError(f"two processes have --process_index={index}; each of 0 to {count - 1} is needed once")


def _still_here(waiting: Waiting) -> Waiting:
    """The list, after removal of the processes that closed their connection; they may be started again."""
    waiting[:] = [(index, connection) for index, connection in waiting if not _has_gone(connection)]
    return waiting


def _has_gone(connection: socket.socket) -> bool:
    """Whether the process at the other end has closed the connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _join(place: ProcessPlace, wait_seconds: int, deadline: float) -> None:
    """Every process but 0: reports to process 0 and waits until that answers that all are there."""
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((place.host, place.port), timeout=min(left, 5)) as connection:
                connection.sendall(json.dumps({"index": place.index, "count": place.count}).encode() + b"\n")
                # If process 0 started later, it also gives up later, and its answer names the missing processes.
                connection.settimeout(left + wait_seconds)
                answer = json.loads(connection.makefile("rb").readline())
        except (OSError, ValueError) as error:
            reason = str(error)
            time.sleep(min(left, 0.2))
            continue
        if "error" in answer:
            raise (UserError if answer["mistake"] else Unreachable)(f"process 0 says: {answer['error']}")
        return
    raise Unreachable(
        f"process 0 was not found at {place.address} within {wait_seconds} s ({reason}); start it there, and open "
        f"the port to this machine"
    )

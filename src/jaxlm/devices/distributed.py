"""Multi-process runs (multi-host GPUs and TPUs): initialization, collective helpers, and the coordinator.

jax.distributed does the work. It detects SLURM, Open MPI, GKE and Cloud TPUs, and ends a process when another one dies.
Every process runs the same program on the same input (SPMD). Process 0 is the coordinator: it alone prints, writes
results, reads stdin and draws seeds, and broadcasts what the others need. Every process prints its errors and writes
its part of training checkpoints. Functions marked "A collective" must be called by all processes.
"""

import json
import os
from collections.abc import Callable
from typing import Any

# jax is imported where it is used: commands call `num_launched` before they know whether they need jax.
CONNECT = 120  # timeout in seconds for all processes to connect
HEARTBEAT = 20  # timeout in seconds after which a silent process counts as dead and the others end
HEAD = 512  # bytes of the first message of broadcast_bytes: its length, and the beginning
ERROR_GRACE = 5  # seconds that the coordinator stays after an error, so that the other processes can print theirs
# Environment variables in which launchers give the number of processes.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def num_launched() -> int:
    """Number of processes that a launcher (SLURM, Open MPI, Cloud TPU) has started; 1 without a launcher."""
    counts = [os.environ.get(name, "") for name in COUNTS]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max([len(hosts), *(int(count) for count in counts if count.isdecimal())])


def start(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, detect: bool = False
) -> None:
    """Initializes jax.distributed. Call it before the first use of a device.

    Without arguments it does nothing unless a launcher has started several processes; the cluster then gives the
    addresses.

    Args:
        coordinator: Address HOST:PORT of process 0. count and index must be given with it.
        count: Number of processes.
        index: Index of this process.
        detect: Detect the cluster even where no launcher is known.

    Raises:
        ValueError: The arguments are incomplete or invalid, or no cluster was detected.
    """
    explicit = (coordinator, count, index)
    if any(value is not None for value in explicit):
        if None in explicit:
            raise ValueError("--coordinator HOST:PORT, --num-processes and --process-id must be given together")
        _check(str(coordinator), count or 0, index or 0)
    elif not detect and num_launched() < 2:
        return
    import jax

    options: dict[str, Any] = {"initialization_timeout": CONNECT, "heartbeat_timeout_seconds": HEARTBEAT}
    if coordinator is not None:
        options["cluster_detection_method"] = "deactivate"
        if coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost"):  # the default listens on all interfaces
            options["coordinator_bind_address"] = coordinator
    try:  # if the other processes do not connect, jax ends this process after CONNECT seconds
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=HEARTBEAT, **options)
    except ValueError as error:
        raise ValueError(
            f"no cluster was detected ({error}): give --coordinator HOST:PORT, --num-processes and --process-id"
        ) from None


def preempted(step: int) -> bool:
    """Whether all processes are to stop after this step, because one of them received SIGTERM. A collective: each calls
    it after every step. False if jax does not catch the signal (jax_enable_preemption_service)."""
    import jax
    from jax.experimental import multihost_utils

    if not jax.config.jax_enable_preemption_service:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return multihost_utils.reached_preemption_sync_point(step)


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator {coordinator}: write HOST:PORT, the address of process 0")
    if not 0 <= index < count:
        raise ValueError(f"--process-id {index} of --num-processes {count}: use 0 to {count - 1}")


def process_index() -> int | None:
    """Index of this process; None before `start`, and in a single process."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else None


def is_multiprocess() -> bool:
    """Whether the program runs in more than one process."""
    import jax

    return jax.process_count() > 1


def is_coordinator() -> bool:
    """Whether this is process 0, which prints and writes files."""
    import jax

    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """All-gather of strings: the text of each process, in order. A collective."""
    if not is_multiprocess():
        return [text]
    import numpy as np

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = _rows(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(data)] = data
    return [bytes(row[:length]).decode() for row, length in zip(_rows(padded), lengths)]


def _rows(local: Any) -> Any:
    """All-gather of arrays: the array [n] of each process as a row of [processes,n]."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    sharded = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), local[None])
    with jax.set_mesh(mesh):
        replicated = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(sharded)
    return np.asarray(replicated.addressable_data(0))


def _identity(x: Any) -> Any:
    return x


def broadcast_bytes(data: bytes) -> bytes:
    """The bytes of the coordinator, in every process. Short ones take a single program, without compiling. A
    collective."""
    import numpy as np

    head = np.zeros(HEAD, np.uint8)
    head[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    first = data[: HEAD - 8]
    head[8 : 8 + len(first)] = np.frombuffer(first, np.uint8)
    head = _rows(head)[0].tobytes()
    size = int.from_bytes(head[:8], "little")
    rest = size - (HEAD - 8)
    if rest <= 0:
        return head[8 : 8 + size]
    tail = np.zeros(1 << (rest - 1).bit_length(), np.uint8)  # few lengths, so that few programs are compiled
    more = data[HEAD - 8 :]
    tail[: len(more)] = np.frombuffer(more, np.uint8)
    return head[8:] + _rows(tail)[0].tobytes()[:rest]


def broadcast(text: str) -> str:
    """The text of the coordinator, in every process. A collective."""
    return gather(text if is_coordinator() else "")[0]


def run_on_coordinator(act: Callable[[], Any]) -> Any:
    """Calls `act` on the coordinator and broadcasts its result, which must be JSON. A collective.

    Raises:
        ValueError: In every process, when `act` raises a ValueError or OSError on the coordinator.
    """
    failure, value = None, None
    if is_coordinator():
        try:
            value = act()
        except (ValueError, OSError) as error:
            failure = error
    if not is_multiprocess():
        if failure:
            raise failure
        return value
    message, value = json.loads(broadcast(json.dumps([failure and str(failure), value])))
    if message:
        raise ValueError(message) from failure
    return value


def assert_equal(what: str, value: Any, description: str) -> None:
    """Checks that a value is the same in all processes. A collective.

    Args:
        what: Name of the value in the message.
        value: Compared by its repr.
        description: The value in the message.

    Raises:
        ValueError: In every process, with the descriptions of process 0 and of the first one that differs.
    """
    first, *others = (json.loads(text) for text in gather(json.dumps([repr(value), description])))
    for index, other in enumerate(others, 1):
        if other[0] != first[0]:
            raise ValueError(
                f"the processes disagree about {what}: process 0 has {first[1]}, process {index} has {other[1]}. "
                "Start all processes with the same command and the same files"
            )

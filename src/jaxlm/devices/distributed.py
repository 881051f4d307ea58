"""Several processes that run one program together: how they find each other, agree, and end together.

jax.distributed does the work: it knows SLURM, Open MPI, GKE and Cloud TPUs, and ends a process whose partner has died.
Every process runs the same program on the same input; what only one of them can know (a seed that was drawn, what
stands on stdin) is process 0's. Only process 0 prints and writes.
"""

import json
import os
from collections.abc import Callable
from typing import Any

# jax is imported where it is used: a command asks `launched` before it knows whether it needs jax.
CONNECT = 120  # seconds to wait for all processes at the start
HEARTBEAT = 20  # seconds after which a silent process is taken for dead, and the others end
# What a launcher tells each of the processes that it starts: how many there are.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def num_launched() -> int:
    """How many processes a launcher says that it has started; 1 where none has."""
    counts = [os.environ.get(name, "") for name in COUNTS]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max([len(hosts), *(int(count) for count in counts if count.isdecimal())])


def start(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, detect: bool = False
) -> None:
    """Joins the other processes, before the first use of a device: as the arguments say (the address HOST:PORT of
    process 0, how many there are, which one this is), else as the cluster says where a launcher has started several
    (or `detect` asks to look). ValueError where they say nothing.
    """
    given = (coordinator, count, index)
    if any(value is not None for value in given):
        if None in given:
            raise ValueError(
                "--coordinator HOST:PORT, --num-processes and --process-id belong together: give all three"
            )
        _check(str(coordinator), count or 0, index or 0)
    elif not detect and num_launched() < 2:
        return
    import jax

    options: dict[str, Any] = {"initialization_timeout": CONNECT, "heartbeat_timeout_seconds": HEARTBEAT}
    if coordinator is not None:
        options["cluster_detection_method"] = "deactivate"
        if coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost"):  # by default it would listen everywhere
            options["coordinator_bind_address"] = coordinator
    try:  # where the others do not come, jax itself ends this process after CONNECT seconds
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=HEARTBEAT, **options)
    except ValueError as error:
        raise ValueError(
            f"no cluster was found ({error}): give --coordinator HOST:PORT, --num-processes and --process-id"
        ) from None


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator {coordinator}: write HOST:PORT, the address of process 0")
    if not 0 <= index < count:
        raise ValueError(f"--process-id {index} of --num-processes {count}: they are numbered 0 to {count - 1}")


def process_index() -> int | None:
    """Which of several processes this is; None before they have met, or if it is alone."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else None


def is_multiprocess() -> bool:
    """Whether this process is one of several."""
    import jax

    return jax.process_count() > 1


def is_coordinator() -> bool:
    """Whether this process prints and writes."""
    import jax

    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What each process says, in their order. All of them must call it."""
    if not is_multiprocess():
        return [text]
    import numpy as np

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = _rows(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(data)] = data
    return [bytes(row[:length]).decode() for row, length in zip(_rows(padded), lengths)]


def _rows(mine: Any) -> Any:
    """The array [n] of each process as the rows of one [processes, n], in all of them."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    divided = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), mine[None])
    with jax.set_mesh(mesh):
        whole = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(divided)
    return np.asarray(whole.addressable_data(0))


def _same(x: Any) -> Any:
    return x


def broadcast(text: str) -> str:
    """What process 0 says. All of them must call it."""
    return gather(text if is_coordinator() else "")[0]


def run_on_coordinator(act: Callable[[], Any]) -> Any:
    """What `act` returns (as JSON) on process 0, which alone calls it; a ValueError or OSError there is raised in all.
    All of them must call it."""
    problem, value = None, None
    if is_coordinator():
        try:
            value = act()
        except (ValueError, OSError) as error:
            problem = error
    if not is_multiprocess():
        if problem:
            raise problem
        return value
    told, value = json.loads(broadcast(json.dumps([problem and str(problem), value])))
    if told:
        raise ValueError(told) from problem
    return value


def assert_equal(what: str, value: Any, told: str) -> None:
    """ValueError unless a value (its repr) is the same in all processes, with what the first two that differ `told` of
    it. All of them must call it."""
    sides = [json.loads(side) for side in gather(json.dumps([repr(value), told]))]
    for number, side in enumerate(sides):
        if side[0] != sides[0][0]:
            raise ValueError(
                f"the processes disagree about {what}: process 0 has {sides[0][1]}, process {number} has {side[1]}. "
                "Start all of them with the same command and the same files"
            )

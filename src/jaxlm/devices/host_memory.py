"""Free memory of the host: what the system has, and what the container's cgroup limit leaves.

In a container, /proc/meminfo is that of the whole machine. A process that exceeds the limit of its cgroup is killed.
"""

from collections.abc import Iterator
from pathlib import Path

MEMINFO, CGROUP, CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Names of the limit, of what is in use, and of the part of it that is a cache of files and can be reclaimed.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def host_memory(field: str) -> int | None:
    """A field of /proc/meminfo in bytes; None on systems without it."""
    lines = (_text(MEMINFO) or "").splitlines()
    kilobytes = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def available() -> int | None:
    """Free memory for this process in bytes: the least that the system and each limit leave; None if unknown."""
    free = [host_memory("MemAvailable"), *_left_by_cgroups()]
    return min((n for n in free if n is not None), default=None)


def _left_by_cgroups() -> Iterator[int]:
    """Yields what the limit of each cgroup of this process leaves, in bytes."""
    for line in (_text(CGROUP) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS / "memory", V1) if controllers else (CGROUPS, V2)
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:  # within a container, the folders of a path may not exist
            if not folder.is_relative_to(root):
                break
            if (left := _left(folder, *names)) is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    most, used = _text(folder / limit), _text(folder / usage)
    if most is None or used is None or most.strip() == "max":
        return None
    counts = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
    return max(int(most) - int(used) + int(counts.get(cached, 0)), 0)


def _text(path: Path) -> str | None:
    """The contents of a file; None if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return None

"""Free memory of the host, with the limits of control groups."""

import pytest

from jaxlm.devices import host_memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a system whose process is in the cgroups of `lines`, from {path: contents}."""

    def write(lines: str, files: dict[str, str]) -> int | None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
        (tmp_path / "cgroup").write_text(lines)
        for path, text in files.items():
            (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / path).write_text(text)
        return host_memory.available()

    for name, path in (("MEMINFO", "meminfo"), ("CGROUP", "cgroup"), ("CGROUPS", "fs")):
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    return write


def limits(group: str, limit: int | str, used: int, cached: int = 0) -> dict[str, str]:
    group = f"{group}/" if group else ""
    stat = f"anon 1\ninactive_file {cached}\nactive_file 7\n"
    return {f"{group}memory.max": f"{limit}\n", f"{group}memory.current": f"{used}\n", f"{group}memory.stat": stat}


def test_a_system_without_limits(system):
    assert system("", {}) == 8 * GIB
    assert system("0::/\n", limits("", "max", GIB)) == 8 * GIB
    assert system("7:cpu:/x\n", {"memory/memory.limit_in_bytes": "1", "memory/memory.usage_in_bytes": "0"}) == 8 * GIB


def test_the_least_limit_of_a_group_and_its_parents(system):
    files = limits("", "max", GIB) | limits("a", 6 * GIB, 3 * GIB) | limits("a/b", 5 * GIB, 3 * GIB)
    assert system("0::/a/b\n", files) == 2 * GIB
    assert system("0::/a\n", {}) == 3 * GIB
    assert system("0::/elsewhere/in/the/host\n", limits("", 4 * GIB, GIB)) == 3 * GIB  # seen from a container


def test_cached_files_can_be_reclaimed(system):
    assert system("0::/\n", limits("", 4 * GIB, 3 * GIB, GIB // 2)) == GIB + GIB // 2


def test_more_in_use_than_the_limit(system):
    assert system("0::/\n", limits("", GIB, 2 * GIB)) == 0


def test_a_limit_above_what_the_system_has(system):
    assert system("0::/\n", limits("", 64 * GIB, 0)) == 8 * GIB


def test_the_first_version_of_cgroups(system):
    files = {
        "memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/job/memory.usage_in_bytes": f"{GIB}\n",
        "memory/job/memory.stat": f"total_inactive_file {GIB // 4}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "0\n",
    }
    assert system("4:memory:/job\n1:cpu:/\n0::/\n", files) == GIB + GIB // 4


def test_a_system_without_proc(tmp_path, monkeypatch):
    for name in ("MEMINFO", "CGROUP", "CGROUPS"):
        monkeypatch.setattr(host_memory, name, tmp_path / "absent")
    assert host_memory.available() is None

"""Atomic writes: a failure at any point leaves the old file, and a new one is on disk before it gets its name."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from jaxlm.checkpoint.atomic import atomic_file, is_disk_full, write_atomically


@pytest.mark.parametrize("data", ["naïve\n", b"\0\xff"])
def test_a_file_is_written_and_replaced(data, tmp_path):
    path = tmp_path / "x"
    write_atomically(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    write_atomically(path, "other")
    assert path.read_text() == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def fail_in_block(monkeypatch):
    return KeyboardInterrupt


def fail_in_fsync(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    return OSError


def fail_in_replace(monkeypatch):
    def replace(a, b):
        raise PermissionError(errno.EACCES, "no", str(a))

    monkeypatch.setattr(os, "replace", replace)
    return PermissionError


@pytest.mark.parametrize("fault", [fail_in_block, fail_in_fsync, fail_in_replace])
def test_a_failure_leaves_the_old_file(fault, tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")
    error = fault(monkeypatch)

    def write():
        with atomic_file(path) as file:
            file.write(b"new")
            if error is KeyboardInterrupt:
                raise error

    with pytest.raises(error) as caught:
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    if error is PermissionError:
        assert caught.value.filename == str(path)  # not the hidden one


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "x", "new")
    assert events == ["sync", "rename", "sync"]  # the file, then its folder


def test_links_and_permissions_stay(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, "text")
    with pytest.raises(FileNotFoundError, match="x"):
        write_atomically(tmp_path / "absent" / "x", "text")


KILLED = """
import sys, time
from pathlib import Path
from jaxlm.checkpoint.atomic import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk():
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert is_disk_full(OSError(errno.EDQUOT, "full"))
    assert not is_disk_full(OSError(errno.EIO, "other"))
    assert not is_disk_full(ValueError("full"))

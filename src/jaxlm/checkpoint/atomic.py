"""Files and folders that get their name only when they are complete and on disk. A crash leaves the old one whole."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jaxlm.checkpoint.download import count_bytes
from jaxlm.checkpoint.safetensors import listed

_FREE_SPACE = "free some space, or choose a folder on another disk"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file (text as UTF-8). The file at `path` is replaced when the new one is on disk."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces the one at `path` when the block ends; if the block fails, nothing changes. A link
    stays a link to the new file, and permissions stay."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe; a folder is an OSError
        with open(path, "wb") as file:
            yield file
        return
    partial = _hidden(path, "partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
        raise


@contextmanager
def staged(out: Path, needed: int, replace: bool, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A hidden folder next to `out`. When the block ends its files are synced to disk and it is renamed to `out`; if
    the block fails it is removed.

    Args:
        out: the folder to write.
        needed: bytes that it takes; OSError if the disk has less.
        replace: replace a folder at `out`.
        check: called right before the rename, and may raise: writing takes long, and `out` may have changed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_space(out, needed)
    partial = _hidden(out, "partial")
    with _explained(out):
        try:
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            check()
            _rename(partial, out, replace)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def staged_file(out: Path, needed: int, check: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """A binary file that replaces the one at `out` when the block ends. The arguments are those of `staged`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_space(out, needed)
    with _explained(out), atomic_file(out) as file:
        yield file
        check()


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """An error for a full disk says what was left on it."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise OSError(f"the disk of {out.parent} is full, and nothing was left on it: {_FREE_SPACE}") from error
        raise


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if 0 < free < needed:  # some network file systems report 0 for unknown
        names = (path.name for path in out.parent.iterdir())
        left = [name for name in names if name.startswith(f".{out.name}.") and name.endswith(".partial")]
        killed = f"; an export that was killed left {listed(left)} there" if left else ""
        needs = f"{out} needs {count_bytes(needed)} and its disk has {count_bytes(free)} free"
        raise OSError(f"{needs}: {_FREE_SPACE}{killed}")


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _rename(partial: Path, out: Path, replace: bool) -> None:
    """Renames `partial` to `out`. A folder at `out` is moved aside first, and back if anything fails or interrupts."""
    old = _hidden(out, "old")
    try:
        if replace and out.exists():
            os.rename(out, old)
        os.rename(partial, out)  # also over an empty folder; OSError over any other
        _sync(out.parent)
    except BaseException:
        if old.exists() and not partial.exists():  # `out` is the new folder already
            os.rename(out, partial)
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)

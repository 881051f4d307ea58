"""Resumable downloads of weight files from the hub into huggingface_hub's cache.

huggingface_hub (as of 2.4) discards an unfinished file, and a model takes longer to download than many connections
last. Here a file is streamed next to its blob; the next call requests the rest (HTTP Range), and the complete file is
checked against the hub's sha256 before it enters the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

THREADS = 4
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between attempts without progress; then the download fails
_SILENCE = 10.0  # seconds without a byte after which an attempt ends, as in huggingface_hub
_LARGEST = 50 * 10**9  # bytes that the hub serves by plain HTTP
_TRANSIENT = (408, 429, 500, 502, 503, 504)
AGAIN = "run again to resume the download"
ROOM = f"Free some space (`hf cache ls`, `hf cache rm`) or set HF_HOME to a larger disk, then {AGAIN}"


def download(repo: str, folder: Path, files: dict[str, Any], token: str | None) -> None:
    """Downloads weight files (metadata by name) into the cache and links them into the snapshot `folder`."""
    from huggingface_hub import hf_hub_download

    storage = folder.parent.parent
    blobs = {name: storage / "blobs" / file.etag for name, file in files.items() if _streamable(file)}
    total, have = sum(file.size or 0 for file in files.values()), sum(_size(blob) for blob in blobs.values())
    streamed, free = sum(files[name].size for name in blobs), shutil.disk_usage(storage).free
    if 0 < free < total - have:  # some network file systems report 0 for unknown
        needed = count_bytes(total - have)
        raise OSError(f"{repo} needs {needed} more and {storage} has {count_bytes(free)} free. {ROOM}")
    stop = threading.Event()

    def one(name: str) -> None:
        if name in blobs:
            _blob(repo, name, files[name], blobs[name], token, stop)
        hf_hub_download(repo, name, revision=folder.name, token=token)  # finds the blob and links it

    pool = ThreadPoolExecutor(THREADS)
    pending = {pool.submit(one, name) for name in files}
    bar = _bar(f"{repo} ({len(blobs)} file{'s' * (len(blobs) > 1)})", streamed, have)
    try:
        while pending:
            done, pending = wait(pending, timeout=0.2)
            for future in done:
                future.result()
            bar.update(sum(_size(blob) for blob in blobs.values()) - bar.n)
    finally:
        stop.set()  # otherwise Ctrl-C, or an error of one file, would wait for the other files
        pool.shutdown(cancel_futures=True)
        bar.close()


def _streamable(file: Any) -> bool:
    """Whether to stream a file here.

    huggingface_hub downloads the largest files, which the hub serves only through hf_xet, and every file with
    HF_XET_HIGH_PERFORMANCE=1; it restarts an interrupted file. It also downloads a file whose etag has other characters
    than hex digits, because the etag becomes a file name.
    """
    fast = os.environ.get("HF_XET_HIGH_PERFORMANCE", "").upper() in ("1", "ON", "YES", "TRUE")
    plain = file.size and file.size <= _LARGEST and not fast
    return bool(plain and re.fullmatch(r"[0-9a-f]{40,64}", file.etag))


def _blob(repo: str, name: str, file: Any, blob: Path, token: str | None, stop: threading.Event) -> None:
    """Streams one file into the cache's blobs, resuming an earlier attempt."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    # The hub's address, not the one it redirects to: that one expires, and must not get the token.
    url = hf_hub_url(repo, name, revision=file.commit_hash)
    headers = {**build_hf_headers(token=token, library_name="jaxlm"), "Accept-Encoding": "identity"}
    storage, part, waits = blob.parent.parent, _part(blob), iter(_WAITS)
    lock = storage.parent / ".locks" / storage.name / f"{file.etag}.lock"  # huggingface_hub's own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        while (have := _size(blob)) < file.size:
            problem: Exception = OSError(f"{name} ended after {have} of {file.size} bytes")
            try:
                _stream(url, headers, part, stop)
            except http_error() as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT:
                    raise
                problem = error
            if _size(blob) > have:
                waits = iter(_WAITS)
            if _size(blob) < file.size:
                pause = next(waits, None)
                if pause is None:
                    raise problem
                if stop.wait(pause):
                    raise InterruptedError(f"the download of {name} was interrupted")
        if not blob.exists():
            _check(name, part, file)
            os.replace(part, blob)


def _stream(url: str, headers: dict[str, str], part: Path, stop: threading.Event) -> None:
    """One request, for the bytes that are not in `part` yet."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or _SILENCE)
    with part.open("ab") as out:
        if have := out.tell():
            headers = {**headers, "Range": f"bytes={have}-"}
        with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # a server without ranges starts from the beginning
                out.truncate(0)
            for chunk in response.iter_bytes():
                out.write(chunk)
                if stop.is_set():
                    raise InterruptedError(f"the download of {part} was interrupted")


def _check(name: str, part: Path, file: Any) -> None:
    """Checks the size and, if the etag is one, the sha256: parts of several runs must fit together."""
    right = _size(part) == file.size
    if right and len(file.etag) == 64:
        with part.open("rb") as f:
            right = hashlib.file_digest(f, "sha256").hexdigest() == file.etag
    if not right:
        part.unlink()
        raise OSError(f"{name} is damaged (its sha256 or size differs from the hub's) and was deleted: run again")


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(blob: Path) -> int:
    """Bytes of a blob on disk, complete or not."""
    for path in (blob, _part(blob)):
        if path.exists():
            return path.stat().st_size
    return 0


def _bar(text: str, total: int, have: int) -> Any:
    from huggingface_hub.utils import tqdm  # shows nothing if HF_HUB_DISABLE_PROGRESS_BARS is set

    seconds = 0.1 if sys.stderr.isatty() else 5.0  # fewer lines in a log file
    return tqdm(desc=text, total=total, initial=have, unit="B", unit_scale=True, mininterval=seconds, disable=not total)


def count_bytes(n: int) -> str:
    return f"{n:,} bytes ({n / 1e9:.1f} GB)"


def http_error() -> type[Exception]:
    """The base class of request errors: httpx's in huggingface_hub 1, httpx2's in 2."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError


def each(function: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    """function(name) for all names, a few concurrently."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(function, names))
    finally:
        pool.shutdown(cancel_futures=True)

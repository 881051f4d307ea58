"""From a checkpoint's name to a local folder: a folder is taken as it is, a Hugging Face hub id is downloaded once.

The cache is huggingface_hub's own (HF_HOME, HF_HUB_CACHE; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count too), so that
it is shared with other tools. huggingface_hub fetches the small files and notes in the cache which ones a repository
lacks; from those notes a later call knows that nothing is missing and makes no request at all. The weights are streamed
here: huggingface_hub (seen in 2.4) throws an unfinished file away, and a model takes longer to download than many
connections last. An unfinished file stays beside its blob, the next call asks for the rest (HTTP Range), and the
whole is checked against the hub's sha256 before it takes its place in the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",  # this and the next: images of a multimodal model
    "processor_config.json",
)
_THREADS = 4
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between attempts that bring no byte; then the download gives up
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_log = logging.getLogger(__name__)


def resolve(name: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool = False) -> Path:
    """The local folder of the checkpoint `name`: a folder's path, or a hub id (`org/name`), downloaded if needed.

    `revision` is a branch, tag or commit of a hub id (default: `main`). A copy that is complete in the cache is
    returned without a request, even when the branch has moved on since: name a commit to be sure of one. With `offline`
    (or HF_HUB_OFFLINE=1) the network is never touched. Python code, pickles and Meta's `original/` are never fetched.

    Raises FileNotFoundError (no such folder, repository, revision or file), PermissionError (gated, or a refused
    token), ConnectionError (no network), ValueError (a bad name, token or index) or OSError (disk full, hub at fault).
    """
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return _local(path, revision)
    repo = _repo_id(name)
    from huggingface_hub import constants

    cached = _look_up(repo, revision)
    if cached.folder and not cached.missing and not cached.unknown:
        return cached.folder
    if offline or constants.HF_HUB_OFFLINE:
        return _offline(repo, revision, cached)
    token = _checked(token)
    try:
        return _fetch(repo, revision, token)
    except (_http_error(), OSError) as error:
        explained = _explain(error, repo, revision, cached)
        if explained is None:
            raise
        raise explained from error


def _local(path: Path, revision: str | None) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: pass the folder that holds config.json and the weights")
    if not (path / CONFIG).is_file():
        found = _some(p.name for p in path.iterdir())
        raise FileNotFoundError(f"{path} is no checkpoint: it has no config.json (it holds {found})")
    if revision is not None:
        raise ValueError(f"{path} is a local folder: --revision {revision} applies to a hub id only")
    return path


def _repo_id(name: str | Path) -> str:
    from huggingface_hub.utils import validate_repo_id

    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"there is no folder {text!r} (a hub id would be written org/name)")
    try:
        validate_repo_id(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a folder nor a hub id (org/name): {error}") from None
    return text


def _checked(token: str | None) -> str | None:
    """An HTTP library that is given a malformed header quotes it in its error: refuse a malformed token before that."""
    if token is not None and not re.fullmatch(r"[!-~]+", token := token.strip()):
        raise ValueError("the token (--token) is empty or holds blanks or characters that no token has: copy it again")
    return token


# What is cached


@dataclass
class _Cached:
    folder: Path | None  # the snapshot of one commit
    missing: list[str]  # a load needs them and they are not here
    unknown: list[str]  # not here, and nothing says whether the repository has them


def _look_up(repo: str, revision: str | None) -> _Cached:
    """Judges the cache without network. Other tools fill it too, with a part of the files and without notes."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(config, str):
        return _Cached(None, [CONFIG], [])
    folder = Path(config).parent
    listing = _listing(folder)
    cached = _Cached(folder, [], [])

    def state(name: str) -> bool | None:
        """True: here; False: the repository has no such file; None: unknown."""
        if (folder / name).is_file():
            return True
        if listing is not None:
            return None if name in listing else False
        return None if try_to_load_from_cache(repo, name, revision=folder.name) is None else False

    for name in (*OPTIONAL, INDEX):
        if state(name) is None:
            (cached.unknown if listing is None else cached.missing).append(name)
    if INDEX not in cached.missing:
        weights = _shards(folder / INDEX) if state(INDEX) else [SINGLE]
        cached.missing += [name for name in weights if not state(name)]
    return cached


def _listing(folder: Path) -> set[str] | None:
    """The files of a commit, which huggingface_hub's `snapshot_download` (`hf download`) notes since version 2."""
    try:
        noted = json.loads((folder.parent.parent / "trees" / f"{folder.name}.json").read_text())
        return set(noted["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no note, or one in another form: as good as none


def _offline(repo: str, revision: str | None, cached: _Cached) -> Path:
    if cached.folder is None or cached.missing:
        from huggingface_hub import constants

        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"offline, and {repo}{at} lacks {_some(cached.missing)} in the cache ({constants.HF_HUB_CACHE}): run once "
            "without --offline and HF_HUB_OFFLINE, or copy the cache from a machine that has it"
        )
    _log.warning("offline: %s is loaded without %s, which it may or may not have", repo, _some(cached.unknown))
    return cached.folder


def _shards(index: Path) -> list[str]:
    """The weight files that an index names; it comes from a stranger, so a name may not leave the folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names:
        raise ValueError(
            f"{index} is no safetensors index, it has no weight_map: if it is in order on the hub, fetch it again "
            "with `hf download --force-download`"
        )
    for name in names:
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}: jaxlm reads safetensors only")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise ValueError(f"{index} names {name!r}, a path outside the checkpoint's folder: refused")
    return names


# The download


def _fetch(repo: str, revision: str | None, token: str | None) -> Path:
    """Small files first, then the weights, all of one commit even when the branch moves meanwhile."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    # Asked before hf_hub_download is: that one retries for half a minute where there is no network.
    if _metadata(repo, CONFIG, revision, token) is None:
        found = _remote_files(repo, revision, token)
        raise FileNotFoundError(f"{repo} has no config.json, so it is no checkpoint that jaxlm can load{found}")
    folder = Path(hf_hub_download(repo, CONFIG, revision=revision, token=token)).parent
    commit = folder.name

    def small(name: str) -> None:
        with suppress(RemoteEntryNotFoundError):  # which hf_hub_download notes in the cache
            hf_hub_download(repo, name, revision=commit, token=token)

    cached = _look_up(repo, commit)
    _each(small, [name for name in (*OPTIONAL, INDEX) if name in cached.unknown + cached.missing])
    names = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    names = [name for name in names if not (folder / name).is_file()]
    files = dict(zip(names, _each(lambda name: _metadata(repo, name, commit, token), names)))
    absent = [name for name, file in files.items() if file is None]
    if absent == [SINGLE]:
        found = _remote_files(repo, commit, token)
        raise FileNotFoundError(f"{repo} has no model.safetensors, and jaxlm reads safetensors only{found}. {_CONVERT}")
    if absent:
        raise FileNotFoundError(f"the index of {repo} names {_some(absent)}, which the repository does not have")
    _download(repo, folder, files, token)
    return folder


def _metadata(repo: str, name: str, revision: str | None, token: str | None) -> Any:
    """huggingface_hub's HfFileMetadata, or None where the repository has no such file."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        file = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token)
    except RemoteEntryNotFoundError:
        return None
    if file.commit_hash is None or file.etag is None:
        raise OSError(
            f"{constants.ENDPOINT} does not answer like a Hugging Face hub: check HF_ENDPOINT, and whether a proxy or "
            "a sign-in page stands between"
        )
    return file


def _download(repo: str, folder: Path, files: dict[str, Any], token: str | None) -> None:
    """Fetches weight files (name -> metadata) into the cache and links them into the snapshot `folder`."""
    from huggingface_hub import hf_hub_download

    storage = folder.parent.parent
    blobs = {name: storage / "blobs" / file.etag for name, file in files.items() if _streamable(file)}
    total, have = sum(file.size or 0 for file in files.values()), sum(_size(blob) for blob in blobs.values())
    free = shutil.disk_usage(storage).free
    if 0 < free < total - have:  # some network file systems say 0 and mean that they do not know
        raise OSError(f"{repo} needs {_bytes(total - have)} more and {storage} has {_bytes(free)} free. {_ROOM}")
    stop = threading.Event()

    def one(name: str) -> None:
        if name in blobs:
            _blob(repo, name, files[name], blobs[name], token, stop)
        hf_hub_download(repo, name, revision=folder.name, token=token)  # finds the blob and links it

    pool = ThreadPoolExecutor(_THREADS)
    pending = {pool.submit(one, name) for name in files}
    bar = _bar(f"{repo} ({len(files)} file{'s' * (len(files) > 1)})", total, have)
    try:
        while pending:
            done, pending = wait(pending, timeout=0.2)
            for future in done:
                future.result()
            bar.update(sum(_size(blob) for blob in blobs.values()) - bar.n)
    finally:
        stop.set()  # else Ctrl-C, or the failure of one file, would wait for the end of the others
        pool.shutdown(cancel_futures=True)
        bar.close()


def _streamable(file: Any) -> bool:
    """Whether to stream a file here. The hub serves its largest ones through hf_xet alone, which is also left to those
    who ask for its speed (HF_XET_HIGH_PERFORMANCE=1); hf_xet cannot resume. The etag becomes a file name: hex only.
    """
    from huggingface_hub import constants

    plain = file.size and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE and not constants.HF_XET_HIGH_PERFORMANCE
    return bool(plain and re.fullmatch(r"[0-9a-f]{40,64}", file.etag))


def _blob(repo: str, name: str, file: Any, blob: Path, token: str | None, stop: threading.Event) -> None:
    """Streams one file to its place among the cache's blobs, from where an earlier attempt stopped."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    # The hub's own address, never the one it redirects to: that one expires, and must not see the token.
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
            except _http_error() as error:
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
                    raise InterruptedError(f"{name} was stopped")
        if not blob.exists():
            _check(name, part, file)
            os.replace(part, blob)


def _stream(url: str, headers: dict[str, str], part: Path, stop: threading.Event) -> None:
    """One request, for all that is not in `part` yet."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    with part.open("ab") as out:
        if have := out.tell():
            headers = {**headers, "Range": f"bytes={have}-"}
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # a server without ranges begins again
                out.truncate(0)
            for chunk in response.iter_bytes():
                out.write(chunk)
                if stop.is_set():
                    raise InterruptedError(f"{part} was stopped")


def _check(name: str, part: Path, file: Any) -> None:
    """Size and, where the etag is one, sha256: pieces of two runs, or of two processes at once, must fit together."""
    right = _size(part) == file.size
    if right and len(file.etag) == 64:
        with part.open("rb") as f:
            right = hashlib.file_digest(f, "sha256").hexdigest() == file.etag
    if not right:
        part.unlink()
        raise OSError(f"{name} arrived damaged (its sha256 or size is not the hub's) and was deleted: run again")


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(blob: Path) -> int:
    """Bytes of a blob that are here, whole or in part."""
    for path in (blob, _part(blob)):
        if path.exists():
            return path.stat().st_size
    return 0


def _bar(text: str, total: int, have: int) -> Any:
    from huggingface_hub.utils import tqdm  # shows nothing where HF_HUB_DISABLE_PROGRESS_BARS is set

    seconds = 0.1 if sys.stderr.isatty() else 5.0  # a log file gets fewer lines, but no silence
    return tqdm(desc=text, total=total, initial=have, unit="B", unit_scale=True, mininterval=seconds)


# What went wrong, and the way out

_LOGIN = "`hf auth login`, the variable HF_TOKEN, or --token"
_CONVERT = "transformers' `from_pretrained` and then `save_pretrained` write a folder that does"
_AGAIN = "run again, what has arrived is kept"
_ROOM = f"Free some (`hf cache ls`, `hf cache rm`) or set HF_HOME to a larger disk, then {_AGAIN}"


def _explain(error: Exception, repo: str, revision: str | None, cached: _Cached) -> Exception | None:
    """The same failure as a user needs to hear it, or None where the error speaks for itself. Never quotes a header."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo, revision)
    if isinstance(error, _http_error()):
        usable = cached.folder and not cached.missing
        return ConnectionError(
            f"no connection to {constants.ENDPOINT} for {repo} ({error or type(error).__name__}): check the network, "
            f"HF_ENDPOINT and the proxy; {'a copy is cached, add --offline to use it' if usable else f'then {_AGAIN}'}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _bytes(shutil.disk_usage(constants.HF_HUB_CACHE).free)
        return OSError(f"no room for {repo} in {constants.HF_HUB_CACHE} ({free} free). {_ROOM}")
    return None


def _refused(error: Any, repo: str, revision: str | None) -> OSError:
    """An HfHubHTTPError: the hub was reached and answered with a status."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{constants.ENDPOINT}/{repo}", error.response.status_code
    said = error.response.headers.get("X-Error-Message", "")
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo} is gated: accept its licence at {page}, then sign in with {_LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo} has no revision {revision!r} (--revision): its branches are at {page}/tree/main"
        )
    if status == 401 and "credentials" in said:
        return PermissionError(f"the hub refuses the token (expired or mistyped?): sign in anew with {_LOGIN}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return FileNotFoundError(
            f"there is no model {repo!r} at {constants.ENDPOINT} (nor a folder of that name here), or it is private: "
            f"check the spelling; for a private one sign in with {_LOGIN}"
        )
    if status == 403:
        return PermissionError(f"the hub refuses {repo} to this account or token ({status} {said}): see {page}")
    return OSError(f"the hub answered {status} {said} for {repo}: wait, then {_AGAIN}")


def _remote_files(repo: str, revision: str | None, token: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo, revision=revision, token=token)
    except _http_error():
        return ""  # it only helps to understand another failure
    return f" (it holds {_some(n for n in names if not n.endswith(('.json', '.md', '.txt', '.gitattributes')))})"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


def _bytes(n: int) -> str:
    return f"{n:,} bytes ({n / 1e9:.1f} GB)"


def _http_error() -> type[Exception]:
    """The base of all failures of a request: httpx's in huggingface_hub 1, httpx2's in 2."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError


def _each(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return list(pool.map(function, names))
    finally:
        pool.shutdown(cancel_futures=True)

"""From a checkpoint's name to a local folder: a folder is taken as it is, a Hugging Face hub id is downloaded once.

The cache is huggingface_hub's own (HF_HOME, HF_HUB_CACHE; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count too), so that
it is shared with other tools. huggingface_hub fetches the small files and notes in the cache which ones a repository
lacks; from those notes a later call knows that nothing is missing and makes no request at all. The weights come through
download.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxlm.checkpoint.download import AGAIN, ROOM, count_bytes, download, each, http_error

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
_log = logging.getLogger(__name__)


def resolve(name: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool = False) -> Path:
    """The local folder of the checkpoint `name`: a folder's path, or a hub id (`org/name`), downloaded if needed.

    `revision` is a branch, tag or commit of a hub id (default: `main`). A copy that is complete in the cache is
    returned without a request, even when the branch has moved on since: name a commit to be sure of one. With `offline`
    (or HF_HUB_OFFLINE=1) the network is never touched. Python code, pickles and Meta's `original/` are never fetched.

    Raises FileNotFoundError (no such folder, repository, revision or file), PermissionError (gated, or a refused
    token), ConnectionError (no network), ValueError (a bad name, token or index) or OSError (disk full, hub at fault).
    """
    path = Path(os.path.expanduser(name))
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
    except (http_error(), OSError) as error:
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
    folder = Path(config).parent.resolve()
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
    each(small, [name for name in (*OPTIONAL, INDEX) if name in cached.unknown + cached.missing])
    names = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    names = [name for name in names if not (folder / name).is_file()]
    files = dict(zip(names, each(lambda name: _metadata(repo, name, commit, token), names)))
    absent = [name for name, file in files.items() if file is None]
    if absent == [SINGLE]:
        found = _remote_files(repo, commit, token)
        raise FileNotFoundError(f"{repo} has no model.safetensors, and jaxlm reads safetensors only{found}. {_CONVERT}")
    if absent:
        raise FileNotFoundError(f"the index of {repo} names {_some(absent)}, which the repository does not have")
    download(repo, folder, files, token)
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


# What went wrong, and the way out

_LOGIN = "`hf auth login`, the variable HF_TOKEN, or --token"
_CONVERT = "transformers' `from_pretrained` and then `save_pretrained` write a folder that does"


def _explain(error: Exception, repo: str, revision: str | None, cached: _Cached) -> Exception | None:
    """The same failure as a user needs to hear it, or None where the error speaks for itself. Never quotes a header."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo, revision)
    if isinstance(error, http_error()):
        usable = cached.folder and not cached.missing
        return ConnectionError(
            f"no connection to {constants.ENDPOINT} for {repo} ({error or type(error).__name__}): check the network, "
            f"HF_ENDPOINT and the proxy; {'a copy is cached, add --offline to use it' if usable else f'then {AGAIN}'}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = count_bytes(shutil.disk_usage(constants.HF_HUB_CACHE).free)
        return OSError(f"no room for {repo} in {constants.HF_HUB_CACHE} ({free} free). {ROOM}")
    return None


def _refused(error: Any, repo: str, revision: str | None) -> OSError:
    """An HfHubHTTPError: the hub was reached and answered with a status."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{constants.ENDPOINT}/{repo}", error.response.status_code
    said = f"{status} {error.response.headers.get('X-Error-Message', '')}".strip()
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
        return PermissionError(f"the hub refuses {repo} to this account or token ({said}): see {page}")
    return OSError(f"the hub answered {said} for {repo}: wait, then {AGAIN}")


def _remote_files(repo: str, revision: str | None, token: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo, revision=revision, token=token)
    except http_error():
        return ""  # it only helps to understand another failure
    return f" (it holds {_some(n for n in names if not n.endswith(('.json', '.md', '.txt', '.gitattributes')))})"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"

"""Errors of the Hugging Face hub, each with what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxlm.checkpoint.atomic import is_disk_full
from jaxlm.checkpoint.download import AGAIN, ROOM, count_bytes, http_error

_LOGIN = "`hf auth login`, the variable HF_TOKEN, or --token"
CONVERT = (
    "transformers' `from_pretrained` and then `save_pretrained` write a folder that does; Meta's own files in original/"
    " are read with --format meta (format='meta')"
)


@contextmanager
def explained(repo: str, revision: str | None, is_cached: bool = False) -> Iterator[None]:
    """Re-raises errors of the hub and the network with what to do about them. is_cached: whether the cache has a
    complete copy."""
    try:
        yield
    except (http_error(), OSError) as error:
        clear = _explain(error, repo, revision, is_cached)
        if clear is None:
            raise
        raise clear from error


def _explain(error: Exception, repo: str, revision: str | None, is_cached: bool) -> Exception | None:
    """The error with what to do about it, or None if its own message is clear. Never quotes a header."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo, revision)
    if isinstance(error, http_error()):
        hint = "a copy is cached, add --offline to use it" if is_cached else f"then {AGAIN}"
        return ConnectionError(
            f"there is no folder {repo!r} here, and no connection to {HfApi().endpoint} "
            f"({error or type(error).__name__}): check the network, HF_ENDPOINT and the proxy; {hint}"
        )
    if is_disk_full(error):
        free = count_bytes(shutil.disk_usage(constants.HF_HUB_CACHE).free)
        return OSError(f"no room for {repo} in {constants.HF_HUB_CACHE} ({free} free). {ROOM}")
    return None


def _refused(error: Any, repo: str, revision: str | None) -> OSError:
    """An HfHubHTTPError: the hub was reached and answered with a status."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub, status = HfApi().endpoint, error.response.status_code
    page = f"{hub}/{repo}"
    said = f"{status} {error.response.headers.get('X-Error-Message', '')}".strip()
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo} is gated: accept its license at {page}, then sign in with {_LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo} has no revision {revision!r} (--revision): its branches are at {page}/tree/main"
        )
    if status == 401 and "credentials" in said:
        return PermissionError(f"the hub refuses the token (expired or mistyped?): sign in anew with {_LOGIN}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return FileNotFoundError(
            f"there is no model {repo!r} at {hub} (nor a folder of that name here), or it is private: "
            f"check the spelling; for a private one sign in with {_LOGIN}"
        )
    if status == 403:
        return PermissionError(f"the hub refuses {repo} to this account or token ({said}): see {page}")
    return OSError(f"the hub answered {said} for {repo}: wait, then {AGAIN}")


def remote_files(repo: str, revision: str | None, token: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo, revision=revision, token=token)
    except http_error():
        return ""  # it only helps to understand another failure
    return f" (it holds {listing(n for n in names if not n.endswith(('.json', '.md', '.txt', '.gitattributes')))})"


def listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"

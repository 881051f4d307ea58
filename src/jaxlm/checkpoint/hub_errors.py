"""Errors of the Hugging Face hub, each with what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxlm.checkpoint.atomic import is_disk_full
from jaxlm.checkpoint.download import AGAIN, ROOM, count_bytes, http_error

_LOGIN = "`hf auth login`, the environment variable HF_TOKEN, or --token"
CONVERT = (
    "transformers writes such a folder: `from_pretrained`, then `save_pretrained`. A local folder loads with "
    "pytorch_model.bin too: `hf download REPOSITORY --local-dir FOLDER`. Meta's files in original/ are read with "
    "--format meta (format='meta')"
)


@contextmanager
def explain_hub_errors(repo: str, revision: str | None, is_cached: bool = False) -> Iterator[None]:
    """Re-raises errors of the hub and the network with what to do about them. is_cached: whether the cache has a
    complete copy."""
    try:
        yield
    except (http_error(), OSError) as error:
        explained = _explain(error, repo, revision, is_cached)
        if explained is None:
            raise
        raise explained from error


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
            f"({error or type(error).__name__}): check the network, HF_ENDPOINT and the proxy; {hint}. A local folder "
            "or .gguf file needs no network"
        )
    if is_disk_full(error):
        free = count_bytes(shutil.disk_usage(constants.HF_HUB_CACHE).free)
        return OSError(f"the disk of {constants.HF_HUB_CACHE} is too small for {repo} ({free} free). {ROOM}")
    return None


def _refused(error: Any, repo: str, revision: str | None) -> OSError:
    """The error for an HfHubHTTPError: the hub answered with an error status."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub, status = HfApi().endpoint, error.response.status_code
    page = f"{hub}/{repo}"
    answer = f"{status} {error.response.headers.get('X-Error-Message', '')}".strip()
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo} is gated: accept its license at {page}, then sign in with {_LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo} has no revision {revision!r} (--revision): its branches are listed at {page}/tree/main"
        )
    if status == 401 and "credentials" in answer:
        return PermissionError(f"the hub refuses the token (expired or mistyped?): sign in again with {_LOGIN}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return FileNotFoundError(
            f"there is no model {repo!r} at {hub} (nor a folder of that name here), or it is private: check the name; "
            f"for a private model sign in with {_LOGIN}"
        )
    if status == 403:
        return PermissionError(f"this account or token has no access to {repo} ({answer}): see {page}")
    return OSError(f"the hub answered {answer} for {repo}: wait, then {AGAIN}")


def remote_files(repo: str, revision: str | None, token: str | None) -> str:
    """The weight files of a repository, and how to load one of GGUF, for an error message."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo, revision=revision, token=token)
    except http_error():
        return ""  # the list is only a hint
    hint = f"; a GGUF file is passed as -m {repo}:FILE.gguf" if any(name.endswith(".gguf") for name in names) else ""
    return (
        f" (it holds {listing(n for n in names if not n.endswith(('.json', '.md', '.txt', '.gitattributes')))}){hint}"
    )


def listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"

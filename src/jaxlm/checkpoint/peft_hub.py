"""From an adapter's name to a local folder: as hub.py, for the two files that an adapter consists of."""

from __future__ import annotations

import os
from pathlib import Path

from jaxlm.checkpoint import hub
from jaxlm.checkpoint.download import download, http_error
from jaxlm.checkpoint.peft_config import CONFIG, WEIGHTS
from jaxlm.checkpoint.refusals import explain, remote_files, some

SAFETENSORS = "jaxlm reads safetensors only, which PEFT's from_pretrained and then save_pretrained write"


def resolve(name: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool = False) -> Path:
    """The local folder of the adapter `name`: a folder's path, or a hub id, downloaded if needed. Arguments and errors
    are those of `hub.resolve`."""
    path = Path(os.path.expanduser(name))
    if str(name) and path.exists():
        return _local(path)
    repo = hub.repo_id(name)
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    cached = [try_to_load_from_cache(repo, file, revision=revision) for file in (WEIGHTS, CONFIG)]
    if all(isinstance(found, str) for found in cached):
        return Path(str(cached[0])).parent.resolve()
    if offline or is_offline_mode():
        raise FileNotFoundError(
            f"offline, and the adapter {repo} is not in the cache ({constants.HF_HUB_CACHE}): run once without "
            "--offline and HF_HUB_OFFLINE"
        )
    try:
        return _fetch(repo, revision, hub.checked_token(token))
    except (http_error(), OSError) as error:
        explained = explain(error, repo, revision, False)
        if explained is None:
            raise
        raise explained from error


def _local(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: pass the folder that holds {CONFIG} and {WEIGHTS}")
    holds = f"(it holds {some(p.name for p in path.iterdir())})"
    if not (path / CONFIG).is_file():
        way_out = "it is a checkpoint, which is named with -m" if (path / hub.CONFIG).is_file() else holds
        raise FileNotFoundError(f"{path} is no adapter, it has no {CONFIG}: {way_out}")
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} has no {WEIGHTS} {holds}: {SAFETENSORS}")
    return path


def _fetch(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    if hub.metadata(repo, CONFIG, revision, token) is None:
        found = remote_files(repo, revision, token)
        raise FileNotFoundError(f"{repo} has no {CONFIG}, so it is no adapter{found}")
    folder = Path(hf_hub_download(repo, CONFIG, revision=revision, token=token)).parent
    file = hub.metadata(repo, WEIGHTS, folder.name, token)
    if file is None:
        raise FileNotFoundError(f"{repo} has no {WEIGHTS}{remote_files(repo, folder.name, token)}: {SAFETENSORS}")
    download(repo, folder, {WEIGHTS: file}, token)
    return folder

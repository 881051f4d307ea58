"""From a checkpoint's name to a local folder. A Hugging Face hub id is downloaded once.

The cache is huggingface_hub's (HF_HOME, HF_HUB_CACHE; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply as well), so it is
shared with other tools. huggingface_hub downloads the small files and records in the cache which of them a repository
lacks, so that a later call makes no request. Weight files are downloaded by download.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from jaxlm.checkpoint.download import download, each
from jaxlm.checkpoint.hub_errors import CONVERT, explain_hub_errors, listing, remote_files
from jaxlm.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from jaxlm.checkpoint.peft_config import LAYOUTS
from jaxlm.checkpoint.safetensors import quoted
from jaxlm.checkpoint.source import ModelSource

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ORIGINAL, PARAMS = "original", "params.json"  # the folder of Meta's files in a repository, and their config
TOKENIZER = f"{ORIGINAL}/tokenizer.model"
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
    "preprocessor_config.json",  # this and the next one: images of a multimodal model
    "processor_config.json",
)
ADAPTER_WEIGHTS = tuple(layout.weights for layout in LAYOUTS)  # of PEFT, of mlx-lm
TOKENIZER_FILES = OPTIONAL[1:-2]
_log = logging.getLogger(__name__)


def resolve(source: ModelSource) -> Path:
    """The local folder of the checkpoint that `source` names: a folder's path, or a hub id, downloaded if needed.

    Of Meta's format only the repository's `original/` is downloaded; otherwise `original/` never is. A copy that is
    complete in the cache is returned without a request, even if the branch has moved on: set `revision` to a commit to
    be sure of one. With `offline` (or HF_HUB_OFFLINE=1) the network is not used. Python code and other pickles are
    never downloaded.

    Raises:
        FileNotFoundError: no such folder, repository, revision or file.
        PermissionError: the repository is gated, or the token is refused.
        ConnectionError: no network.
        ValueError: an invalid name, token or index.
        OSError: the disk is full, or the hub failed.
    """
    if source.format not in (None, "hf", "meta"):
        raise ValueError(f"format {source.format!r} is not one of hf, meta")
    path = Path(os.path.expanduser(source.name))
    if str(source.name) and path.exists():
        return _local(path, source.revision, source.format)
    if path.name in ("model", "adapter") and (made := _of_run(path.parent)):
        raise FileNotFoundError(f"there is no {path}{made}")
    repo, meta = repo_id(source.name), source.format == "meta"
    from huggingface_hub import is_offline_mode

    cached = look_up(repo, source.revision, meta)
    if cached.folder and not cached.missing and not cached.unknown:
        folder = cached.folder
    elif source.offline or is_offline_mode():
        folder = offline_copy(repo, source.revision, cached)
    else:
        token = checked_token(source.token)
        with explain_hub_errors(repo, source.revision, is_cached=bool(cached.folder and not cached.missing)):
            folder = (_fetch_meta if meta else _fetch)(repo, source.revision, token)
    return folder / ORIGINAL if meta else folder


def _local(path: Path, revision: str | None, format: str | None) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: pass the folder that holds config.json and the weights")
    original = next((folder for folder in (path, path / ORIGINAL) if (folder / PARAMS).is_file()), None)
    found = path if format != "meta" and (path / CONFIG).is_file() else original if format != "hf" else None
    if found is None:
        lacks = f"no {PARAMS}, nor has its {ORIGINAL}/ one" if format == "meta" else f"no {CONFIG}"
        hint = f". Its {PARAMS} is in Meta's format: --format meta reads it" if original else ""
        raise FileNotFoundError(
            f"{path} is not a checkpoint: it has {lacks} (it holds {listing(p.name for p in path.iterdir())})"
            f"{hint or _of_run(path)}"
        )
    if revision is not None:
        raise ValueError(f"{path} is a local folder: --revision {revision} applies to a hub id only")
    return found


def _of_run(path: Path) -> str:
    """Returns what to load of the folder of a training run, for the end of a message; "" for another folder."""
    if not (path / "run.json").is_file():
        return ""
    made = [
        path / name for name, file in (("model", CONFIG), ("adapter", ADAPTER_CONFIG)) if (path / name / file).is_file()
    ]
    way = f"pass {made[0]}" if made else "its model is written when the run has ended: run the same command again"
    return f". {path} is the folder of a training run: {way}"


def repo_id(name: str | Path) -> str:
    """`name` as a hub id. FileNotFoundError if it is a path, ValueError if it is neither."""
    from huggingface_hub.utils import validate_repo_id

    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"there is no folder {text!r} (a hub id has the form org/name)")
    try:
        validate_repo_id(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a folder nor a hub id (org/name): {error}") from None
    return text


def checked_token(token: str | None) -> str | None:
    """The token, stripped. ValueError if it is malformed: an HTTP library would quote it in its error."""
    if token is not None and not re.fullmatch(r"[!-~]+", token := token.strip()):
        raise ValueError("the token (--token) is empty or has blanks or invalid characters: copy it again")
    return token


# The cache


@dataclass
class _Cached:
    """A repository in the cache.

    Attributes:
        folder: the snapshot of one commit.
        missing: files that loading needs and that are not in the cache.
        unknown: files that are not in the cache and that the repository may or may not have.
    """

    folder: Path | None
    missing: list[str]
    unknown: list[str]


def look_up(repo: str, revision: str | None, meta: bool = False) -> _Cached:
    """The state of the cache, without network. Other tools fill it as well, possibly with only some of the files."""
    from huggingface_hub import try_to_load_from_cache

    first = f"{ORIGINAL}/{PARAMS}" if meta else CONFIG
    config = try_to_load_from_cache(repo, first, revision=revision)
    if not isinstance(config, str):
        return _Cached(None, [first], [])
    folder = Path(config).parents[first.count("/")].resolve()
    listing = _listing(folder)
    cached = _Cached(folder, [], [])

    def state(name: str) -> bool | None:
        """True: in the cache. False: not in the repository. None: unknown."""
        if (folder / name).is_file():
            return True
        if listing is not None:
            return None if name in listing else False
        return None if try_to_load_from_cache(repo, name, revision=folder.name) is None else False

    def note(name: str) -> None:
        (cached.unknown if listing is None else cached.missing).append(name)

    for name in (TOKENIZER,) if meta else (*OPTIONAL, INDEX):
        if state(name) is None:
            note(name)
    if meta:
        shard = next(name for name in _consolidated() if not state(name))
        if shard == next(_consolidated()):
            cached.missing.append(shard)
        elif state(shard) is None:  # the last shard is known once the next one is known not to exist
            note(shard)
    elif INDEX not in cached.missing:
        weights = _shards(folder / INDEX) if state(INDEX) else [SINGLE]
        cached.missing += [name for name in weights if not state(name)]
    return cached


def _consolidated() -> Iterator[str]:
    """The names of Meta's weight files in a repository, endlessly."""
    return (f"{ORIGINAL}/consolidated.{i:02}.pth" for i in count())


def _listing(folder: Path) -> set[str] | None:
    """The files of a commit, as recorded by `snapshot_download` (`hf download`) of huggingface_hub 2 and later."""
    try:
        record = json.loads((folder.parent.parent / "trees" / f"{folder.name}.json").read_text())
        return set(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record, or one in another format


def offline_copy(repo: str, revision: str | None, cached: _Cached) -> Path:
    """The cached folder of a repository; FileNotFoundError if files are missing."""
    if cached.folder is None or cached.missing:
        from huggingface_hub import constants

        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"offline, and {repo}{at} lacks {listing(cached.missing)} in the cache ({constants.HF_HUB_CACHE}): run "
            "once without --offline and HF_HUB_OFFLINE, or copy the cache from a machine that has it"
        )
    _log.warning("offline: %s is loaded without %s, which it may or may not have", repo, listing(cached.unknown))
    return cached.folder


def _shards(index: Path) -> list[str]:
    """The weight files that an index names. It is untrusted: a name may not point outside the folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{index} is not a safetensors index, it has no weight_map: if it is valid on the hub, download it again "
            "with `hf download --force-download`"
        )
    for name in names:
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {quoted(name)}: jaxlm reads safetensors only")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
            raise ValueError(f"{index} names {quoted(name)}, a path outside the checkpoint's folder: refused")
    return names


# The download


def _fetch(repo: str, revision: str | None, token: str | None) -> Path:
    """Downloads small files, then weights, all of one commit even if the branch moves meanwhile."""
    from huggingface_hub import hf_hub_download

    # Before hf_hub_download, which retries for half a minute without a network.
    if metadata(repo, CONFIG, revision, token) is None:
        holds = remote_files(repo, revision, token)
        raise FileNotFoundError(f"{repo} has no config.json, so jaxlm cannot load it{holds}")
    folder = Path(hf_hub_download(repo, CONFIG, revision=revision, token=token)).parent
    commit = folder.name
    cached = look_up(repo, commit)
    wanted = [name for name in (*OPTIONAL, INDEX) if name in cached.unknown + cached.missing]
    each(lambda name: _small(repo, name, commit, token), wanted)
    names = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    names = [name for name in names if not (folder / name).is_file()]
    files = dict(zip(names, each(lambda name: metadata(repo, name, commit, token), names)))
    absent = [name for name, file in files.items() if file is None]
    if absent == [SINGLE]:
        holds = remote_files(repo, commit, token)
        raise FileNotFoundError(f"{repo} has no model.safetensors, and jaxlm downloads no other{holds}. {CONVERT}")
    if absent:
        raise FileNotFoundError(f"the index of {repo} names {listing(absent)}, which the repository does not have")
    download(repo, folder, files, token)
    return folder


def _fetch_meta(repo: str, revision: str | None, token: str | None) -> Path:
    """Downloads Meta's files, and nothing else of the repository."""
    from huggingface_hub import hf_hub_download

    first = f"{ORIGINAL}/{PARAMS}"
    if metadata(repo, first, revision, token) is None:
        holds = remote_files(repo, revision, token)
        raise FileNotFoundError(f"{repo} has no {first}, so it has no files in Meta's format{holds}: omit --format")
    folder = Path(hf_hub_download(repo, first, revision=revision, token=token)).parents[1]
    _small(repo, TOKENIZER, folder.name, token)
    files: dict[str, Any] = {}
    for name in _consolidated():
        file = metadata(repo, name, folder.name, token)
        if file is None:
            _small(repo, name, folder.name, token)  # records in the cache that there is none
            break
        if not (folder / name).is_file():
            files[name] = file
    if not files and not (folder / next(_consolidated())).is_file():
        raise FileNotFoundError(f"{repo} has {first} but no weights ({next(_consolidated())})")
    download(repo, folder, files, token)
    return folder


def _small(repo: str, name: str, commit: str, token: str | None) -> None:
    """Downloads an optional file. huggingface_hub records in the cache if the repository has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with suppress(RemoteEntryNotFoundError):
        hf_hub_download(repo, name, revision=commit, token=token)


def metadata(repo: str, name: str, revision: str | None, token: str | None) -> Any:
    """huggingface_hub's HfFileMetadata, or None if the repository has no such file."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        file = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token)
    except RemoteEntryNotFoundError:
        return None
    if file.commit_hash is None or file.etag is None:
        raise OSError(
            f"{HfApi().endpoint} does not answer like a Hugging Face hub: check HF_ENDPOINT, and whether there is a "
            "proxy or a sign-in page in between"
        )
    return file


# Adapters

SAFETENSORS = "jaxlm reads safetensors only, which PEFT writes: from_pretrained, then save_pretrained"


def resolve_adapter(source: ModelSource) -> Path:
    """The local folder of the adapter that `source.name` names, downloaded if needed. Raises what `resolve` raises."""
    path = Path(os.path.expanduser(source.name))
    if str(source.name) and path.exists():
        return _local_adapter(path)
    repo, revision = repo_id(source.name), source.revision
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, ADAPTER_CONFIG, revision=revision)
    weights = (try_to_load_from_cache(repo, file, revision=revision) for file in ADAPTER_WEIGHTS)
    complete = isinstance(cached, str) and any(isinstance(found, str) for found in weights)
    known = [try_to_load_from_cache(repo, file, revision=revision) is not None for file in TOKENIZER_FILES]
    if complete and (all(known) or source.offline or is_offline_mode()):  # an earlier version did not fetch these
        return Path(str(cached)).parent.resolve()
    if source.offline or is_offline_mode():
        raise FileNotFoundError(
            f"offline, and the adapter {repo} is not in the cache ({constants.HF_HUB_CACHE}): run once without "
            "--offline and HF_HUB_OFFLINE"
        )
    token = checked_token(source.token)
    with explain_hub_errors(repo, revision, is_cached=complete):
        return _fetch_adapter(repo, revision, token)


def _local_adapter(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file: pass the folder that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}"
        )
    holds = f"(it holds {listing(p.name for p in path.iterdir())})"
    if not (path / ADAPTER_CONFIG).is_file():
        hint = ": it is a checkpoint, pass it with -m" if (path / CONFIG).is_file() else f" {holds}{_of_run(path)}"
        raise FileNotFoundError(f"{path} is not an adapter, it has no {ADAPTER_CONFIG}{hint}")
    if not any((path / name).is_file() for name in ADAPTER_WEIGHTS):
        raise FileNotFoundError(f"{path} has no {ADAPTER_WEIGHTS[0]} {holds}: {SAFETENSORS}")
    return path


def _fetch_adapter(repo: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    if metadata(repo, ADAPTER_CONFIG, revision, token) is None:
        holds = remote_files(repo, revision, token)
        raise FileNotFoundError(f"{repo} has no {ADAPTER_CONFIG}, so it is not an adapter{holds}")
    folder = Path(hf_hub_download(repo, ADAPTER_CONFIG, revision=revision, token=token)).parent
    files = ((name, metadata(repo, name, folder.name, token)) for name in ADAPTER_WEIGHTS)
    weights, file = next((found for found in files if found[1] is not None), (ADAPTER_WEIGHTS[0], None))
    if file is None:
        raise FileNotFoundError(f"{repo} has no {weights}{remote_files(repo, folder.name, token)}: {SAFETENSORS}")
    commit = folder.name  # an adapter of a base model may have its own tokenizer and chat template
    each(lambda name: _small(repo, name, commit, token), TOKENIZER_FILES)
    download(repo, folder, {weights: file}, token)
    return folder

"""From a checkpoint's name to a local GGUF file: a file, a folder with one model, or a file in a hub repository."""

import os
import re
from pathlib import Path, PurePosixPath

from jaxlm.checkpoint import hub
from jaxlm.checkpoint.download import download, each
from jaxlm.checkpoint.gguf import part_names
from jaxlm.checkpoint.hub_errors import explain_hub_errors, listing, remote_files
from jaxlm.checkpoint.source import ModelSource

SUFFIX = ".gguf"
VISION = "mmproj"  # in the name of a file with a vision tower


def is_gguf(path: Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return path.suffix.lower() == SUFFIX


def find(source: ModelSource, headers_only: bool = False) -> Path | None:
    """The GGUF file that a source names, downloaded if needed; None if it names something else.

    A folder is that of a GGUF model if it holds one, and no weights in another format. On the hub, `org/name:file.gguf`
    names a file of a repository. Of a split model, all parts are downloaded.

    Args:
        source: the checkpoint.
        headers_only: do not download.

    Raises:
        ValueError: a folder with several models, or an argument that does not apply to GGUF files.
        FileNotFoundError, PermissionError, ConnectionError, OSError: as in `hub.resolve`.
    """
    name, path = str(source.name), Path(os.path.expanduser(source.name))
    if name and path.exists():
        file = path if path.suffix == SUFFIX and path.is_file() else _in_folder(source, path)
    elif match := re.fullmatch(rf"([^:]+):(.+\{SUFFIX})", name):
        file = _on_hub(source, match[1], match[2], headers_only)
    elif path.suffix == SUFFIX:
        raise FileNotFoundError(
            f"there is no file {name!r} (a file of a hub repository has the form org/name:file.gguf)"
        )
    else:
        return None
    if file is not None and source.format is not None:
        raise ValueError(f"{file} is a GGUF file, so --format {source.format} (format=) does not apply: omit it")
    if file is not None and source.rope_factor is not None:
        raise ValueError(
            "--rope-factor (rope_factor=) applies to Meta's files only: a GGUF file has the factor; omit it"
        )
    if file is not None and path.exists() and source.revision is not None:
        raise ValueError(f"{path} is local: --revision {source.revision} applies to a hub id only")
    return file


def _in_folder(source: ModelSource, folder: Path) -> Path | None:
    """The first file of the only GGUF model of a folder without other weights."""
    if not folder.is_dir() or source.format is not None:
        return None
    names = sorted(path.name for path in folder.iterdir())
    first = sorted({part_names(name)[0] for name in names if name.endswith(SUFFIX) and VISION not in name})
    if not first or hub.PARAMS in names or any(name.endswith(".safetensors") for name in names):
        return None
    if len(first) > 1:
        raise ValueError(f"{folder} holds {len(first)} GGUF models ({listing(first)}): pass the path of one file")
    return folder / first[0]


def _on_hub(source: ModelSource, name: str, file: str, headers_only: bool) -> Path:
    """A file of a hub repository, with the other parts of its model, in the cache of huggingface_hub."""
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    repo, path = hub.repo_id(name), PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file:
        raise ValueError(f"{file!r} is not the path of a file in the repository {repo}")
    files = [str(path.with_name(part)) for part in part_names(path.name)]
    cached = [try_to_load_from_cache(repo, part, revision=source.revision) for part in files]
    if all(isinstance(found, str) for found in cached):
        return Path(str(cached[0]))
    if headers_only:
        raise FileNotFoundError(f"{repo}:{file} must be in the cache to be described: load the model once")
    if source.offline or is_offline_mode():
        raise FileNotFoundError(
            f"offline, and {repo} lacks {listing(files)} in the cache ({constants.HF_HUB_CACHE}): run once without "
            "--offline and HF_HUB_OFFLINE"
        )
    token = hub.checked_token(source.token)
    with explain_hub_errors(repo, source.revision):
        return _fetch(repo, files, source.revision, token)


def _fetch(repo: str, files: list[str], revision: str | None, token: str | None) -> Path:
    """Downloads files, all of one commit."""
    from huggingface_hub import constants, hf_hub_download

    first = hub.metadata(repo, files[0], revision, token)
    if first is None:
        raise FileNotFoundError(f"{repo} has no {files[0]}{remote_files(repo, revision, token)}")
    commit = first.commit_hash
    others = each(lambda part: hub.metadata(repo, part, commit, token), files[1:])
    found = dict(zip(files, [first, *others]))
    if absent := [part for part, file in found.items() if file is None]:
        raise FileNotFoundError(f"{repo} lacks {listing(absent)} of {len(files)} parts of a GGUF model")
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    folder = storage / "snapshots" / commit
    for place in (folder, storage / "blobs"):
        place.mkdir(parents=True, exist_ok=True)
    download(repo, folder, found, token)
    if revision != commit:  # records the commit of the branch, so that a later call finds the files
        hf_hub_download(repo, files[0], revision=revision, token=token)
    return folder / files[0]

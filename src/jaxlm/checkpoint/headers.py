"""A checkpoint's small files and the headers of its weight files, for `jaxlm info`: no weights are downloaded."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxlm.checkpoint import hub
from jaxlm.checkpoint.hub_errors import explain_hub_errors
from jaxlm.checkpoint.safetensors import Tensor
from jaxlm.checkpoint.source import ModelSource
from jaxlm.checkpoint.weight_files import read_index

ReadIndex = Callable[[], dict[str, Tensor]]  # raises FileNotFoundError if there are no weights


def find(source: ModelSource) -> tuple[Path, ReadIndex]:
    """The local folder of the small files (for a config of another name than config.json, that file), and a function
    that reads the headers. Raises what `hub.resolve` raises."""
    path = Path(source.name).expanduser()
    if path.is_file() and path.name != hub.CONFIG:
        return path, _no_weights
    if path.exists():
        return _local(hub.resolve(replace(source, name=path.parent if path.is_file() else path)))
    repo, is_meta = hub.repo_id(source.name), source.format == "meta"
    cached = hub.look_up(repo, source.revision, is_meta)
    if is_meta and (cached.missing or cached.unknown):
        raise FileNotFoundError(f"{repo}: Meta's files must be in the cache to be described: load the model once")
    if cached.folder and not cached.missing:
        return _local(cached.folder / hub.ORIGINAL if is_meta else cached.folder)
    from huggingface_hub import is_offline_mode

    if source.offline or is_offline_mode():
        return _local(cached.folder or hub.offline_copy(repo, source.revision, cached))
    token = hub.checked_token(source.token)
    with explain_hub_errors(repo, source.revision):
        folder = _fetch_small(repo, source.revision, token)
    return folder, partial(_fetch_index, repo, folder.name, token)


def _no_weights() -> dict[str, Tensor]:
    raise FileNotFoundError("")


def _local(folder: Path) -> tuple[Path, ReadIndex]:
    return folder, partial(read_index, folder)


def _fetch_small(repo: str, revision: str | None, token: str | None) -> Path:
    """The small files of a repository, all of one commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if hub.metadata(repo, hub.CONFIG, revision, token) is None:
        raise FileNotFoundError(f"{repo} has no config.json, so jaxlm cannot load it")
    folder = Path(hf_hub_download(repo, hub.CONFIG, revision=revision, token=token)).parent
    for name in hub.OPTIONAL:
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(repo, name, revision=folder.name, token=token)
    return folder


def _fetch_index(repo: str, commit: str, token: str | None) -> dict[str, Tensor]:
    """The tensors of a repository, from the headers of its files (HTTP Range requests)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    with explain_hub_errors(repo, commit):
        try:
            files = HfApi().get_safetensors_metadata(repo, revision=commit, token=token).files_metadata
        except NotASafetensorsRepoError as error:
            raise FileNotFoundError(str(error)) from None
    tensors = {}
    for file, header in files.items():
        for name, t in header.tensors.items():
            begin, end = t.data_offsets
            tensors[name] = Tensor(name, Path(file), t.dtype, tuple(t.shape), begin, end - begin)
    return tensors

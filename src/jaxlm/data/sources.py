"""Data sources by name: files, folders and globs of them, folders of datasets' save_to_disk, hub datasets.

A source yields its rows one by one (readers.py) and has a digest of its contents.
"""

import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxlm.data.readers import KINDS, READERS, InvalidRow, Row, kind, read_rows, without_nulls

SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
# The name of a file or folder of a split, up to the suffix: train, train_1, train-00000-of-00003, and with the digest
# that the hub appends to it.
_OF_SPLIT = re.compile(rf"({'|'.join(SPLITS)})([-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{{16}})?)?", re.IGNORECASE)
_LIKE_SPLIT = re.compile(rf"({'|'.join(SPLITS)})[-_. ]", re.IGNORECASE)
ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # no rows
SAMPLE = 1 << 20  # bytes
SHOWN = 3  # names of files in a message
# Common names that are no hub ids: repository and default configuration.
SHORT_NAMES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}


@dataclass(frozen=True)
class File:
    """A file whose kind is one of READERS. note: what is worth a word about the folder in which it was found."""

    path: Path
    note: str = ""

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self, start: int = 0) -> Iterator[Row | InvalidRow]:
        return itertools.islice(read_rows(self.path), start, None)

    def digest(self) -> str:
        """Digest of the contents (name, size and time may stay the same when a file changes) and of the kind."""
        return _digest(self.path) + kind(self.path)

    def sample_digest(self) -> str:
        """Digest of the size and of the beginning and end of the contents, and of the kind."""
        return _sample_digest(self.path) + kind(self.path)


@dataclass(frozen=True)
class Saved:
    """A folder that datasets' `Dataset.save_to_disk` wrote. note: as of File."""

    path: Path
    note: str = ""

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self, start: int = 0) -> Iterator[Row | InvalidRow]:
        from datasets import load_from_disk

        try:
            data: Any = load_from_disk(self.name)
            for i, row in enumerate(_after(data, start), start + 1):
                yield Row(self.name, i, without_nulls(row))
        except (ValueError, LookupError, TypeError, OSError) as error:  # pyarrow's errors are ValueError or OSError
            yield InvalidRow(self.name, 0, "unreadable file", f"the data set cannot be read ({_one_line(error)})")

    def digest(self) -> str:
        """Digest of the contents of all files of the folder."""
        return self._digest_by(_digest)

    def sample_digest(self) -> str:
        """Digest of the sizes and of the beginning and end of all files of the folder."""
        return self._digest_by(_sample_digest)

    def _digest_by(self, digest: Callable[[Path], str]) -> str:
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        text = "".join(f"{path.name} {digest(path)}" for path in files)
        return hashlib.blake2b(text.encode()).hexdigest() + ".saved"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sample_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        found = hashlib.blake2b(str(size).encode() + file.read(SAMPLE))
        file.seek(max(size - SAMPLE, 0))
        found.update(file.read())
    return found.hexdigest()


def _after(data: Any, start: int) -> Iterable[Any]:
    """Returns the rows of a datasets.Dataset from `start` on. Its `skip` refuses to skip all."""
    return data if start == 0 else data.skip(start) if start < len(data) else ()


@dataclass(frozen=True)
class Hub:
    """A loaded hub dataset; `data` is a datasets.Dataset."""

    name: str
    data: Any
    note: str = ""

    def rows(self, start: int = 0) -> Iterator[Row]:
        rows = enumerate(_after(self.data, start), start + 1)
        return (Row(self.name, i, without_nulls(row)) for i, row in rows)

    def digest(self) -> str:
        return self.data._fingerprint  # of the commit, the configuration and the split

    sample_digest = digest


@dataclass(frozen=True)
class HubShard:
    """Shard `index` of a hub dataset that is streamed; `data` is a datasets.IterableDataset, `version` has the commit,
    the configuration and the split."""

    name: str
    data: Any
    index: int
    version: str
    note: str = ""

    def rows(self, start: int = 0) -> Iterator[Row]:
        shard = self.data.shard(self.data.num_shards, self.index)
        rows = shard.skip(start) if start else shard
        return (Row(self.name, i, without_nulls(row)) for i, row in enumerate(rows, start + 1))

    def digest(self) -> str:
        return f"{self.name} {self.version}"

    sample_digest = digest


Source = File | Saved | Hub | HubShard


def find_sources(
    names: str | Path | Sequence[str | Path],
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    streaming: bool = False,
) -> list[Source]:
    """Finds the sources with the given names. Their `rows(start)` leaves out the first `start` rows.

    Args:
        names: Files, folders, globs, hub datasets ("wikitext", "org/name").
        split: Split of a hub dataset, and of a folder whose files or folders are named after splits (train.jsonl,
            valid_1.jsonl, test-00000-of-00002.parquet, train/).
        config: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        offline: Use the local cache only, as with HF_HUB_OFFLINE=1.
        streaming: Read a hub dataset over the network, without a copy on the disk. Each of its shards is a source.

    Raises:
        FileNotFoundError: A file, folder or dataset does not exist.
        ConnectionError: The hub cannot be reached.
        ValueError: A file has an unknown suffix, or a dataset has several configurations or no such split.
    """
    names = [names] if isinstance(names, str | Path) else names
    sources = [source for name in names for source in _find(name, split, config, revision, offline, streaming)]
    if not sources:
        raise ValueError("no data: pass a file, a folder, a glob or a hub dataset")
    times = Counter(source.name for source in sources)
    if twice := [name for name, count in times.items() if count > 1]:
        note = f"{twice[0]} is read {times[twice[0]]} times, because it is named as often"
        sources[0] = replace(sources[0], note="; ".join(filter(None, [sources[0].note, note])))
    return sources


def _find(
    name: str | Path, split: str, config: str | None, revision: str | None, offline: bool, streaming: bool
) -> Iterable[Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, split)
    if path.is_file():
        if kind(path) not in READERS:
            raise ValueError(f"{path} has an unknown suffix: convert it to one of {KINDS}")
        return [File(path)]
    if any(char in str(name) for char in "*?["):
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if kind(Path(p)) in READERS]
        if not files:
            raise FileNotFoundError(f"no file matches {name} ({KINDS})")
        return map(File, files)
    text = str(name)
    local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1
    if local or kind(path) in READERS:
        raise FileNotFoundError(f"no such file or folder: {text}")
    if "/" not in text and path.suffix:
        raise FileNotFoundError(f"no such file: {text} (the id of a hub data set has the form org/name)")
    return _from_hub(text, split, config, revision, offline, streaming)


def _of_folder(folder: Path, split: str) -> list[Source]:
    """Returns the sources of a folder that belong to a split, or all of them if none is named after a split."""
    if _is_saved(folder):
        return [Saved(folder)]
    if (folder / "dataset_dict.json").is_file():
        return [_of_dataset_dict(folder, split)]
    runs: list[Path] = []
    found = list(_walk(folder, runs))
    if not found:
        raise FileNotFoundError(f"{folder} has no file to read ({KINDS})")
    of_runs = f"left out of {folder}: {_listed([str(path.relative_to(folder)) for path in runs])} (of training runs)"
    named = {path: split_of(path.relative_to(folder)) for path in found}
    chosen = [path for path in found if named[path] == SPLITS.get(split, split)]
    other = [path.relative_to(folder).as_posix() for path in found if named[path] is None]
    like = [name for name in other if _LIKE_SPLIT.match(Path(name).name)]
    note = ""
    if len(other) == len(found):
        chosen = found
        if like:
            note = f"all files of {folder} are read, for no name is exactly that of a split ({_listed(like)})"
    elif other:
        note = f"left out of {folder}: {_listed(other)} (named after no split; name the files to read them, or rename "
        note += "them: train_1.jsonl, train/…)"
    if not chosen:
        splits = ", ".join(sorted({part for part in named.values() if part}))
        message = f"{folder} has no files of the split {split!r}; it has {splits}"
        raise FileNotFoundError("; ".join(filter(None, [message, note])))
    sources: list[Source] = [Saved(path) if path.is_dir() else File(path) for path in chosen]
    note = "; ".join(filter(None, [note, of_runs if runs else ""]))
    return [replace(sources[0], note=note), *sources[1:]]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def split_of(path: Path) -> str | None:
    """Returns the split after which a file is named, or else the nearest of its folders; None if there is none."""
    for name in (path.name[: len(path.name) - len(kind(path))], *reversed(path.parts[:-1])):
        if match := _OF_SPLIT.fullmatch(name):
            return SPLITS[match[1].lower()]
    return None


def _walk(folder: Path, runs: list[Path]) -> Iterator[Path]:
    """Yields the files that can be read and the folders of save_to_disk, sorted. Hidden ones are skipped. Folders of
    training runs are appended to `runs` instead of read."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.is_symlink():  # may be a loop
                continue
            if (path / "run.json").is_file():
                runs.append(path)
                continue
            yield from [path] if _is_saved(path) else _walk(path, runs)
        elif kind(path) in READERS and path.name not in ABOUT_DATASETS and path.is_file():
            yield path


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _of_dataset_dict(folder: Path, split: str) -> Saved:
    """Returns the split of a folder that datasets' `DatasetDict.save_to_disk` wrote."""
    try:
        names = [str(name) for name in json.loads((folder / "dataset_dict.json").read_text())["splits"]]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{folder / 'dataset_dict.json'} is damaged: name one of the folders beside it") from None
    chosen = [name for name in names if SPLITS.get(name, name) == SPLITS.get(split, split)]
    if not chosen or not (folder / chosen[0]).is_dir():
        folders = ", ".join(str(folder / name) for name in names)
        raise FileNotFoundError(f"{folder} has no split {split!r}: name one of its folders ({folders})")
    return Saved(folder / chosen[0])


def _from_hub(
    name: str, split: str, config: str | None, revision: str | None, offline: bool, streaming: bool
) -> Sequence[Source]:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import is_offline_mode

    repo, default = SHORT_NAMES.get(name, (name, None))
    config = config or default
    try:
        if streaming:
            return _stream(repo, split, config, revision, offline or is_offline_mode())
        if offline or is_offline_mode():
            last = repo.split("/")[-1]
            cached = Cache(repo_id=repo, dataset_name=last, config_name=config, version="auto", hash="auto")
            return [Hub(repo, cached.as_dataset(split=split))]
        return [Hub(repo, datasets.load_dataset(repo, config, split=split, revision=revision))]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file or folder nor a hub dataset: {_one_line(error)} (set HF_TOKEN for a "
            "private or gated one)"
        ) from None
    except ConnectionError as error:
        raise ConnectionError(f"the dataset {name!r} cannot be downloaded: {_one_line(error)}") from None
    except ValueError as error:
        raise ValueError(_explain_hub_error(repo, str(error))) from None


def _stream(repo: str, split: str, config: str | None, revision: str | None, offline: bool) -> list[Source]:
    """Returns the shards of a hub dataset, all of the same commit."""
    import datasets
    from huggingface_hub import dataset_info

    if offline:
        raise ValueError(f"{repo} cannot be streamed offline: omit streaming to read the copy in the cache")
    datasets.load_dataset_builder(repo, config, revision=revision)  # raises what _from_hub explains
    commit = str(dataset_info(repo, revision=revision).sha)
    data: Any = datasets.load_dataset(repo, config, split=split, revision=commit, streaming=True)
    n = data.num_shards
    names = [repo] if n == 1 else [f"{repo} (shard {i} of {n})" for i in range(1, n + 1)]
    version = f"{commit} {config} {split}"
    return [HubShard(name, data, i, version) for i, name in enumerate(names)]


def _explain_hub_error(repo: str, message: str) -> str:
    """Returns an error message of datasets about a configuration or a split, with a hint."""
    choices = ", ".join(re.findall(r"'([^']+)'", "".join(re.findall(r"\[.*?\]", message))))
    if "Config name is missing" in message or "multiple" in message:
        return f"{repo} has several configurations: choose one with config ({choices or message})"
    if "BuilderConfig" in message:
        return f"{repo} has no such configuration: choose one of {choices}"
    if "Couldn't find cache" in message:
        return f"{repo} is not in the cache: run once without offline and HF_HUB_OFFLINE ({_one_line(message)})"
    if "Unknown split" in message:
        return f"{repo} has no such split: choose one of {choices}"
    return f"{repo} cannot be read: {_one_line(message)}"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())

"""Where training texts come from: .txt, .jsonl, .json and .parquet files, folders and globs of them, hub datasets.

A source is read row by row and never held whole (but a .json list, which is one JSON value). What cannot be read is a
`Bad` among the rows, with its file and line: who reads decides whether to stop there.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SEPARATOR = "<|endoftext|>"  # on a line of its own, between the documents of a .txt file
PART = 1 << 22  # characters: of longer texts no more than this is held, and tokenized, at once
# Where a text may be cut without changing a token: before a space between words, at a line's end after a word.
_PLACE = re.compile(r"(?<=\w)(?= \w)|(?<=\w\n)(?=\w)")
SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
# Names that everybody uses and the hub no longer has: -> repository, configuration unless one is named.
KNOWN = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}


class Row(NamedTuple):
    """source: file or hub dataset; number: its line in a .txt or .jsonl file, else its row, from 1; value: a text, or
    the fields; ends: the document is complete (False: the next row goes on with it)."""

    source: str
    number: int
    value: Any
    ends: bool = True


class InvalidRow(NamedTuple):
    """What is no row. why: the kind of fault, under which such rows are counted; detail: what is wrong."""

    source: str
    number: int
    why: str
    detail: str

    def __str__(self) -> str:
        return f"{place(self.source, self.number)}: {self.detail}"


def place(source: str, number: int) -> str:
    """A row's place, for a person: story.txt:17, or data.parquet, row 17."""
    if number == 0:
        return source
    return f"{source}:{number}" if source.endswith((".txt", ".jsonl")) else f"{source}, row {number}"


@dataclass(frozen=True)
class File:
    """A file of a kind that READERS has."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[Row | InvalidRow]:
        if self.path.stat().st_size == 0:
            return iter([InvalidRow(self.name, 0, "empty file", "the file is empty")])
        return READERS[self.path.suffix](self.path)

    def digest(self) -> str:
        """Of the contents (a name, a size and a time may stay when a file changes) and of how they are read."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest() + self.path.suffix.lower()


@dataclass(frozen=True)
class Hub:
    """A dataset of the hub, loaded: `data` is a datasets.Dataset."""

    name: str
    data: Any

    def rows(self) -> Iterator[Row]:
        return (Row(self.name, i, _known(row)) for i, row in enumerate(self.data, 1))

    def digest(self) -> str:
        return self.data._fingerprint  # of datasets: of the commit, the configuration and the split


def find(
    names: str | Path | Sequence[str | Path],
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> list[File | Hub]:
    """The sources that these names mean: files, folders, globs, hub datasets ("wikitext", "org/name").

    split: of a folder whose files are named by splits (train.jsonl, valid.jsonl; test-00000.parquet) and of a hub
    dataset; config, revision: of a hub dataset. With offline, or HF_HUB_OFFLINE=1, the network is never touched.

    Raises FileNotFoundError, ConnectionError, or ValueError for what cannot be read or is not one thing.
    """
    names = [names] if isinstance(names, str | Path) else names
    found = [source for name in names for source in _find(name, split, config, revision, offline)]
    if not found:
        raise ValueError("no dataset is named: give a file, a folder, a glob or the name of a hub dataset")
    return found


def _find(name: str | Path, split: str, config: str | None, revision: str | None, offline: bool) -> Iterable[Any]:
    path = Path(name).expanduser()
    if path.is_dir():
        return map(File, _of_split(path, split))
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path} is none of {', '.join(READERS)}, the kinds of files that are read")
        return [File(path)]
    if any(char in str(name) for char in "*?["):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).suffix in READERS]
        if not found:
            raise FileNotFoundError(f"no file fits {name} and is one of {', '.join(READERS)}")
        return map(File, found)
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in READERS:
        raise FileNotFoundError(f"there is no file or folder {text}")
    return [_from_hub(text, split, config, revision, offline)]


def _of_split(folder: Path, split: str) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in READERS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no file that is one of {', '.join(READERS)}")
    named = {path: SPLITS.get(re.split(r"[-_.]", path.name)[0]) for path in files}
    if not any(named.values()):
        return files
    chosen = [path for path in files if named[path] == SPLITS.get(split, split)]
    if not chosen:
        there = ", ".join(sorted({part for part in named.values() if part}))
        raise FileNotFoundError(f"{folder} holds no files of the split {split!r}, but of {there}")
    return chosen


def _from_hub(name: str, split: str, config: str | None, revision: str | None, offline: bool) -> Hub:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import is_offline_mode

    repo, default = KNOWN.get(name, (name, None))
    config = config or default
    try:
        if offline or is_offline_mode():
            last = repo.split("/")[-1]
            cached = Cache(repo_id=repo, dataset_name=last, config_name=config, version="auto", hash="auto")
            return Hub(repo, cached.as_dataset(split=split))
        return Hub(repo, datasets.load_dataset(repo, config, split=split, revision=revision))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and on the hub: {_line(error)} (one that is private or gated takes "
            "HF_TOKEN)"
        ) from None
    except ConnectionError as error:
        raise ConnectionError(f"the dataset {name!r} cannot be fetched, and is no file here: {_line(error)}") from None
    except ValueError as error:
        raise ValueError(_hub_fault(repo, str(error))) from None


def _hub_fault(repo: str, said: str) -> str:
    """What datasets has against a configuration or a split, with our way out."""
    choices = ", ".join(re.findall(r"'([^']+)'", "".join(re.findall(r"\[.*?\]", said))))
    if "Config name is missing" in said or "multiple" in said:
        return f"{repo} has several configurations, name one with config: {choices or said}"
    if "BuilderConfig" in said:
        return f"{repo} has no such configuration, but {choices}"
    if "Couldn't find cache" in said:
        return f"offline, and {repo} is not in the cache: run once without offline and HF_HUB_OFFLINE ({_line(said)})"
    if "Unknown split" in said:
        return f"{repo} has no such split, but {choices}"
    return f"{repo} cannot be read: {_line(said)}"


def _line(error: Any) -> str:
    return " ".join(str(error).split())


def cut(text: str) -> list[str]:
    """A text in parts of about PART characters, cut where that changes no token; the last is what is left."""
    parts, begin = [], 0
    while len(text) - begin > PART and (found := _PLACE.search(text, begin + PART)):
        parts.append(text[begin : found.start()])
        begin = found.start()
    return [*parts, text[begin:]]


def _lines(path: Path) -> Iterator[tuple[int, str | InvalidRow]]:
    """Lines with their ends and numbers; one that is no UTF-8 is Bad."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                detail = f"byte {error.start + 1} of the line is not UTF-8: convert the file, or leave the line out"
                yield number, InvalidRow(str(path), number, "invalid UTF-8 (lines)", detail)


def _text(path: Path) -> Iterator[Row | InvalidRow]:
    """Documents between separators, else the file as one; blank ones are none."""
    lines: list[str] = []
    first, size, limit, begun = 1, 0, PART, False
    for number, line in _lines(path):
        if isinstance(line, InvalidRow):
            yield line
        elif line.strip() == SEPARATOR:
            text = "".join(lines)
            text = text[: -len("\r\n" if text.endswith("\r\n") else "\n")] if text.endswith("\n") else text
            if begun or text.strip():
                yield Row(str(path), first, text)
            lines, first, size, limit, begun = [], number + 1, 0, PART, False
        else:
            lines.append(line)
            size += len(line)
            if size > limit:
                *parts, rest = cut("".join(lines))
                yield from (Row(str(path), first, part, ends=False) for part in parts)
                lines, size, limit, begun = [rest], len(rest), len(rest) + PART, begun or bool(parts)
    if begun or "".join(lines).strip():
        yield Row(str(path), first, "".join(lines))


def _jsonl(path: Path) -> Iterator[Row | InvalidRow]:
    for number, line in _lines(path):
        if isinstance(line, InvalidRow):
            yield line
        elif line.strip():
            yield _parsed(path, number, line)


def _parsed(path: Path, number: int, line: str) -> Row | InvalidRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = (
            "the line is no JSON" if path.suffix == ".jsonl" else "it should be a list of objects, or one on each line"
        )
        return InvalidRow(str(path), number, "invalid JSON", f"{what} ({error})")
    return _row(path, number, value)


def _row(path: Path, number: int, value: Any) -> Row | InvalidRow:
    if not isinstance(value, dict):
        detail = f"a row is an object with fields, this is {json.dumps(value, ensure_ascii=False)[:60]}"
        return InvalidRow(str(path), number, "no object", detail)
    return Row(str(path), number, value)


def _json(path: Path) -> Iterator[Row | InvalidRow]:
    """A list of objects, or objects line by line under the name of .json."""
    with path.open("rb") as file:
        if file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return _jsonl(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return iter([InvalidRow(str(path), 0, "invalid JSON", f"it is no JSON ({error})")])
    if not isinstance(value, list):
        return iter([InvalidRow(str(path), 0, "invalid JSON", "it should be a list of objects")])
    return (_row(path, number, row) for number, row in enumerate(value, 1))


def _parquet(path: Path) -> Iterator[Row | InvalidRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Row(str(path), number, _known(row))
    except (ArrowException, OSError) as error:
        yield InvalidRow(str(path), number, "unreadable file", f"it cannot be read on from here ({_line(error)})")


def _known(value: Any) -> Any:
    """Without what is null: a column has every field that any of its rows has."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items() if item is not None}
    return [_known(item) for item in value] if isinstance(value, list) else value


READERS = {".txt": _text, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}

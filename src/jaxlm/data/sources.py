"""Data sources: .txt, .jsonl, .json and .parquet files, folders and globs of them, hub datasets.

A source is read row by row and is never in memory as a whole (except a .json list, which is one JSON value). A row that
cannot be read is yielded as an `InvalidRow` with its file and line; the caller decides whether to stop.
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
PART = 1 << 22  # characters: longer texts are held and tokenized in parts of about this size
# Where splitting a text changes no token: before a space between words, at the end of a line after a word.
_SPLIT = re.compile(r"(?<=\w)(?= \w)|(?<=\w\n)(?=\w)")
SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
# Common names that are no hub ids: repository and default configuration.
SHORT_NAMES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        source: File or hub dataset.
        number: Line in a .txt or .jsonl file, else index of the row, from 1.
        value: A text, or the fields.
        ends: Whether the document ends here; if not, the next row continues it.
    """

    source: str
    number: int
    value: Any
    ends: bool = True


class InvalidRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        source, number: As in Row.
        why: The kind of error, under which such rows are counted.
        detail: What is wrong.
    """

    source: str
    number: int
    why: str
    detail: str

    def __str__(self) -> str:
        return f"{location(self.source, self.number)}: {self.detail}"


def location(source: str, number: int) -> str:
    """Returns the location of a row as text: "story.txt:17", or "data.parquet, row 17"."""
    if number == 0:
        return source
    return f"{source}:{number}" if source.endswith((".txt", ".jsonl")) else f"{source}, row {number}"


@dataclass(frozen=True)
class File:
    """A file with a suffix of READERS."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[Row | InvalidRow]:
        if self.path.stat().st_size == 0:
            return iter([InvalidRow(self.name, 0, "empty file", "the file is empty")])
        return READERS[self.path.suffix](self.path)

    def digest(self) -> str:
        """Digest of the contents (name, size and time may stay the same when a file changes) and of the suffix."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest() + self.path.suffix.lower()


@dataclass(frozen=True)
class Hub:
    """A loaded hub dataset; `data` is a datasets.Dataset."""

    name: str
    data: Any

    def rows(self) -> Iterator[Row]:
        return (Row(self.name, i, _without_nulls(row)) for i, row in enumerate(self.data, 1))

    def digest(self) -> str:
        return self.data._fingerprint  # of the commit, the configuration and the split


def find_sources(
    names: str | Path | Sequence[str | Path],
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> list[File | Hub]:
    """Finds the sources with the given names.

    Args:
        names: Files, folders, globs, hub datasets ("wikitext", "org/name").
        split: Split of a hub dataset, and of a folder whose files are named after splits (train.jsonl, valid.jsonl,
            test-00000.parquet).
        config: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        offline: Use the local cache only, as with HF_HUB_OFFLINE=1.

    Raises:
        FileNotFoundError: A file, folder or dataset does not exist.
        ConnectionError: The hub cannot be reached.
        ValueError: A file has an unknown suffix, or a dataset has several configurations or no such split.
    """
    names = [names] if isinstance(names, str | Path) else names
    sources = [source for name in names for source in _find(name, split, config, revision, offline)]
    if not sources:
        raise ValueError("no data: pass a file, a folder, a glob or a hub dataset")
    return sources


def _find(name: str | Path, split: str, config: str | None, revision: str | None, offline: bool) -> Iterable[Any]:
    path = Path(name).expanduser()
    if path.is_dir():
        return map(File, _of_split(path, split))
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path} has an unknown suffix: convert it to one of {', '.join(READERS)}")
        return [File(path)]
    if any(char in str(name) for char in "*?["):
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).suffix in READERS]
        if not files:
            raise FileNotFoundError(f"no {', '.join(READERS)} file matches {name}")
        return map(File, files)
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in READERS:
        raise FileNotFoundError(f"no such file or folder: {text}")
    return [_from_hub(text, split, config, revision, offline)]


def _of_split(folder: Path, split: str) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in READERS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise FileNotFoundError(f"{folder} has no {', '.join(READERS)} file")
    named = {path: SPLITS.get(re.split(r"[-_.]", path.name)[0]) for path in files}
    if not any(named.values()):
        return files
    chosen = [path for path in files if named[path] == SPLITS.get(split, split)]
    if not chosen:
        splits = ", ".join(sorted({part for part in named.values() if part}))
        raise FileNotFoundError(f"{folder} has no files of the split {split!r}; it has {splits}")
    return chosen


def _from_hub(name: str, split: str, config: str | None, revision: str | None, offline: bool) -> Hub:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import is_offline_mode

    repo, default = SHORT_NAMES.get(name, (name, None))
    config = config or default
    try:
        if offline or is_offline_mode():
            last = repo.split("/")[-1]
            cached = Cache(repo_id=repo, dataset_name=last, config_name=config, version="auto", hash="auto")
            return Hub(repo, cached.as_dataset(split=split))
        return Hub(repo, datasets.load_dataset(repo, config, split=split, revision=revision))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local file or folder nor a hub dataset: {_one_line(error)} (set HF_TOKEN for a "
            "private or gated one)"
        ) from None
    except ConnectionError as error:
        raise ConnectionError(f"the dataset {name!r} cannot be downloaded: {_one_line(error)}") from None
    except ValueError as error:
        raise ValueError(_explain_hub_error(repo, str(error))) from None


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


def split_text(text: str) -> list[str]:
    """Splits a text into parts of about PART characters where that changes no token; the last part is the rest."""
    parts, begin = [], 0
    while len(text) - begin > PART and (match := _SPLIT.search(text, begin + PART)):
        parts.append(text[begin : match.start()])
        begin = match.start()
    return [*parts, text[begin:]]


def _read_lines(path: Path) -> Iterator[tuple[int, str | InvalidRow]]:
    """Yields line numbers and lines with their ends; a line that is not UTF-8 is an InvalidRow."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                detail = f"byte {error.start + 1} of the line is not UTF-8: convert the file, or delete the line"
                yield number, InvalidRow(str(path), number, "invalid UTF-8 (lines)", detail)


def _read_txt(path: Path) -> Iterator[Row | InvalidRow]:
    """Yields the documents between separators, without separators the file as one document. Blank ones are skipped."""
    lines: list[str] = []
    first, size, limit, begun = 1, 0, PART, False
    for number, line in _read_lines(path):
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
                *parts, rest = split_text("".join(lines))
                yield from (Row(str(path), first, part, ends=False) for part in parts)
                lines, size, limit, begun = [rest], len(rest), len(rest) + PART, begun or bool(parts)
    if begun or "".join(lines).strip():
        yield Row(str(path), first, "".join(lines))


def _read_jsonl(path: Path) -> Iterator[Row | InvalidRow]:
    for number, line in _read_lines(path):
        if isinstance(line, InvalidRow):
            yield line
        elif line.strip():
            yield _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> Row | InvalidRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "the line is not valid JSON"
        if path.suffix != ".jsonl":
            what = "the file must be a list of objects, or have one object per line"
        return InvalidRow(str(path), number, "invalid JSON", f"{what} ({error})")
    return _row(path, number, value)


def _row(path: Path, number: int, value: Any) -> Row | InvalidRow:
    if not isinstance(value, dict):
        detail = f"a row must be an object with fields, not {json.dumps(value, ensure_ascii=False)[:60]}"
        return InvalidRow(str(path), number, "not an object", detail)
    return Row(str(path), number, value)


def _read_json(path: Path) -> Iterator[Row | InvalidRow]:
    """Yields the rows of a list of objects, or of JSON lines with the suffix .json."""
    with path.open("rb") as file:
        if file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return _read_jsonl(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return iter([InvalidRow(str(path), 0, "invalid JSON", f"the file is not valid JSON ({error})")])
    if not isinstance(value, list):
        return iter([InvalidRow(str(path), 0, "invalid JSON", "the file must be a list of objects")])
    return (_row(path, number, row) for number, row in enumerate(value, 1))


def _read_parquet(path: Path) -> Iterator[Row | InvalidRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Row(str(path), number, _without_nulls(row))
    except (ArrowException, OSError) as error:
        yield InvalidRow(
            str(path), number, "unreadable file", f"the rest of the file cannot be read ({_one_line(error)})"
        )


def _without_nulls(value: Any) -> Any:
    """Drops null fields: a column has every field that any of its rows has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}

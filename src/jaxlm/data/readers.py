"""Reads the rows of a file: .txt, .jsonl, .json, .csv, .tsv, .parquet and .arrow, of which texts may be compressed.

A file is read row by row and is never in memory as a whole (except a .json list, which is one JSON value). A row that
cannot be read is yielded as an `InvalidRow` with its file and line; the caller decides whether to stop.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_missing_package

SEPARATOR = "<|endoftext|>"  # on a line of its own, between the documents of a .txt file
PART = 1 << 22  # characters: longer texts are held and tokenized in parts of about this size
CELL = 1 << 27  # characters of a value in a .csv file; a quote that is never closed stops there
TABLE_ROWS = 1000  # rows of a table in memory
# Where splitting a text changes no token: before a space between words, at the end of a line after a word.
_SPLIT = re.compile(r"(?<=\w)(?= \w)|(?<=\w\n)(?=\w)")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BY_LINES = (".txt", ".jsonl", ".csv", ".tsv")  # files whose rows are named by a line


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


def location(source: str, number: int, by_lines: bool = False) -> str:
    """Returns the location of a row as text: "story.txt:17", or "data.parquet, row 17".

    Args:
        source: The name of a file, or of another source.
        number: The number of the row, from 1. 0: the whole source.
        by_lines: Whether rows are lines whatever the suffix says.
    """
    if number == 0:
        return source
    by_lines = by_lines or kind(Path(source)).startswith(BY_LINES)
    return f"{source}:{number}" if by_lines else f"{source}, row {number}"


def explain_invalid(row: InvalidRow) -> str:
    """Returns the message for a row that stops the run or the evaluation."""
    return f"{row} (on_bad=skip, --data.on-bad skip, counts such rows and leaves them out)"


def kind(path: Path) -> str:
    """Returns what kind of file a name says it is: its suffix in small letters, ".jsonl.gz" of a compressed file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def read_rows(path: Path) -> Iterator[Row | InvalidRow]:
    """Yields the rows of a file whose kind is one of READERS."""
    try:
        with _open(path) as file:
            empty = not file.read(1)
    except OSError as error:
        if not _is_compressed(path):
            raise
        return iter([_unreadable(path, 0, error)])
    return iter([InvalidRow(str(path), 0, "empty file", "the file is empty")]) if empty else READERS[kind(path)](path)


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


def _open(path: Path) -> Any:
    """Opens a file for its bytes, which are decompressed while they are read."""
    if not _is_compressed(path):
        return path.open("rb")
    with explain_missing_package(str(path), "jaxlm[train]"):
        from pyarrow import input_stream
    return io.BufferedReader(input_stream(path, compression=COMPRESSIONS[path.suffix.lower()]))


def _unreadable(path: Path, number: int, error: Exception) -> InvalidRow:
    detail = f"the rest of the file cannot be read ({' '.join(str(error).split())})"
    return InvalidRow(str(path), number, "unreadable file", detail)


def split_text(text: str) -> list[str]:
    """Splits a text into parts of about PART characters where that changes no token; the last part is the rest."""
    parts, begin = [], 0
    while len(text) - begin > PART and (match := _SPLIT.search(text, begin + PART)):
        parts.append(text[begin : match.start()])
        begin = match.start()
    return [*parts, text[begin:]]


def read_lines(path: Path) -> Iterator[tuple[int, str, InvalidRow | None]]:
    """Yields line numbers and lines with their ends, with an InvalidRow for a line that is not UTF-8, and for the rest
    of a damaged compressed file. Only "\n" ends a line."""
    number = 0
    with _open(path) as file:
        try:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8"), None
                except UnicodeDecodeError as error:
                    detail = f"byte {error.start + 1} of the line is not UTF-8: convert the file, or delete the line"
                    bad = InvalidRow(str(path), number, "invalid UTF-8 (lines)", detail)
                    yield number, raw.decode(errors="replace"), bad
        except OSError as error:
            if not _is_compressed(path):
                raise
            yield number + 1, "\n", _unreadable(path, number + 1, error)


def _read_txt(path: Path) -> Iterator[Row | InvalidRow]:
    """Yields the documents between separators, without separators the file as one document. Blank ones are skipped."""
    lines: list[str] = []
    first, size, limit, begun = 1, 0, PART, False
    for number, line, bad in read_lines(path):
        if bad is not None:
            yield bad
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
    first = True
    for number, line, bad in read_lines(path):
        if bad is not None:
            yield bad
        elif line.strip():
            row = _parse(path, number, line)
            if first and isinstance(row, InvalidRow) and line.lstrip().startswith("["):
                row = row._replace(detail=f"{row.detail}. If the file is one JSON list, rename it to .json")
            yield row
            first = False


def _parse(path: Path, number: int, line: str) -> Row | InvalidRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "the line is not valid JSON"
        if not kind(path).startswith(".jsonl"):
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
    with _open(path) as file:
        if file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return _read_jsonl(path)
    try:
        with _open(path) as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        if not _is_compressed(path):
            raise
        return iter([_unreadable(path, 0, error)])
    except (ValueError, RecursionError) as error:
        return iter([InvalidRow(str(path), 0, "invalid JSON", f"the file is not valid JSON ({error})")])
    if not isinstance(value, list):
        return iter([InvalidRow(str(path), 0, "invalid JSON", "the file must be a list of objects")])
    return (_row(path, number, row) for number, row in enumerate(value, 1))


def _read_csv(path: Path, delimiter: str) -> Iterator[Row | InvalidRow]:
    """Yields the rows of a table whose first row has the names of the columns. Values are strings; empty ones are
    absent. A row is numbered by its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL))
    bad: list[InvalidRow] = []  # lines of the next row

    def lines() -> Iterator[str]:
        for _, line, invalid in read_lines(path):
            if invalid is not None:
                bad.append(invalid)
            yield line

    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = table.line_num + 1
        try:
            values = next(table, None)
        except csv.Error as error:
            why = "a quoted value is not closed" if "unexpected end of data" in str(error) else error
            detail = f"the row that begins here is no valid row of a table ({why})"
            if not bad:
                bad.append(InvalidRow(str(path), number, "invalid CSV", detail))
            values = []
        if bad:
            yield from bad
            bad.clear()
            if names is None:  # without names no row can be read
                return
        elif values and names is None:
            names = [name.strip() or f"column {i}" for i, name in enumerate(values, 1)]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                yield InvalidRow(str(path), number, "invalid CSV", f"two columns have the name {twice}: rename one")
                return
        elif values and names is not None:
            yield _table_row(path, number, names, values)
        if values is None:
            return


def _table_row(path: Path, number: int, names: list[str], values: list[str]) -> Row | InvalidRow:
    if len(values) != len(names):
        detail = f"the row has {len(values)} values, but the first row names {len(names)} columns"
        return InvalidRow(str(path), number, "invalid CSV", detail)
    return Row(str(path), number, {name: value for name, value in zip(names, values) if value})


def _read_parquet(path: Path) -> Iterator[Row | InvalidRow]:
    from pyarrow.parquet import ParquetFile

    return _read_table(path, lambda: ParquetFile(path).iter_batches(batch_size=TABLE_ROWS))


def _read_arrow(path: Path) -> Iterator[Row | InvalidRow]:
    """Yields the rows of Arrow's file format, which begins with ARROW1, or of its stream format."""
    from pyarrow import ipc, memory_map

    def batches() -> Iterator[Any]:
        with memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = ipc.open_file(file)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                yield from ipc.open_stream(file)

    return _read_table(path, batches)


def _read_table(path: Path, batches: Callable[[], Iterable[Any]]) -> Iterator[Row | InvalidRow]:
    """Yields the rows of pyarrow's record batches."""
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in batches():
            for first in range(0, batch.num_rows, TABLE_ROWS):
                for row in batch.slice(first, TABLE_ROWS).to_pylist():
                    number += 1
                    yield Row(str(path), number, without_nulls(row))
    except (ArrowException, OSError) as error:
        yield _unreadable(path, number, error)


def without_nulls(value: Any) -> Any:
    """Drops null fields: a column has every field that any of its rows has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


_TEXTS: dict[str, Callable[[Path], Iterator[Row | InvalidRow]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
}
READERS = {
    **_TEXTS,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    **{suffix + packed: read for packed in COMPRESSIONS for suffix, read in _TEXTS.items()},
}
KINDS = f"{', '.join([*_TEXTS, '.parquet', '.arrow'])}, and texts with {' or '.join(COMPRESSIONS)} after it"

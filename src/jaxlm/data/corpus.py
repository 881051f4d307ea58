"""Tokenized documents on disk, memory-mapped, so that a corpus may be larger than memory.

A corpus is a folder: ids.bin (the ids of all documents), loss_mask.bin (one byte per id; absent if all count in the
loss), ends.bin (where each document ends), places.bin (source and line or row of each) and corpus.json, which is
written last. A folder appears only when it is complete.

The cache has one folder per digest. The digest covers the contents and suffixes of the files (commit, configuration and
split of a hub dataset), the tokenizer with its chat template, and the options, but not the names of files. The same
data is therefore not tokenized twice, and stale data is never read. Computing the digest is fast compared with
tokenizing. The cache is never pruned.
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from jaxlm.checkpoint.atomic import is_disk_full
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.data.documents import EMPTY, Document, DocumentTokenizer, TextOptions
from jaxlm.data.readers import InvalidRow, Row, explain_invalid, location
from jaxlm.data.sources import find_sources
from jaxlm.devices.compilation_cache import cache_folder
from jaxlm.processing.tokenizer import Tokenizer

FORMAT = 2  # version of the file format and of the conversion from texts to documents
CONVERSATIONS = 3  # version of the conversion from other rows; runs on texts of earlier versions resume
FLUSH = 1 << 20  # tokens buffered in memory
FILES = ("ids", "loss_mask", "ends", "places")
TYPES = {"ends": np.int64, "places": np.int64, "loss_mask": np.bool_}
Progress = Callable[[int, int], None]  # documents, tokens


class Corpus:
    """Tokenized documents, in the order of their files.

    Attributes:
        ids: [tokens] of all documents, uint16 or int32.
        loss_mask: [tokens] bool; None if all tokens count.
        ends: [documents] int64, the end of each document in ids.
        about: digest, sources (names), and the contents of corpus.json: format, train_on, documents, tokens,
            loss_tokens (tokens that count in the loss), vocabulary (one more than the largest id), dropped (number of
            rows by reason), first_bad (an InvalidRow whose source is an index into sources, or None), notes (what is
            worth a word, such as the fields that are not used).
    """

    def __init__(self, about: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.about = about
        self.ids, self.ends, self.loss_mask = arrays["ids"], arrays["ends"], arrays.get("loss_mask")
        self._places = arrays["places"].reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids of each document [documents] int64."""
        return np.diff(self.ends, prepend=0)

    def document(self, i: int) -> Document:
        source, number = self._places[i]
        begin, end = (self.ends[i - 1] if i else 0), self.ends[i]
        loss_mask = np.ones(end - begin, bool) if self.loss_mask is None else np.array(self.loss_mask[begin:end])
        return Document(self.about["sources"][source], int(number), self.ids[begin:end].astype(np.int32), loss_mask)

    def where(self, i: int) -> str:
        """Returns the location of document i in its source, such as "story.txt:17"."""
        source, number = self._places[i]
        return location(self.about["sources"][source], int(number))

    def unused_sources(self) -> list[str]:
        """Returns the names of sources without a document."""
        counts = np.bincount(self._places[:, 0], minlength=len(self.about["sources"]))
        return [name for name, count in zip(self.about["sources"], counts.tolist(), strict=True) if not count]

    def __str__(self) -> str:
        about = self.about
        documents = f"{about['documents']:,} document{'s' * (about['documents'] != 1)}"
        text = f"{documents} ({about['format']}), {about['tokens']:,} tokens"
        if about["loss_tokens"] + about["documents"] < about["tokens"]:
            text += f", {about['loss_tokens']:,} in the loss mask"
        if dropped := about["dropped"]:
            first = about["first_bad"]
            where = f" (the first: {location(about['sources'][first[0]], first[1])})" if first else ""
            text += f"; dropped: {', '.join(f'{count:,} {why}' for why, count in dropped.items())}{where}"
        return "; ".join([text, *about.get("notes", [])])


def corpora_folder() -> Path:
    """Returns the default folder of corpora, in the cache folder of jaxlm."""
    return cache_folder() / "corpora"


def prepare(
    names: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    options: TextOptions | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    streaming: bool = False,
    on_bad: Literal["stop", "skip"] = "stop",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Returns the corpus of files, folders, globs or hub datasets, from the cache or newly tokenized.

    Args:
        names: Files, folders, globs or hub datasets (see sources.find_sources).
        tokenizer: The tokenizer, with its chat template.
        options: How rows are read.
        split, config, revision, offline, streaming: As in sources.find_sources.
        on_bad: "stop" raises at the first row that cannot be used, with its file and line; "skip" counts such rows.
            Empty texts are always counted and skipped.
        folder: The cache folder. Default: corpora_folder().
        progress: Called with the number of documents and tokens so far.

    Raises:
        ValueError: A row cannot be used, or no document is left.
        OSError: A source cannot be read, or the cache cannot be written.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}, but must be stop or skip")
    texts = DocumentTokenizer(tokenizer, options)
    sources = find_sources(names, split, config, revision, offline, streaming)
    key = {"format": FORMAT, "sources": [source.digest() for source in sources], **texts.identity()}
    if not _are_texts(sources, texts.options):
        key["conversations"] = CONVERSATIONS
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    path = (folder or corpora_folder()) / digest
    source_names = [source.name for source in sources]
    corpus = load(path, source_names)
    if corpus is None:
        documents = texts.documents(row for source in sources for row in source.rows())
        write(path, documents, texts, source_names, on_bad, progress)
        corpus = load(path, source_names)
        assert corpus is not None
    notes = [*corpus.about.get("notes", []), *(source.note for source in sources if source.note)]
    if unused := corpus.unused_sources():
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"NO ROW IS USED of {', '.join(unused[:3])}{more}")
    corpus.about["notes"] = notes
    if on_bad == "stop" and (first := corpus.about["first_bad"]):
        raise ValueError(explain_invalid(InvalidRow(source_names[first[0]], *first[1:])))
    return corpus


def _are_texts(sources: list[Any], options: TextOptions) -> bool:
    """Whether the first row is a text."""
    rows = (row for source in sources for row in source.rows() if isinstance(row, Row))
    return all(options.format_of(row.value) == "text" for row in itertools.islice(rows, 1))


def load(path: Path, sources: list[str]) -> Corpus | None:
    """Returns the corpus in a folder, with these names of its sources; None if it is absent or incomplete."""
    try:
        about = json.loads((path / "corpus.json").read_text())
        arrays: dict[str, Any] = {
            name: np.memmap(path / f"{name}.bin", dtype, "r") for name, dtype in about["arrays"].items()
        }
    except (OSError, ValueError, KeyError):
        return None
    if "train_on" not in about:  # written by an earlier version with the same digest: it is tokenized again
        return None
    complete = all(len(array) == about["sizes"][name] for name, array in arrays.items())
    return Corpus(about | {"digest": path.name, "sources": sources}, arrays) if complete else None


def write(
    path: Path,
    documents: Iterable[Document | InvalidRow],
    texts: DocumentTokenizer,
    sources: list[str],
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> None:
    """Writes a corpus to a temporary folder next to `path` and renames it. On an error, the temporary folder is
    deleted, and the error is raised as in `prepare`."""
    with explain_errors(f"the corpus cannot be written to {path.parent}", "choose another folder", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    try:
        writer = _Writer(texts, sources, on_bad, progress)
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(partial / f"{name}.bin", "wb")) for name in FILES}
            writer.write(documents, files)
        if writer.documents == 0:
            raise ValueError(writer.explain_empty())
        if texts.train_on == "all":
            (partial / "loss_mask.bin").unlink()
        (partial / "corpus.json").write_text(json.dumps(writer.about(), indent=1))
        if load(path, sources) is None:  # else another process was first
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            f"the disk of {path.parent} is full ({error}): free some space, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def in_memory(
    documents: Iterable[Document | InvalidRow],
    texts: DocumentTokenizer,
    sources: list[str],
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> Corpus:
    """Returns a corpus that is in memory and not in the cache. It may have no document. Raises as `prepare` does."""
    writer = _Writer(texts, sources, on_bad, progress)
    files = {name: io.BytesIO() for name in FILES}
    writer.write(documents, files)
    about = writer.about()
    arrays = {name: np.frombuffer(files[name].getbuffer(), dtype) for name, dtype in about["arrays"].items()}
    return Corpus(about | {"sources": sources}, arrays)


class _Writer:
    """Writes the arrays of a corpus to files, and counts."""

    def __init__(self, texts: DocumentTokenizer, sources: list[str], on_bad: str, progress: Progress | None):
        self.texts, self.on_bad, self.progress = texts, on_bad, progress
        self.id_type = np.uint16 if texts.tokenizer.vocab_size <= 1 << 16 else np.int32
        self.tokens = self.loss_tokens = self.documents = 0
        self.sources = {name: i for i, name in enumerate(sources)}
        self.dropped: Counter[str] = Counter()
        self.first_bad: InvalidRow | None = None

    def write(self, documents: Iterable[Document | InvalidRow], files: Mapping[str, IO[bytes]]) -> None:
        """Writes documents to a file for each of FILES."""
        buffers: dict[str, list[Any]] = {name: [] for name in FILES}
        begins, flushed = True, 0
        for document in documents:
            if isinstance(document, InvalidRow):
                self._drop(document)
                continue
            self._add(document, buffers, begins)
            begins = document.ends
            if self.progress is not None and self.documents % 1000 == 0:
                self.progress(self.documents, self.tokens)
            if self.tokens - flushed >= FLUSH:
                self._flush(files, buffers)
                flushed = self.tokens
        self._flush(files, buffers)
        if self.progress is not None:
            self.progress(self.documents, self.tokens)

    def explain_empty(self) -> str:
        """Returns the message for a corpus without a document."""
        counts = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items())
        first = f"; the first: {self.first_bad}" if self.first_bad else ""
        return f"no document to train on (dropped: {counts or 'none'}){first}"

    def _drop(self, bad: InvalidRow) -> None:
        self.dropped[bad.why] += 1
        if bad.why == EMPTY:
            return
        self.first_bad = self.first_bad or bad
        if self.on_bad == "stop":
            raise ValueError(explain_invalid(bad))

    def _add(self, document: Document, buffers: dict[str, list[Any]], begins: bool) -> None:
        buffers["ids"].append(document.ids.astype(self.id_type))
        buffers["loss_mask"].append(document.loss_mask)
        self.tokens += len(document.ids)
        # The first id of a document is never predicted.
        self.loss_tokens += int(document.loss_mask[1:].sum() if begins else document.loss_mask.sum())
        if begins:
            buffers["places"].append([self.sources[document.source], document.number])
        if document.ends:
            buffers["ends"].append(self.tokens)
            self.documents += 1

    def _flush(self, files: Mapping[str, IO[bytes]], buffers: dict[str, list[Any]]) -> None:
        for name, values in buffers.items():
            joined = np.concatenate(values) if name in ("ids", "loss_mask") and values else np.array(values, np.int64)
            if values:
                files[name].write(joined.tobytes())
            values.clear()

    def about(self) -> dict[str, Any]:
        """Returns the contents of corpus.json."""
        sizes = {"ids": self.tokens, "loss_mask": self.tokens, "ends": self.documents, "places": 2 * self.documents}
        if self.texts.train_on == "all":
            del sizes["loss_mask"]
        arrays = {name: np.dtype(TYPES.get(name, self.id_type)).str for name in sizes}
        about = {"format": self.texts.format, "train_on": self.texts.train_on, "documents": self.documents}
        about |= {"tokens": self.tokens, "loss_tokens": self.loss_tokens, "vocabulary": self.texts.tokenizer.vocab_size}
        first = self.first_bad and (self.sources[self.first_bad.source], *self.first_bad[1:])
        about |= {"dropped": self.dropped, "first_bad": first, "notes": self.texts.notes}
        return about | {"arrays": arrays, "sizes": sizes}

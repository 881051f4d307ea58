"""Documents as arrays on disk, memory-mapped: a corpus may be larger than the memory.

A corpus is a folder: ids.bin (every document's ids, one after the other), loss_mask.bin (one byte an id; absent where
all count in the loss), ends.bin (where each document ends), places.bin (source and line or row of each) and
corpus.json, which is written last. A folder appears under its name when it is complete.

The cache has one such folder a digest: of the contents and kinds of the files (a hub dataset's commit, configuration
and split), of the tokenizer with its chat template, and of the options, but not of names: those given now are told. So
nothing is tokenized twice, and nothing stale is read; reading the files once to know that is small compared with
tokenizing them. Nothing is ever removed from the cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.checkpoint.atomic import is_disk_full
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.data.documents import EMPTY, Document, TextOptions, Texts
from jaxlm.data.sources import InvalidRow, find, place
from jaxlm.processing.tokenizer import Tokenizer

FORMAT = 2  # of these files, and of what the code makes of rows
FLUSH = 1 << 20  # tokens that wait in memory
TYPES = {"ends": np.int64, "places": np.int64, "loss_mask": np.bool_}
Progress = Callable[[int, int], None]  # documents, tokens


class Corpus:
    """Tokenized documents, in the order of their files.

    Attributes:
        ids: [tokens] of all documents, unsigned 16 bits or int32. loss_mask: [tokens] bool, or None: all.
        ends: [documents] int64, where each ends in ids.
        about: digest (of all that it was made from), sources (their names), and what corpus.json holds: format,
        train_on,
            documents, tokens, loss_tokens (tokens that count in the loss), vocabulary (one more than the largest id),
            dropped (why -> rows), first_bad (a Bad, whose source is a number of sources; None).
    """

    def __init__(self, about: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.about = about
        self.ids, self.ends, self.loss_mask = arrays["ids"], arrays["ends"], arrays.get("loss_mask")
        self._places = arrays["places"].reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each document [documents] int64."""
        return np.diff(self.ends, prepend=0)

    def document(self, i: int) -> Document:
        source, number = self._places[i]
        begin, end = (self.ends[i - 1] if i else 0), self.ends[i]
        loss_mask = np.ones(end - begin, bool) if self.loss_mask is None else np.array(self.loss_mask[begin:end])
        return Document(self.about["sources"][source], int(number), self.ids[begin:end].astype(np.int32), loss_mask)

    def where(self, i: int) -> str:
        """Where document i comes from: story.txt:17."""
        source, number = self._places[i]
        return place(self.about["sources"][source], int(number))

    def __str__(self) -> str:
        about = self.about
        text = f"{about['documents']:,} documents ({about['format']}), {about['tokens']:,} tokens"
        if about["loss_tokens"] + about["documents"] < about["tokens"]:
            text += f", {about['loss_tokens']:,} of them learned"
        if dropped := about["dropped"]:
            text += f"; dropped: {', '.join(f'{count:,} {why}' for why, count in dropped.items())}"
        return text


def cache_folder() -> Path:
    """Where corpora are kept unless a folder is named: in $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm" / "corpora"


def prepare(
    names: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    options: TextOptions | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    on_bad: Literal["stop", "skip"] = "stop",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of these files, folders, globs or hub datasets (see sources.find): from the cache, or made now.

    on_bad: "stop" raises at the first row that gives no document, with its file and line; "skip" counts them. Empty
    texts are counted and never stop. folder: the cache. progress: is told documents and tokens so far.

    Raises ValueError or OSError with what is wrong, where, and the way out.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}: stop or skip")
    texts, sources = Texts(tokenizer, options), find(names, split, config, revision, offline)
    key = {"format": FORMAT, "sources": [source.digest() for source in sources], **texts.identity()}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    path = (folder or cache_folder()) / digest
    called = [source.name for source in sources]
    corpus = load(path, called)
    if corpus is None:
        found = texts.documents(row for source in sources for row in source.rows())
        write(path, found, texts, called, on_bad, progress)
        corpus = load(path, called)
        assert corpus is not None
    if on_bad == "stop" and (first := corpus.about["first_bad"]):
        raise ValueError(_stopped(InvalidRow(called[first[0]], *first[1:])))
    return corpus


def _stopped(first: InvalidRow) -> str:
    return f"{first} (on_bad=skip leaves such rows out and counts them)"


def load(path: Path, sources: list[str]) -> Corpus | None:
    """The corpus in a folder, made of `sources`; None where there is none, or not all of it."""
    try:
        about = json.loads((path / "corpus.json").read_text())
        arrays: dict[str, Any] = {
            name: np.memmap(path / f"{name}.bin", dtype, "r") for name, dtype in about["arrays"].items()
        }
    except (OSError, ValueError, KeyError):
        return None
    if "train_on" not in about:  # written by an earlier version: prepared again, under the same digest
        return None
    complete = all(len(array) == about["sizes"][name] for name, array in arrays.items())
    return Corpus(about | {"digest": path.name, "sources": sources}, arrays) if complete else None


def write(
    path: Path,
    documents: Iterable[Document | InvalidRow],
    texts: Texts,
    sources: list[str],
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> None:
    """Writes the corpus of `sources` as it comes in, beside, and renames it. Raises as `prepare` does; then nothing is
    left of it."""
    with explain_errors(f"the corpus cannot be written to {path.parent}", "choose another folder", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=".being-made-"))
    try:
        _Writer(made, texts, sources, on_bad, progress).write(documents)
        if load(path, sources) is None:  # else another process was first
            shutil.rmtree(path, ignore_errors=True)
            os.replace(made, path)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise OSError(f"the disk of {path.parent} is full ({error}): make room, or name another folder") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Writer:
    """The files of a corpus while it is written."""

    def __init__(self, folder: Path, texts: Texts, sources: list[str], on_bad: str, progress: Progress | None):
        self.folder, self.texts, self.on_bad, self.progress = folder, texts, on_bad, progress
        self.id_type = np.uint16 if texts.tokenizer.vocab_size <= 1 << 16 else np.int32
        self.tokens = self.loss_tokens = self.documents = 0
        self.sources = {name: i for i, name in enumerate(sources)}
        self.dropped: Counter[str] = Counter()
        self.first_bad: InvalidRow | None = None

    def write(self, documents: Iterable[Document | InvalidRow]) -> None:
        waiting: dict[str, list[Any]] = {"ids": [], "loss_mask": [], "ends": [], "places": []}
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / f"{name}.bin", "wb")) for name in waiting}
            begins, flushed = True, 0
            for document in documents:
                if isinstance(document, InvalidRow):
                    self._drop(document)
                    continue
                self._add(document, waiting, begins)
                begins = document.ends
                if self.progress is not None and self.documents % 1000 == 0:
                    self.progress(self.documents, self.tokens)
                if self.tokens - flushed >= FLUSH:
                    self._flush(files, waiting)
                    flushed = self.tokens
            self._flush(files, waiting)
        if not self.documents:
            counts = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items())
            raise ValueError(f"there is no document to learn from (dropped: {counts or 'nothing'})"
                             + (f"; the first: {self.first_bad}" if self.first_bad else ""))  # fmt: skip
        self._finish()
        if self.progress is not None:
            self.progress(self.documents, self.tokens)

    def _drop(self, bad: InvalidRow) -> None:
        self.dropped[bad.why] += 1
        if bad.why == EMPTY:
            return
        self.first_bad = self.first_bad or bad
        if self.on_bad == "stop":
            raise ValueError(_stopped(bad))

    def _add(self, document: Document, waiting: dict[str, list[Any]], begins: bool) -> None:
        waiting["ids"].append(document.ids.astype(self.id_type))
        waiting["loss_mask"].append(document.loss_mask)
        self.tokens += len(document.ids)
        # The first id of a document is never predicted.
        self.loss_tokens += int(document.loss_mask[1:].sum() if begins else document.loss_mask.sum())
        if begins:
            waiting["places"].append([self.sources[document.source], document.number])
        if document.ends:
            waiting["ends"].append(self.tokens)
            self.documents += 1

    def _flush(self, files: dict[str, Any], waiting: dict[str, list[Any]]) -> None:
        for name, values in waiting.items():
            joined = np.concatenate(values) if name in ("ids", "loss_mask") and values else np.array(values, np.int64)
            if values:
                files[name].write(joined.tobytes())
            values.clear()

    def _finish(self) -> None:
        sizes = {"ids": self.tokens, "loss_mask": self.tokens, "ends": self.documents, "places": 2 * self.documents}
        if self.texts.train_on == "all":
            del sizes["loss_mask"]
            (self.folder / "loss_mask.bin").unlink()
        arrays = {name: np.dtype(TYPES.get(name, self.id_type)).str for name in sizes}
        about = {"format": self.texts.format, "train_on": self.texts.train_on, "documents": self.documents}
        about |= {"tokens": self.tokens, "loss_tokens": self.loss_tokens, "vocabulary": self.texts.tokenizer.vocab_size}
        first = self.first_bad and (self.sources[self.first_bad.source], *self.first_bad[1:])
        about |= {"dropped": self.dropped, "first_bad": first}
        about |= {"arrays": arrays, "sizes": sizes}
        (self.folder / "corpus.json").write_text(json.dumps(about, indent=1))

"""Streaming: the data loader of sources that are larger than the disk, or that are not to be tokenized before training.

Documents are read in the order of their sources, a window of `buffer` documents at a time. A window is tokenized, and
its documents are shuffled and packed like those of a whole corpus (packing.py). While its rows are used, the next one
is read. Each epoch reads the sources in another order.

Rows are numbered consecutively over windows and epochs, and batch `step` has the rows step*B to step*B+B-1. They are a
pure function of (seed, step), as in packing.py. Without more, a row is found by reading all windows before it. With the
positions of the windows that were read, a run resumes at the window of its step.
"""

import hashlib
import json
import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.corpus import Corpus, Progress, in_memory
from jaxlm.data.documents import DocumentTokenizer
from jaxlm.data.packing import SOURCES, Batch, DataLoader, Long, NoTarget, Packing, prefetched, random_numbers
from jaxlm.data.readers import InvalidRow, Row
from jaxlm.data.sources import Source

CHANGED = "the data are not those that the run has read: choose another folder (--out) for a new run"


class UnreadableSource(ValueError):
    """A source cannot be read: a network or disk error, or damaged contents."""


class Position(NamedTuple):
    """Where a window begins.

    Attributes:
        row: The number of its first row.
        epoch: Number of times that all sources were read before.
        source: Index in the epoch's order of the sources.
        start: Rows of this source that are in earlier windows.
        digest: Digest of the documents of the window before; "" for the first.
    """

    row: int
    epoch: int
    source: int
    start: int
    digest: str = ""


class Window(NamedTuple):
    """Documents that are shuffled together.

    Attributes:
        loader: Their data loader; None if no document has a target.
        begin, end: Where this window and the next one begin.
    """

    loader: DataLoader | None
    begin: Position
    end: Position


class StreamingLoader:
    """A data loader that reads its documents while it is used.

    Args:
        sources: The sources.
        texts: The tokenizer of their rows.
        B, T, seed, packing, share, long: As of DataLoader.
        buffer: Documents of a window. They are in memory, with those of the next window.
        on_bad: "stop" raises at a row that cannot be used, when its window is read; "skip" counts it.
        progress: Called with the number of documents and tokens of the first window so far.

    Attributes:
        digest: Digest of the first window, the tokenizer and all options on which positions depend. Later windows are
            checked when they are read again: their positions have digests.
        sources_digest: Digest of the sources: size, beginning and end of each file.
        positions: The positions of windows that are known.
        dropped: Number of rows that were left out, dropped or truncated by reason, in the windows of the first epoch
            that this loader has read.

    Raises:
        ValueError: A row of the first window cannot be used, or it has no document.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        texts: DocumentTokenizer,
        B: int,
        T: int,
        seed: int = 0,
        packing: Packing | None = None,
        share: slice | None = None,
        long: Long = "truncate",
        *,
        buffer: int = 10_000,
        on_bad: str = "stop",
        progress: Progress | None = None,
    ):
        if buffer < 1:
            raise ValueError(f"the shuffle buffer has {buffer} documents, but must have at least 1")
        self.sources, self.texts, self.buffer, self.on_bad = list(sources), texts, buffer, on_bad
        self.names = [source.name for source in sources]
        self.B, self.T, self.seed = B, T, seed
        self.packing: Packing | None = packing
        self.long: Long = long
        self.share = share or slice(0, B)
        self.sources_digest = _digest_of([source.sample_digest() for source in sources])
        self.dropped: Counter[str] = Counter()
        self._first_bad: InvalidRow | None = None
        self._windows: dict[int, Future[Window]] = {}
        self._counted = 0  # windows whose rows are in dropped
        self._lock, self._reading, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._open: tuple[tuple[int, int, int], Iterator[tuple[Row | InvalidRow, int, int]]] | None = None
        # The first window is read in any case: the format is that of the first row.
        start = Position(0, 0, 0, 0)
        first_window = self._read(0, start, progress)
        if first_window.loader is None:
            counts = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items())
            first = f"; the first: {self._first_bad}" if self._first_bad else ""
            raise ValueError(f"the first {buffer:,} rows have no document to train on (left out: {counts}{first})")
        self._windows[0] = Future()
        self._windows[0].set_result(first_window)
        self.positions = [start, first_window.end]
        options = [len(sources), buffer, seed, T, packing, long]
        self.digest = _digest_of([texts.identity(), first_window.end.digest, *options])
        self._description, self._first_fill = first_window.loader.describe()[0], first_window.loader.fill()
        self._noted = Counter(self.dropped)  # the description has them

    def continue_from(self, positions: Sequence[Position]) -> None:
        """Takes over the positions of windows from an earlier loader with the same digest."""
        if list(positions[:2]) != self.positions[: len(positions)]:
            raise ValueError(CHANGED)
        self.positions = [*positions, *self.positions[len(positions) :]]

    def _rows(self, epoch: int, first: int, start: int) -> Iterator[tuple[Row | InvalidRow, int, int]]:
        """Yields the rows from a position to the end of the epoch, each with the source and start after it."""
        order = np.argsort(random_numbers(self.seed, epoch, SOURCES, len(self.sources)), kind="stable").tolist()
        for n in range(first, len(order)):
            source, i = self.sources[order[n]], start
            try:
                for i, row in enumerate(source.rows(start), start + 1):
                    yield row, n, i
            except Exception as error:  # of files, networks and parsers, each with their own types
                why = " ".join(str(error).split())
                raise UnreadableSource(f"{source.name} cannot be read after row {i:,}: {why}") from error
            start = 0

    def _read(self, number: int, begin: Position, progress: Progress | None = None) -> Window:
        """Reads the window at a position."""
        with self._reading:  # its place in the sources is shared
            place = begin[1:4]
            rows = self._open[1] if self._open and self._open[0] == place else self._rows(*place)
            self._open, end, ended = None, place, True

            def taken() -> Iterator[Row | InvalidRow]:
                nonlocal end, ended
                documents, is_open = 0, False  # is_open: a document continues in the next row
                for row, source, start in rows:
                    end = (begin.epoch, source, start)
                    yield row
                    documents += isinstance(row, InvalidRow) or row.ends
                    is_open = is_open if isinstance(row, InvalidRow) else not row.ends
                    if documents >= self.buffer and not is_open:
                        ended = False
                        return

            corpus = in_memory(self.texts.documents(taken()), self.texts, self.names, self.on_bad, progress)
            if ended:
                end = (begin.epoch + 1, 0, 0)
            else:
                self._open = end, rows
            digest = _digest_of(None, corpus.ids, corpus.ends, corpus.loss_mask)
            try:
                share = slice(0, self.B)
                loader = DataLoader(corpus, self.B, self.T, self.seed, self.packing, share, self.long)
            except NoTarget as error:
                self._count(number, begin, corpus, error.counts)
                return Window(None, begin, Position(begin.row, *end, digest))
            self._count(number, begin, corpus, loader.counts)
            return Window(loader, begin, Position(begin.row + loader.rows(number), *end, digest))

    def _count(self, number: int, begin: Position, corpus: Corpus, counts: Mapping[str, int]) -> None:
        """Counts the rows of a window that were left out, once."""
        with self._counting:
            if number >= self._counted and begin.epoch == 0:
                self._counted = number + 1
                self.dropped += Counter(corpus.about["dropped"]) + Counter(counts)
                if self._first_bad is None and (bad := corpus.about["first_bad"]):
                    self._first_bad = InvalidRow(self.names[bad[0]], *bad[1:])

    def _start(self, number: int) -> Future[Window]:
        """Reads a window in a thread, unless it was read or is being read."""
        if number not in self._windows:
            future: Future[Window] = Future()
            begin = self.positions[number]

            def read() -> None:
                try:
                    future.set_result(self._read(number, begin))
                except BaseException as error:  # raised where the window is used
                    future.set_exception(error)

            self._windows[number] = future
            threading.Thread(target=read, daemon=True).start()
        return self._windows[number]

    def _window(self, row: int) -> tuple[int, Window]:
        """Returns the window of a row, and its number. Reads the next window ahead."""
        number = bisect_right(self.positions, row, key=lambda position: position.row) - 1
        if number + 1 == len(self.positions) and number not in self._windows:
            number -= 1  # of this window nothing is known, so the one before shows whether the data are the same
        while True:
            window = self._start(number).result()
            if number + 1 == len(self.positions):
                self._check_epoch(window)
                self.positions.append(window.end)
            if self.positions[number + 1] != window.end:
                raise ValueError(CHANGED)
            for other in list(self._windows):
                if not number - 1 <= other <= number + 1:
                    del self._windows[other]
            self._start(number + 1)
            if row < window.end.row:
                return number, window
            number += 1

    def _check_epoch(self, window: Window) -> None:
        """Raises ValueError if an epoch ended without a row, and the search for one would not end."""
        at = bisect_left(self.positions, window.begin.epoch, key=lambda position: position.epoch)
        first = self.positions[at]
        if window.end.epoch > window.begin.epoch and window.end.row == first.row:
            raise ValueError("no document of the sources has a target")

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of a step. Thread-safe."""
        return self.take(range(step * self.B, (step + 1) * self.B)[self.share])

    def take(self, rows: Iterable[int]) -> Batch:
        """Returns rows by their numbers. Fast if they are near those of the last call."""
        with self._lock:  # a batch at a time, if several threads ask
            found = [(row, *self._window(row)) for row in rows]
        parts = []
        for number, same in groupby(found, key=lambda one: one[1]):
            some = list(same)
            loader, begin, _ = some[0][2]
            assert loader is not None
            parts.append(loader.assemble([(number, row - begin.row) for row, _, _ in some]))
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yields the batches from step `start` on, indefinitely, prefetched by grain. One thread asks for them, so that
        windows are read in order."""
        return prefetched(self.batch, start, threads=1)

    def rows(self) -> int:
        raise ValueError("the number of rows is not known while documents are streamed: give the number of steps")

    def steps(self, epochs: float = 1) -> int:
        raise ValueError("the number of documents is not known while they are streamed: give --steps, not --epochs")

    def epoch(self, step: int) -> float:
        """Returns the number of complete epochs before this step, as far as is known."""
        return self.epoch_of(step * self.B)

    def epoch_of(self, row: int) -> float:
        """Returns the number of complete epochs before this row, as far as is known."""
        return float(self.positions[bisect_right(self.positions, row, key=lambda position: position.row) - 1].epoch)

    def fill(self) -> float:
        """Returns the fraction of the first window's rows that is not padding."""
        return self._first_fill

    def are_texts(self) -> bool:
        """Whether the documents are texts, not conversations or prompts with completions."""
        return self.texts.format == "text"

    def describe(self) -> list[str]:
        """Returns a line about the data."""
        notes = [source.note for source in self.sources if source.note]
        what = f"streamed, {self.buffer:,} documents shuffled together. The first of them: "
        return ["; ".join([what + self._description, *notes])]

    def describe_epochs(self, step: int) -> str:
        return "an unknown number of epochs"

    def new_notes(self) -> list[str]:
        """Returns a line about all rows that were left out or truncated, if there are more than at the last call."""
        with self._counting:
            if self.dropped == self._noted:
                return []
            self._noted = Counter(self.dropped)
            counts = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items())
            return [f"left out or truncated so far: {counts}" + (f" ({self._first_bad})" if self._first_bad else "")]


def _digest_of(value: Any, *arrays: np.ndarray | None) -> str:
    """Returns the digest of a value that JSON can represent, and of arrays."""
    found = hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16)
    for array in arrays:
        found.update(b"" if array is None else array.tobytes())
    return found.hexdigest()

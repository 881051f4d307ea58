"""Packed rows and batches of a corpus: pure functions of (seed, step).

Rows are numbered on over the epochs, and batch `step` has rows step*B to step*B+B-1, so the state of the data is one
integer. The order is global: a process makes its share of every batch. An epoch has its own order of documents
and rows, so many rows as it needs, and every document once; the batch at its end takes its other rows from the next.

    split    documents, one after the other, cut every T tokens. What is cut goes on in another row, where positions
             begin again; nothing is lost. The cuts fall elsewhere in every epoch, and the rows are shuffled once more:
             a corpus of one long text has an order too.
    whole    no document is cut that fits a row: best fit, over a thousand rows' worth of shuffled documents at a time.
    none     a document a row.

Stability: the same rows for the same corpus, seed, T and packing, on every machine and with every numpy: all chance is
raw output of the Philox4x64 counter generator, whose stream numpy promises to keep (of its distributions and
permutations it does not), sorted.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.data.corpus import Corpus

WINDOW = 1000  # rows' worth of documents that are packed together
THREADS, AHEAD = 2, 8  # of prefetching: threads, batches
DOCUMENTS, ROWS, SHIFT = range(3)  # what chance is drawn for


class Batch(NamedTuple):
    """One process's rows. tokens, targets, pos [B,T] int32; learned [B,T] bool: whether the target here counts.

    pos begins at 0 with every document, which keeps them apart, and is -1 where there is nothing: there tokens and
    targets are 0, and learned is False."""

    tokens: np.ndarray
    targets: np.ndarray
    pos: np.ndarray
    loss_mask: np.ndarray


class Plan(NamedTuple):
    """The rows of an epoch: row r has the pieces first[r] to first[r+1]. A piece: document, its first token, tokens."""

    first: np.ndarray
    pieces: np.ndarray

    def row(self, r: int) -> np.ndarray:
        """Its pieces [n,3] int64."""
        return self.pieces[self.first[r] : self.first[r + 1]]


class Stream(NamedTuple):
    """The rows of an epoch of "split", found by arithmetic: row r begins at token shift + T * order[r] of the documents
    in order, which begin again after the last."""

    documents: np.ndarray
    ends: np.ndarray
    order: np.ndarray
    shift: int
    T: int

    def row(self, r: int) -> np.ndarray:
        """Its pieces [n,3] int64."""
        total, offset = int(self.ends[-1]), int(self.order[r]) * self.T
        begin = self.shift + offset
        end = begin + min(self.T, total - offset)
        rounds = [(max(begin, a) - a, min(end, a + total) - a) for a in (0, total)]
        return np.concatenate([self._pieces(*span) for span in rounds if span[0] < span[1]])

    def _pieces(self, begin: int, end: int) -> np.ndarray:
        i, j = np.searchsorted(self.ends, begin, "right"), np.searchsorted(self.ends, end, "left") + 1
        ends = self.ends[i:j]
        begins = np.concatenate([self.ends[i - 1 : i] if i else [0], ends[:-1]])
        from_, to = np.maximum(begins, begin), np.minimum(ends, end)
        return np.stack([self.documents[i:j], from_ - begins, to - from_], axis=1)


class DataLoader:
    """The batches of a corpus.

    Args:
        B, T: rows and tokens a row of a batch, all processes together.
        packing: "split", "whole" or "none"; None: split for texts, whole for all else.
        share: which rows of a batch this process makes; None: all.
        long: what "whole" and "none" do with a document of more than T tokens: "truncate", "drop", or "stop" at the
            first (ValueError with its file and line).

    Attributes:
        counts: documents of one token (left out), and those longer than a row, by what happened to them.
        note: the same in words, with the first of each; "" where there is none.
    """

    def __init__(
        self,
        corpus: Corpus,
        B: int,
        T: int,
        seed: int = 0,
        packing: Literal["split", "whole", "none"] | None = None,
        share: slice | None = None,
        long: Literal["truncate", "drop", "stop"] = "truncate",
    ):
        packing = packing or ("split" if corpus.about["format"] == "text" else "whole")
        if packing not in ("split", "whole", "none") or long not in ("truncate", "drop", "stop"):
            raise ValueError(f"packing is {packing!r} (split, whole, none), long {long!r} (truncate, drop, stop)")
        if B < 1 or T < 1:
            raise ValueError(f"a batch of {B} rows of {T} tokens: there must be at least one of both")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"the seed {seed} is not between 0 and 2**64 - 1")
        self.corpus, self.B, self.T, self.seed, self.packing = corpus, B, T, seed, packing
        self.share = share or slice(0, B)
        self.counts: dict[str, int] = {}
        self.lengths = np.maximum(corpus.lengths - 1, 0)  # tokens that have a target
        if not self.lengths.any():
            raise ValueError("no document has two tokens")
        self.note = ". ".join(filter(None, [self._short(), "" if packing == "split" else self._shorten(long)]))
        if not self.lengths.any():
            raise ValueError(f"no document is left ({self.note})")
        self._firsts = [0]  # of each epoch that was planned, its first row
        self._lock = threading.RLock()
        self._plan = lru_cache(2)(self._planned)

    def _short(self) -> str:
        """Counts what has nothing to predict."""
        alone = np.flatnonzero(self.lengths == 0)
        if not len(alone):
            return ""
        self.counts["left out"] = len(alone)
        where = self.corpus.where(alone[0])
        return f"{len(alone):,} left out of {len(self.corpus):,} documents, for having one token ({where})"

    def _shorten(self, long: str) -> str:
        """Cuts or drops what is longer than a row."""
        over = np.flatnonzero(self.lengths > self.T)
        if not len(over):
            return ""
        where = f"{self.corpus.where(over[0])} has {self.lengths[over[0]]:,} tokens, a row {self.T:,}"
        if long == "stop":
            raise ValueError(f"{where}: make rows longer, or let long be truncate or drop")
        begins = self.corpus.ends[over] - self.lengths[over]  # of what is predicted
        learned = self.corpus.loss_mask
        kept = [long == "truncate" and (learned is None or bool(learned[b : b + self.T].any())) for b in begins]
        self.lengths[over] = np.where(kept, self.T, 0)
        found = {"truncated": sum(kept), "dropped": len(over) - sum(kept)}
        found = {what: count for what, count in found.items() if count}
        self.counts |= found
        how = " and ".join(f"{count:,} {what}" for what, count in found.items())
        return f"{how} of {len(self.corpus):,} documents, for their length ({where})"

    def _draw(self, epoch: int, purpose: int, n: int) -> np.ndarray:
        """n random numbers [n] uint64."""
        key, counter = np.array([self.seed, epoch], np.uint64), np.array([0, 0, 0, purpose], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(n)

    def _order(self, epoch: int, purpose: int, n: int) -> np.ndarray:
        return np.argsort(self._draw(epoch, purpose, n), kind="stable")

    def _planned(self, epoch: int) -> Plan | Stream:
        order = self._order(epoch, DOCUMENTS, len(self.lengths))
        order = order[self.lengths[order] > 0]
        lengths = self.lengths[order]
        if self.packing == "split":
            ends = np.cumsum(lengths)
            shift = int(self._draw(epoch, SHIFT, 1)[0] % ends[-1])
            return Stream(order, ends, self._order(epoch, ROWS, -(-int(ends[-1]) // self.T)), shift, self.T)
        if self.packing == "whole":
            row, placed = pack(lengths, self.T, self._draw(epoch, ROWS, len(order)))
            order, lengths, row = order[placed], lengths[placed], row[placed]
        else:
            row = np.arange(len(order))
        pieces = np.stack([order, np.zeros_like(order), lengths], axis=1)
        return Plan(np.searchsorted(row, np.arange(row[-1] + 2)), pieces)

    def plan(self, epoch: int) -> Plan | Stream:
        with self._lock:  # threads prefetch
            return self._plan(epoch)

    def rows(self, epoch: int = 0) -> int:
        """How many rows this epoch has. With "whole" epochs differ a little."""
        plan = self.plan(epoch)
        return len(plan.order) if isinstance(plan, Stream) else len(plan.first) - 1

    def fill(self, epoch: int = 0) -> float:
        """The part of an epoch's rows that is not padding."""
        return float(self.lengths.sum() / (self.rows(epoch) * self.T))

    def steps(self, epochs: float = 1) -> int:
        """Steps after which all rows of so many epochs were seen."""
        whole, part = divmod(epochs, 1)
        rows = self._first(int(whole)) + (part * self.rows(int(whole)) if part else 0)
        return -int(-rows // self.B)

    def epoch(self, step: int) -> float:
        """Epochs seen before this step: 1.5 is in the middle of the second."""
        epoch, row = self._place(step * self.B)
        return epoch + row / self.rows(epoch)

    def _first(self, epoch: int) -> int:
        """The number of an epoch's first row. With "whole" every epoch before must be planned to know it."""
        if self.packing != "whole":
            return epoch * self.rows()
        with self._lock:
            while len(self._firsts) <= epoch:
                self._firsts.append(self._firsts[-1] + self.rows(len(self._firsts) - 1))
        return self._firsts[epoch]

    def _place(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its number there."""
        if self.packing != "whole":
            return divmod(row, self.rows())
        while self._firsts[-1] <= row:
            self._first(len(self._firsts))
        epoch = bisect_right(self._firsts, row) - 1
        return epoch, row - self._firsts[epoch]

    def batch(self, step: int) -> Batch:
        """This process's rows of a step. Safe to call from several threads."""
        rows = range(step * self.B, (step + 1) * self.B)[self.share]
        return self._filled([self._place(row) for row in rows])

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The batches from step `start` on, without end, made ahead by grain's threads."""
        import grain

        reading = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        batches = iter(grain.MapDataset.range(start, 1 << 62).map(self.batch).to_iter_dataset(reading))
        try:
            yield from batches
        finally:
            batches.close()

    def once(self) -> Iterator[Batch]:
        """All rows of epoch 0 once, for an evaluation; the last batch is filled up with padding."""
        for first in range(0, self.rows(), self.B):
            rows = range(first, first + self.B)[self.share]
            yield self._filled([(0, row) if row < self.rows() else None for row in rows])

    def _filled(self, places: list[tuple[int, int] | None]) -> Batch:
        tokens, targets = (np.zeros((len(places), self.T), np.int32) for _ in range(2))
        pos, learned = np.full_like(tokens, -1), np.zeros(tokens.shape, bool)
        corpus = self.corpus
        for i, place in enumerate(places):
            at = 0
            for document, first, n in self.plan(place[0]).row(place[1]).tolist() if place else ():
                begin = (int(corpus.ends[document - 1]) if document else 0) + first
                to = slice(at, at + n)
                tokens[i, to], targets[i, to] = corpus.ids[begin : begin + n], corpus.ids[begin + 1 : begin + n + 1]
                pos[i, to] = np.arange(n)
                learned[i, to] = True if corpus.loss_mask is None else corpus.loss_mask[begin + 1 : begin + n + 1]
                at += n
        return Batch(tokens, targets, pos, learned)


def pack(lengths: np.ndarray, T: int, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best fit: the row of each document, and the documents by rows, in which they stand as they were placed.

    lengths [n], none above T, in the order in which documents should come: a row holds some that lie within WINDOW
    rows' worth of each other. Of these the longest is placed first, each into the fullest row that has room.
    chance [n]: the numbers that give a window's rows their order, which would otherwise follow the lengths.
    """
    windows = (np.cumsum(lengths) - lengths) // (WINDOW * T)
    places = np.searchsorted(windows, np.arange(windows[-1] + 2))
    rows, placed, before = np.empty(len(lengths), np.int64), [], 0
    for begin, end in pairwise(places):
        if begin == end:
            continue
        by_length = begin + np.argsort(-lengths[begin:end], kind="stable")
        row = np.array(best_fit(lengths[by_length].tolist(), T))
        first = by_length[np.unique(row, return_index=True)[1]]
        rank = np.argsort(np.argsort(chance[first], kind="stable"))
        rows[by_length] = before + rank[row]
        placed.append(by_length[np.argsort(rank[row], kind="stable")])
        before += len(rank)
    return rows, np.concatenate(placed)


def best_fit(lengths: list[int], T: int) -> list[int]:
    """The row of each length, in the order given. Rows with so much room left are bits of one number."""
    left: dict[int, list[int]] = {}
    rooms, rows, found = 0, 0, []
    for length in lengths:
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = left[room].pop()
            if not left[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, T, rows + 1
        if room := room - length:
            left.setdefault(room, []).append(row)
            rooms |= 1 << room
        found.append(row)
    return found

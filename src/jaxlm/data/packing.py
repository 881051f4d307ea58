"""Packing and the data loader: rows and batches of a corpus as pure functions of (seed, step).

Rows are numbered consecutively over the epochs, and batch `step` has the rows step*B to step*B+B-1. The state of the
data loader is therefore one integer. The order is global: each process loads its share of every batch. Each epoch has a
different order of documents and rows, and has every document once. The last batch of an epoch is completed with rows of
the next one.

    split    documents are concatenated and cut every T tokens. The rest of a cut document continues in another row,
             where positions start again at 0; no token is dropped. The cuts differ between epochs, and rows are
             shuffled.
    whole    documents that fit a row are never cut. They are packed by best fit, about a thousand rows of shuffled
             documents at a time.
    none     one document per row.

The rows for the same corpus, seed, T and packing are the same on every machine and with every version of numpy. Random
orders are computed by sorting raw output of the Philox4x64 counter generator. numpy guarantees that this stream does
not change, unlike those of its distributions and permutations.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.data.corpus import Corpus

WINDOW = 1000  # documents of about so many rows are packed together
THREADS, AHEAD = 2, 8  # prefetching: threads, and batches ahead
DOCUMENTS, ROWS, SHIFT, HELD_OUT, MIXED, SOURCES = range(6)  # streams of random numbers

Packing = Literal["split", "whole", "none"]
Long = Literal["truncate", "drop", "stop"]


class NoTarget(ValueError):
    """No document has a target. counts: as of DataLoader."""

    def __init__(self, message: str, counts: dict[str, int]):
        super().__init__(message)
        self.counts = counts


class Batch(NamedTuple):
    """The rows of one process. Padding has pos -1, loss_mask False, and 0 in tokens and targets.

    Attributes:
        tokens: [B,T] int32.
        targets: [B,T] int32, the next token of the document.
        pos: [B,T] int32, from 0 in every document, so that documents do not attend to each other.
        loss_mask: [B,T] bool, whether the target counts in the loss.
    """

    tokens: np.ndarray
    targets: np.ndarray
    pos: np.ndarray
    loss_mask: np.ndarray


class Plan(NamedTuple):
    """The rows of an epoch: row r has the pieces first[r] to first[r+1]. A piece is a document, the first of its tokens
    and their number."""

    first: np.ndarray
    pieces: np.ndarray

    def row(self, r: int) -> np.ndarray:
        """Returns the pieces of a row [n,3] int64."""
        return self.pieces[self.first[r] : self.first[r + 1]]


class Stream(NamedTuple):
    """The rows of an epoch of packing "split", computed on demand: row r begins at token shift + T * order[r] of the
    concatenated documents, which repeat from the start after the last."""

    documents: np.ndarray
    ends: np.ndarray
    order: np.ndarray
    shift: int
    T: int

    def row(self, r: int) -> np.ndarray:
        """Returns the pieces of a row [n,3] int64."""
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
    """The data loader: batches of a corpus.

    Args:
        corpus: The tokenized documents.
        B: Rows of a batch, over all processes.
        T: Tokens of a row.
        seed: Seed of the order.
        packing: "split", "whole" or "none"; None is split for texts and whole for other formats.
        share: The rows of a batch that this process loads; None is all.
        long: With packing "whole" and "none", the treatment of documents of more than T tokens: "truncate", "drop", or
            "stop" with a ValueError that has the file and line.
        kept: [documents] bool, the documents to use; None is all.

    Attributes:
        digest: Digest of the documents.
        counts: Number of documents that were skipped (one token), truncated and dropped.
        note: The counts as text, with the first document of each; "" if there are none.
    """

    def __init__(
        self,
        corpus: Corpus,
        B: int,
        T: int,
        seed: int = 0,
        packing: Packing | None = None,
        share: slice | None = None,
        long: Long = "truncate",
        kept: np.ndarray | None = None,
    ):
        packing = packing or ("split" if corpus.about["format"] == "text" else "whole")
        if packing not in ("split", "whole", "none") or long not in ("truncate", "drop", "stop"):
            raise ValueError(f"packing is {packing!r} (split, whole, none), long {long!r} (truncate, drop, stop)")
        if B < 1 or T < 1:
            raise ValueError(f"a batch of {B} rows of {T} tokens is empty: both must be at least 1")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed}, but must be between 0 and 2**64 - 1")
        self.corpus, self.B, self.T, self.seed, self.packing = corpus, B, T, seed, packing
        self.share = share or slice(0, B)
        self.counts: dict[str, int] = {}
        self.lengths = np.maximum(corpus.lengths - 1, 0)  # tokens that have a target
        self._kept, self.digest = np.ones(len(corpus), bool) if kept is None else kept, corpus.about.get("digest", "")
        if kept is not None:
            self.digest += f"-{hashlib.blake2b(np.packbits(kept).tobytes(), digest_size=8).hexdigest()}"
            self.lengths[~kept] = 0
        if not self.lengths.any():
            counts = {"left out": len(corpus)} if len(corpus) else {}
            raise NoTarget("no document has two tokens, so there is no target: use longer documents", counts)
        part = "" if kept is None else f"{kept.sum():,} of these documents are used"
        self.note = ". ".join(filter(None, [part, self._short(), "" if packing == "split" else self._shorten(long)]))
        if not self.lengths.any():
            raise NoTarget(f"no document is left ({self.note})", self.counts)
        self._firsts = [0]  # the first row of each planned epoch
        self._lock = threading.RLock()
        self._plan = lru_cache(2)(self._planned)

    def _short(self) -> str:
        """Counts documents of one token, which have no target."""
        short = np.flatnonzero((self.lengths == 0) & self._kept)
        if not len(short):
            return ""
        self.counts["left out"] = len(short)
        where = self.corpus.where(short[0])
        return f"left out {len(short):,} of {len(self.corpus):,} documents, which have only one token ({where})"

    def _shorten(self, long: str) -> str:
        """Truncates or drops documents that are longer than a row."""
        over = np.flatnonzero(self.lengths > self.T)
        if not len(over):
            return ""
        where = f"{self.corpus.where(over[0])} has {self.lengths[over[0]]:,} tokens, a row {self.T:,}"
        if long == "stop":
            raise ValueError(f"{where}: use longer rows (--length), or --data.long truncate or drop")
        begins = self.corpus.ends[over] - self.lengths[over]  # of the targets
        mask = self.corpus.loss_mask
        truncated = [long == "truncate" and (mask is None or bool(mask[b : b + self.T].any())) for b in begins]
        self.lengths[over] = np.where(truncated, self.T, 0)
        counts = {"truncated": sum(truncated), "dropped": len(over) - sum(truncated)}
        counts = {what: count for what, count in counts.items() if count}
        self.counts |= counts
        actions = " and ".join(f"{what} {count:,}" for what, count in counts.items())
        return f"{actions} of {len(self.corpus):,} documents, which are longer than a row ({where})"

    def _draw(self, epoch: int, purpose: int, n: int) -> np.ndarray:
        return random_numbers(self.seed, epoch, purpose, n)

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
        """Returns the number of rows of an epoch. With packing "whole", epochs differ slightly."""
        plan = self.plan(epoch)
        return len(plan.order) if isinstance(plan, Stream) else len(plan.first) - 1

    def fill(self, epoch: int = 0) -> float:
        """Returns the fraction of an epoch's rows that is not padding."""
        return float(self.lengths.sum() / (self.rows(epoch) * self.T))

    def steps(self, epochs: float = 1) -> int:
        """Returns the number of steps for a number of epochs."""
        whole, part = divmod(epochs, 1)
        rows = self._first(int(whole)) + (part * self.rows(int(whole)) if part else 0)
        return -int(-rows // self.B)

    def epoch(self, step: int) -> float:
        """Returns the number of epochs before this step: 1.5 is in the middle of the second."""
        return self.epoch_of(step * self.B)

    def epoch_of(self, row: int) -> float:
        """Returns the number of epochs before this row."""
        epoch, row = self._place(row)
        return epoch + row / self.rows(epoch)

    def are_texts(self) -> bool:
        """Whether the documents are texts, not conversations or prompts with completions."""
        return self.corpus.about["format"] == "text"

    def describe(self) -> list[str]:
        """Returns lines about the data."""
        return [". ".join(filter(None, [str(self.corpus), self.note]))]

    def describe_epochs(self, step: int) -> str:
        """Returns the number of epochs before this step as text."""
        return f"{self.epoch(step):.2f} epochs"

    def _first(self, epoch: int) -> int:
        """Returns the number of an epoch's first row. With packing "whole", all epochs before are planned for it."""
        if self.packing != "whole":
            return epoch * self.rows()
        with self._lock:
            while len(self._firsts) <= epoch:
                self._firsts.append(self._firsts[-1] + self.rows(len(self._firsts) - 1))
        return self._firsts[epoch]

    def _place(self, row: int) -> tuple[int, int]:
        """Returns the epoch of a row, and its index in that epoch."""
        if self.packing != "whole":
            return divmod(row, self.rows())
        while self._firsts[-1] <= row:
            self._first(len(self._firsts))
        epoch = bisect_right(self._firsts, row) - 1
        return epoch, row - self._firsts[epoch]

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of a step. Thread-safe."""
        return self.take(range(step * self.B, (step + 1) * self.B)[self.share])

    def take(self, rows: Iterable[int]) -> Batch:
        """Returns rows by their numbers."""
        return self.assemble([self._place(row) for row in rows])

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yields the batches from step `start` on, indefinitely, prefetched by grain."""
        return prefetched(self.batch, start)

    def once(self) -> Iterator[Batch]:
        """Yields all rows of epoch 0 once, for evaluation. The last batch is padded."""
        for first in range(0, self.rows(), self.B):
            rows = range(first, first + self.B)[self.share]
            yield self.assemble([(0, row) if row < self.rows() else None for row in rows])

    def assemble(self, rows: Sequence[tuple[int, int] | None]) -> Batch:
        """Returns a batch of rows, each an epoch and a row of it, or None for padding."""
        tokens, targets = (np.zeros((len(rows), self.T), np.int32) for _ in range(2))
        pos, loss_mask = np.full_like(tokens, -1), np.zeros(tokens.shape, bool)
        corpus = self.corpus
        for i, row in enumerate(rows):
            at = 0
            for document, first, n in self.plan(row[0]).row(row[1]).tolist() if row else ():
                begin = (int(corpus.ends[document - 1]) if document else 0) + first
                to = slice(at, at + n)
                tokens[i, to], targets[i, to] = corpus.ids[begin : begin + n], corpus.ids[begin + 1 : begin + n + 1]
                pos[i, to] = np.arange(n)
                loss_mask[i, to] = True if corpus.loss_mask is None else corpus.loss_mask[begin + 1 : begin + n + 1]
                at += n
        return Batch(tokens, targets, pos, loss_mask)


def random_numbers(seed: int, index: int, purpose: int, n: int) -> np.ndarray:
    """Returns random numbers [n] uint64, of the epoch or block `index`."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


def held_out(documents: int, fraction: float, seed: int) -> np.ndarray:
    """Returns which documents are held out for validation [documents] bool: a fraction of them, each by a random number
    of (seed, document).

    Raises:
        ValueError: None of the documents, or all, would be held out.
    """
    chosen = random_numbers(seed, 0, HELD_OUT, documents) < np.uint64(fraction * 2.0**64)
    if not chosen.any() or chosen.all():
        way = "choose another one, or another seed, or name validation data (--data.valid)"
        if documents == 1:
            way = "a text file is one document. Cut it into several files, or name validation data (--data.valid)"
        raise ValueError(f"a fraction of {fraction} holds out {chosen.sum():,} of {documents:,} documents: {way}")
    return chosen


def prefetched(batch: Callable[[int], Batch], start: int, threads: int = THREADS) -> Iterator[Batch]:
    """Yields the batches from step `start` on, indefinitely, prefetched by grain."""
    import grain

    def batch_or_error(step: int) -> Batch | Exception:
        try:
            return batch(step)
        except Exception as error:  # raised below: grain would add a text about itself to the message
            return error

    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD)
    batches = iter(grain.MapDataset.range(start, 1 << 62).map(batch_or_error).to_iter_dataset(reading))
    try:
        for made in batches:
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        batches.close()


def pack(lengths: np.ndarray, T: int, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents into rows by best fit: longest first, each into the fullest row that has space.

    Args:
        lengths: [n], none above T, in the order of the documents. A row holds documents of one window, which is about
            WINDOW rows long.
        T: Tokens of a row.
        chance: [n] random numbers, for the order of a window's rows, which would otherwise follow the lengths.

    Returns:
        The row of each document, and the documents in the order of the rows.
    """
    windows = (np.cumsum(lengths) - lengths) // (WINDOW * T)
    edges = np.searchsorted(windows, np.arange(windows[-1] + 2))
    rows, placed, before = np.empty(len(lengths), np.int64), [], 0
    for begin, end in pairwise(edges):
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
    """Returns the row of each length, in the order given. The bits of one integer say how much space rows have left."""
    left: dict[int, list[int]] = {}
    rooms, rows, result = 0, 0, []
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
        result.append(row)
    return result

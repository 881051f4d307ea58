"""A weighted mixture of data: rows of batches that are drawn from several data loaders in given proportions.

The rows of a mixture are numbered consecutively, and batch `step` has the rows step*B to step*B+B-1, as in packing.py.
BLOCK rows have exactly the proportions. Their order is random but even: each source is at most a few rows ahead of its
proportion at any row. The row that a source contributes is its next one, so that each source has its own epochs, and
each of its documents once in each of them. Batches are a pure function of (seed, step).
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from jaxlm.data.packing import MIXED, Batch, DataLoader, prefetched, random_numbers
from jaxlm.data.streaming import StreamingLoader

BLOCK = 10_000  # rows


class Mixture:
    """A data loader that draws its rows from others.

    An epoch of a mixture has as many rows as the first epochs of all sources together. In it, a source of a high weight
    is read more than once, and one of a low weight in part.

    Args:
        names: The names of the sources.
        loaders: Their data loaders, which have the same B, T, seed and share. All read a corpus, or all are streamed.
        weights: Their weights, above 0. The proportions are the weights divided by their sum.

    Attributes:
        digest: Digest of the documents and the proportions.
        streams: Those of the loaders that are streamed.
    """

    def __init__(self, names: Sequence[str], loaders: Sequence[DataLoader | StreamingLoader], weights: Sequence[float]):
        if len({(loader.B, loader.T, loader.seed, loader.share.start, loader.share.stop) for loader in loaders}) > 1:
            raise ValueError("the data loaders of a mixture must have the same B, T, seed and share")
        first = loaders[0]
        self.names, self.loaders = list(names), list(loaders)
        self.B, self.T, self.seed, self.share = first.B, first.T, first.seed, first.share
        self.streams = [loader for loader in loaders if isinstance(loader, StreamingLoader)]
        self.counts = rows_of_block(names, weights)
        key = [[loader.digest, count] for loader, count in zip(loaders, self.counts.tolist())]
        self.digest = hashlib.blake2b(str(key).encode(), digest_size=16).hexdigest()
        self._block = lru_cache(4)(self._order)

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each row of a block its source, and its index among the rows of this source in the block.

        The rows of a source are spread evenly over the block, each at random within its share of it.
        """
        chance = random_numbers(self.seed, block, MIXED, BLOCK) / 2.0**64
        index = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((index + chance) / np.repeat(self.counts, self.counts), kind="stable")
        return np.repeat(np.arange(len(self.counts)), self.counts)[order], index[order]

    def _place(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and the number of the row in it."""
        block, i = divmod(row, BLOCK)
        source, index = self._block(block)
        return int(source[i]), int(block * self.counts[source[i]] + index[i])

    def _drawn(self, row: int) -> np.ndarray:
        """Returns how many rows of each source precede a row [sources]."""
        block, i = divmod(row, BLOCK)
        return block * self.counts + np.bincount(self._block(block)[0][:i], minlength=len(self.counts))

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of a step. Thread-safe."""
        places = [self._place(row) for row in range(step * self.B, (step + 1) * self.B)[self.share]]
        rows = [self.loaders[source].take([number]) for source, number in places]
        return Batch(*(np.concatenate(arrays) for arrays in zip(*rows)))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yields the batches from step `start` on, indefinitely, prefetched by grain."""
        return prefetched(self.batch, start, threads=1) if self.streams else prefetched(self.batch, start)

    def rows(self) -> int:
        """Returns the number of rows of an epoch."""
        return sum(loader.rows() for loader in self.loaders)

    def steps(self, epochs: float = 1) -> int:
        """Returns the number of steps for a number of epochs."""
        return -int(-epochs * self.rows() // self.B)

    def epoch(self, step: int) -> float:
        """Returns the number of epochs before this step; of streamed sources the fewest that one of them has had."""
        if self.streams:
            return min(loader.epoch_of(rows) for loader, rows in zip(self.loaders, self._drawn(step * self.B).tolist()))
        return step * self.B / self.rows()

    def fill(self) -> float:
        """Returns the fraction of the rows that is not padding."""
        return float(np.dot(self.counts, [loader.fill() for loader in self.loaders]) / BLOCK)

    def are_texts(self) -> bool:
        """Whether all documents are texts, not conversations or prompts with completions."""
        return all(loader.are_texts() for loader in self.loaders)

    def describe(self) -> list[str]:
        """Returns a line about each source, with its proportion."""
        shares = [f"{count / BLOCK:.1%} {name}" for count, name in zip(self.counts, self.names)]
        return [f"{share}: {line}" for share, loader in zip(shares, self.loaders) for line in loader.describe()]

    def describe_epochs(self, step: int) -> str:
        """Returns the number of epochs before this step as text, with those of each source."""
        if self.streams:
            return self.streams[0].describe_epochs(step)
        drawn = zip(self.names, self.loaders, self._drawn(step * self.B).tolist())
        sources = ", ".join(f"{loader.epoch_of(rows):.2f} of {name}" for name, loader, rows in drawn)
        return f"{self.epoch(step):.2f} epochs ({sources})"


def rows_of_block(names: Sequence[str], weights: Sequence[float]) -> np.ndarray:
    """Returns the number of rows of each source in a block [sources] int64, by the method of largest remainders.

    Raises:
        ValueError: A source would have none.
    """
    exact = np.array(weights, float) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if none := [name for name, count in zip(names, counts) if not count]:
        raise ValueError(
            f"the weight of {none[0]} is less than 1 in {BLOCK:,} of all weights: raise it, or leave it out"
        )
    return counts

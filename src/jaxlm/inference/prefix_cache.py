"""The prefix cache: rows of finished requests stay in the KV cache, and new requests copy what they share with them.

The engine asks for the longest prefix of a new prompt that some row has, at any position. Rows are reused in the order
in which they were last used (LRU). A request copies the prefix instead of sharing it, so that rows stay independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxlm.inference.decoding import bucket
from jaxlm.inference.requests import Request
from jaxlm.nn import multi_lora

NO_TOKENS = np.zeros(0, np.int32)
# A request waits for another with the same beginning if it then has this number of tokens less to prefill.
WORTH_WAITING = 256


@dataclass
class Slot:
    """A row of the batch.

    Attributes:
        adapter: The adapter with which they were computed, as in Request.
        ids: The tokens whose keys and values the row has at positions 0, 1, …; [n] int32.
        request: The request that has the row, also while its prompt is prefilled elsewhere.
        running: Whether the request is in the row.
        pos: Position of the last token that was dispatched.
        left: Number of tokens that remain to be dispatched.
        used: When the row was last used: a number that increases.
    """

    ids: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    adapter: int = multi_lora.BASE
    request: Request | None = None
    running: bool = False
    pos: int = 0
    left: int = 0
    used: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether tokens of the row remain to be dispatched."""
        return self.running and self.request is not None and not self.request.finished and self.left > 0


class Prefix(NamedTuple):
    """The first `length` tokens of row number `row`."""

    row: int
    length: int


NO_PREFIX = Prefix(0, 0)


def shared(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """The number of equal tokens at the beginning of two sequences."""
    n = min(len(a), len(b))
    differ = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differ.argmax()) if differ.any() else n


def longest_prefix(slots: Sequence[Slot], request: Request) -> Prefix:
    """The longest prefix of a prompt that a row has. At least one token of the prompt is left, whose hidden state is
    needed. A short prefix that saves no computation is not worth its copy."""
    found, ids = NO_PREFIX, request.array
    for row, slot in enumerate(slots):
        if slot.adapter != request.adapter:
            continue
        length = min(shared(slot.ids, ids), len(ids) - 1)
        if length > found.length:
            found = Prefix(row, length)
    is_shorter = bucket(len(ids) - found.length) < bucket(len(ids))
    return found if is_shorter or 2 * found.length >= len(ids) else NO_PREFIX


def choose_row(slots: Sequence[Slot], prefix: Prefix) -> int:
    """The free row that a request takes: that of its prefix if most of the row is in the prefix, so that a conversation
    stays in its row, else the one whose last use is the longest ago."""
    source = slots[prefix.row]
    if prefix.length and source.request is None and 2 * prefix.length >= len(source.ids):
        return prefix.row
    return min((row for row, slot in enumerate(slots) if slot.request is None), key=lambda row: slots[row].used)


def should_wait(request: Request, group: Iterable[Request]) -> bool:
    """Whether a request would have much less to prefill after one of the group."""
    same = (r for r in group if r.adapter == request.adapter)
    return any(shared(request.array, r.array) - request.cached >= WORTH_WAITING for r in same)

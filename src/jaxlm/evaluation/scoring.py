"""Log-probabilities of chosen tokens: what every measure of a model on texts is made of.

Pieces (a document, a window of a long one, a question with its answers) are packed into rows, in which positions begin
again with each, so that none sees another.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.packing import best_fit
from jaxlm.devices import hardware, mesh
from jaxlm.inference.decoding import bucket
from jaxlm.nn.chunked_logits import map_chunked_logits, target_logits

if TYPE_CHECKING:
    from jaxlm.model import Model


class ScoreRequest(NamedTuple):
    """tokens [n]: what is read at once. at [m]: the places in it behind which a token is predicted; targets [m]: that
    token. A place may come several times."""

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


class Score(NamedTuple):
    """Of targets: their log-probabilities (nats, float32), and whether each is the likeliest token (of equals the
    first)."""

    logprobs: Any
    greedy: Any


def score(
    family: Any, cfg: Any, weights: Any, tokens: jax.Array, pos: jax.Array, at: jax.Array, targets: jax.Array
) -> Score:
    """tokens, pos [B,T] int32, at, targets [B,M] int32 -> a Score of arrays [B,M]. Pure; logits exist for the places in
    `at` alone, and never for all of these at once."""
    x, _ = family.forward(cfg, tokens, weights, None, pos)
    x = jnp.take_along_axis(x, at[..., None], axis=1)

    def one(logits: jax.Array, targets: jax.Array) -> Score:
        chosen = target_logits(logits, targets)[..., None]
        before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) < targets[..., None]
        likelier = (logits > chosen) | ((logits == chosen) & before)  # argmax would gather a divided vocabulary
        return Score(chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1), ~jnp.any(likelier, axis=-1))

    found = map_chunked_logits(family, cfg, weights, x, targets, one)
    return jax.tree.map(lambda a: mesh.constrain(a, ""), found)  # every process reads all of it


@cache
def _program(family: Any, cfg: Any) -> Callable[..., Score]:
    return jax.jit(partial(score, family, cfg))


def scores(model: "Model", pieces: Sequence[ScoreRequest], batch: int | None = None) -> Iterator[tuple[int, Score]]:
    """Each piece's number and its Score of arrays [m], as they are ready: the longest first.

    Pieces share rows as long as the longest, `batch` rows at a time. ValueError for ids outside the vocabulary.
    """
    if not pieces:
        return
    largest = max(int(max(piece.tokens.max(), piece.targets.max())) for piece in pieces)
    if largest >= model.config.V:
        raise ValueError(f"the text has token id {largest}, but {model.source} knows 0 to {model.config.V - 1}: "
                         "the tokenizer belongs to another model")  # fmt: skip
    T = bucket(max(len(piece.tokens) for piece in pieces))
    rows = packed([len(piece.tokens) for piece in pieces], T)
    M = bucket(max(sum(len(pieces[i].positions) for i in row) for row in rows))
    B = mesh.round_up_batch(min(batch or max(1, hardware.TOKENS[model.device.platform] // T), len(rows)), model.mesh)
    program, weights = _program(model.family, model.config), model.weights
    under_way: tuple[list[list[int]], Score] | None = None  # the device computes while the host reads
    for first in range(0, len(rows), B):
        part = rows[first : first + B]
        arrays = [mesh.place(a, "BT", model.mesh) for a in filled(pieces, part, (B, T, M))]
        with mesh.use_mesh_of(weights):
            started = part, program(weights, *arrays)
        if under_way is not None:
            yield from _read(pieces, *under_way)
        under_way = started
    if under_way is not None:
        yield from _read(pieces, *under_way)


def packed(lengths: Sequence[int], T: int) -> list[list[int]]:
    """Rows of at most T tokens, each the numbers of its pieces: the longest first, into the fullest row that fits."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = best_fit([lengths[i] for i in order], T)
    rows: list[list[int]] = [[] for _ in range(max(found) + 1)]
    for i, row in zip(order, found):
        rows[row].append(i)
    return rows


def filled(
    pieces: Sequence[ScoreRequest], rows: list[list[int]], shape: tuple[int, int, int]
) -> tuple[np.ndarray, ...]:
    """These rows, and empty ones to make B: tokens and pos [B,T], at and targets [B,M], int32. shape: B, T, M."""
    B, T, M = shape
    tokens, at, targets = (np.zeros((B, n), np.int32) for n in (T, M, M))
    pos = np.full((B, T), -1, np.int32)
    for b, row in enumerate(rows):
        read = asked = 0
        for piece in (pieces[i] for i in row):
            n, m = len(piece.tokens), len(piece.positions)
            tokens[b, read : read + n], pos[b, read : read + n] = piece.tokens, np.arange(n)
            at[b, asked : asked + m], targets[b, asked : asked + m] = piece.positions + read, piece.targets
            read, asked = read + n, asked + m
    return tokens, pos, at, targets


def _read(pieces: Sequence[ScoreRequest], rows: list[list[int]], found: Score) -> Iterator[tuple[int, Score]]:
    logprobs, greedy = jax.device_get(tuple(found))
    for b, row in enumerate(rows):
        asked = 0
        for i in row:
            m = len(pieces[i].positions)
            yield i, Score(logprobs[b, asked : asked + m], greedy[b, asked : asked + m])
            asked += m


def windows(ids: np.ndarray, counts: np.ndarray, length: int, stride: int) -> Iterator[ScoreRequest]:
    """Pieces of at most `length` tokens that predict each of ids [n] for which counts [n] says so, but the first, once.

    A window begins `stride` tokens after the one before it and predicts what that did not: after the first, every token
    sees at least length - stride tokens before it.
    """
    done = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids) - 1)
        wanted = done + np.flatnonzero(counts[done : end + 1])
        if len(wanted):
            yield ScoreRequest(ids[begin : wanted[-1]], wanted - 1 - begin, ids[wanted])
        if end == len(ids) - 1:
            return
        done = end + 1

"""Log-likelihoods: log-probabilities of given tokens. All evaluations on texts are computed from them.

Requests (a document, a window of a long document, a question with its answers) are packed into rows. Positions start at
0 in each request, so that requests do not attend to each other.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.packing import best_fit
from jaxlm.devices import hardware, mesh
from jaxlm.inference.decoding import bucket
from jaxlm.nn import kv_cache, quantized_kv
from jaxlm.nn.chunked_logits import map_chunked_logits, target_logits

if TYPE_CHECKING:
    from jaxlm.model import Model


class ScoreRequest(NamedTuple):
    """Input tokens and the tokens to score.

    Attributes:
        tokens: [n] input ids.
        positions: [m] indices into tokens after which a token is predicted; may repeat.
        targets: [m] ids of these tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


class Score(NamedTuple):
    """Scores of targets.

    Attributes:
        logprobs: Log-probabilities in nats, float32.
        greedy: Whether the target is the argmax (of equal logits, the first).
    """

    logprobs: Any
    greedy: Any


def score(
    family: Any,
    cfg: Any,
    weights: Any,
    tokens: jax.Array,
    pos: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    kv_dtype: Any = None,
) -> Score:
    """Returns the scores [B,M] of targets. Pure. Logits are computed at `positions` only, in chunks.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        weights: The weights.
        tokens, pos: [B,T] int32.
        positions: [B,M] int32, indices into the rows of tokens after which a target is predicted.
        targets: [B,M] int32.
        kv_dtype: None, or the dtype of a KV cache through which attention reads keys and values.
    """
    (B, T), kv = tokens.shape, None
    if kv_dtype is not None:
        kv = kv_cache.init(B, T, cfg.windows, cfg.K, cfg.H, kv_dtype, None)
        kv = kv_cache.map_arrays(kv, mesh.constrain)
    x, _ = family.forward(cfg, tokens, weights, kv, pos)
    x = jnp.take_along_axis(x, positions[..., None], axis=1)

    def of_chunk(logits: jax.Array, targets: jax.Array) -> Score:
        chosen = target_logits(logits, targets)[..., None]
        before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) < targets[..., None]
        likelier = (logits > chosen) | ((logits == chosen) & before)  # argmax would all-gather a sharded vocabulary
        return Score(chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1), ~jnp.any(likelier, axis=-1))

    scores = map_chunked_logits(family, cfg, weights, x, targets, of_chunk)
    return jax.tree.map(lambda a: mesh.constrain(a, ""), scores)  # replicated, because every process fetches all scores


@lru_cache(maxsize=16)
def _jitted_score(family: Any, cfg: Any, kv_dtype: Any) -> Callable[..., Score]:
    return jax.jit(partial(score, family, cfg, kv_dtype=kv_dtype))


def scores(model: "Model", requests: Sequence[ScoreRequest], batch: int | None = None) -> Iterator[tuple[int, Score]]:
    """Yields the index of each request and its scores [m] as they are computed, longest request first.

    With a KV cache in 8 bits (Model.kv_dtype), the scores are those of generation: attention reads the cache.

    Args:
        model: The model.
        requests: The requests. They are packed into rows of the length of the longest one; with a KV cache, each has a
            row.
        batch: Batch size in rows. The default depends on the platform.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    if not requests:
        return
    largest = max(int(max(request.tokens.max(), request.targets.max())) for request in requests)
    if largest >= model.config.V:
        raise ValueError(f"the text has the token id {largest}, but vocab_size of {model.source} is {model.config.V}: "
                         "the tokenizer belongs to another model")  # fmt: skip
    T = bucket(max(len(request.tokens) for request in requests))
    kv_dtype = model.cache_dtype if model.cache_dtype in quantized_kv.LARGEST else None
    lengths = [len(request.tokens) for request in requests]
    alone = [[i] for i in sorted(range(len(requests)), key=lambda i: -lengths[i])]
    rows = pack_rows(lengths, T) if kv_dtype is None else alone
    M = bucket(max(sum(len(requests[i].positions) for i in row) for row in rows))
    B = mesh.round_up_batch(min(batch or max(1, hardware.TOKENS[model.device.platform] // T), len(rows)), model.mesh)
    jitted, weights = _jitted_score(model.family, model.config, kv_dtype), model.weights
    previous: tuple[list[list[int]], Score] | None = None  # fetched while the device computes the next batch
    for first in range(0, len(rows), B):
        part = rows[first : first + B]
        arrays = [mesh.place(a, "BT", model.mesh) for a in fill_rows(requests, part, (B, T, M))]
        with mesh.use_mesh_of(weights):
            started = part, jitted(weights, *arrays)
        if previous is not None:
            yield from _fetch(requests, *previous)
        previous = started
    if previous is not None:
        yield from _fetch(requests, *previous)


def pack_rows(lengths: Sequence[int], T: int) -> list[list[int]]:
    """Returns the indices of the requests in each row of T tokens: best fit, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    row_of = best_fit([lengths[i] for i in order], T)
    rows: list[list[int]] = [[] for _ in range(max(row_of) + 1)]
    for i, row in zip(order, row_of):
        rows[row].append(i)
    return rows


def fill_rows(
    requests: Sequence[ScoreRequest], rows: list[list[int]], shape: tuple[int, int, int]
) -> tuple[np.ndarray, ...]:
    """Returns the arguments of `score` for some rows, padded to B rows.

    Args:
        requests: The requests.
        rows: The indices of the requests in each row.
        shape: B, T, M.

    Returns:
        tokens and pos [B,T], positions and targets [B,M], int32.
    """
    B, T, M = shape
    tokens, positions, targets = (np.zeros((B, n), np.int32) for n in (T, M, M))
    pos = np.full((B, T), -1, np.int32)
    for b, row in enumerate(rows):
        t = k = 0
        for request in (requests[i] for i in row):
            n, m = len(request.tokens), len(request.positions)
            tokens[b, t : t + n], pos[b, t : t + n] = request.tokens, np.arange(n)
            positions[b, k : k + m], targets[b, k : k + m] = request.positions + t, request.targets
            t, k = t + n, k + m
    return tokens, pos, positions, targets


def _fetch(requests: Sequence[ScoreRequest], rows: list[list[int]], batch: Score) -> Iterator[tuple[int, Score]]:
    logprobs, greedy = jax.device_get(tuple(batch))
    for b, row in enumerate(rows):
        k = 0
        for i in row:
            m = len(requests[i].positions)
            yield i, Score(logprobs[b, k : k + m], greedy[b, k : k + m])
            k += m


def windows(ids: np.ndarray, counts: np.ndarray, length: int, stride: int) -> Iterator[ScoreRequest]:
    """Yields the sliding windows of a document. Each token of `counts` except the document's first is scored once.

    A window begins `stride` tokens after the previous one, and scores the tokens that are not scored yet. After the
    first window, every token has at least length - stride tokens of context.

    Args:
        ids: [n] ids of the document.
        counts: [n] bool, which of them to score.
        length: Maximum number of tokens per window.
        stride: Tokens from one window to the next.
    """
    done = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids) - 1)
        scored = done + np.flatnonzero(counts[done : end + 1])
        if len(scored):
            yield ScoreRequest(ids[begin : scored[-1]], scored - 1 - begin, ids[scored])
        if end == len(ids) - 1:
            return
        done = end + 1

"""Attention in plain XLA, which runs on every platform, and the attention mask. `reference` is the specification of all
backends (nn/attention.py)."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.devices import mesh
from jaxlm.nn.quantized_kv import LARGEST, QuantizedKV

# Largest block of attention scores that is computed at once, in float32 elements per device.
MAX_SCORE_ELEMENTS = 1 << 25
CAUSAL_PARTS = 4  # parts of the queries in `causal`: each reads the keys up to its own end
MASK_VALUE = -1e30  # score of a masked key: finite, so that a fully masked row gives finite numbers instead of NaN

_log = logging.getLogger(__name__)


class TokenPositions(NamedTuple):
    """Position and segment of each query or key token. Attention stays within a segment.

    pos: position of a token in its own sequence, -1 for padding and for empty cache slots.
    """

    pos: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def segment_ids(pos: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers the packed sequences of each row. A sequence begins where pos does not exceed the last position that is
    not padding."""
    index = jnp.where(pos < 0, -1, jnp.arange(pos.shape[1], dtype=pos.dtype))
    last = jax.lax.cummax(index, axis=1)  # index of the latest token that is not padding
    before = jnp.take_along_axis(pos, jnp.maximum(last, 0), axis=1)[:, :-1]
    begins = (pos[:, 1:] >= 0) & (pos[:, 1:] <= before)
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=pos.dtype), ((0, 0), (1, 0)))


def attention_mask(query: TokenPositions, key: TokenPositions, window: int | None) -> Bool[Array, "B T S"]:
    """Which keys each query attends to."""
    distance = query.pos[:, :, None] - key.pos[:, None, :]
    mask = (distance >= 0) & (key.pos >= 0)[:, None, :] & (query.segment_ids[:, :, None] == key.segment_ids[:, None, :])
    return mask if window is None else mask & (distance < window)


def consecutive(tokens: TokenPositions) -> Bool[Array, ""]:
    """Whether positions increase by one within every segment, so that a window in positions is one in tokens."""
    pos, segments = tokens
    begins = segments[:, 1:] != segments[:, :-1]
    return jnp.all((pos[:, 1:] < 0) | begins | (pos[:, 1:] == pos[:, :-1] + 1))


def holds_only(key: TokenPositions, query: TokenPositions) -> Bool[Array, ""]:
    """Whether the only tokens in a KV cache are those of this call, in increasing order."""
    counts = [jnp.sum(tokens.pos >= 0, axis=1) for tokens in (key, query)]
    return jnp.all(counts[0] == counts[1]) & jnp.all(segment_ids(query.pos) == 0)


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | QuantizedKV,
    v: Float[Array, "B S K H"] | QuantizedKV,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention in plain XLA, the specification of every backend.

    Long sequences are computed in blocks of queries, so that the scores [B,N,T,S] are never in memory at once.

    Args:
        q: Queries.
        k: Keys. A QuantizedKV has values [B,S,K,H] and a scale [B,S,K].
        v: Values, likewise.
        query: Positions and segments of the queries [B,T].
        key: Positions and segments of the keys [B,S].
        window: Sliding window in tokens; None for full attention.
        scale: Factor on the scores.
        block: Largest block of scores, in elements per device. Default: MAX_SCORE_ELEMENTS.
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    rows = max(1, (block or MAX_SCORE_ELEMENTS) // (mesh.local_size("BN", (B, N)) * S))
    if rows >= T:
        return _block(q, k, v, query, key, window, scale)
    blocks = -(-T // rows)
    rows = -(-T // blocks)

    def split(x: Array, fill: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, blocks * rows - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(B, blocks, rows, *x.shape[2:]).swapaxes(0, 1)

    def attend_block(block: tuple[Array, TokenPositions]) -> Array:
        # The barrier ties the mask to the block's queries. Otherwise a scan over layers, which share the positions,
        # would compute the masks of all blocks before the loop: [B,N,T,S] again.
        q, query = jax.lax.optimization_barrier(block)
        return _block(q, k, v, query, key, window, scale)

    positions = TokenPositions(split(query.pos, -1), split(query.segment_ids, 0))
    out = jax.lax.map(jax.checkpoint(attend_block), (split(q, 0), positions))
    return out.swapaxes(0, 1).reshape(B, blocks * rows, N, H)[:, :T]


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """`reference` where queries and keys are the same tokens. Keys after a query are never attended to, so each part of
    the queries is computed with the keys up to its end."""
    (B, T, N, _), part = q.shape, -(-q.shape[1] // CAUSAL_PARTS)
    if mesh.local_size("BN", (B, N)) * T * T <= (block or MAX_SCORE_ELEMENTS):
        return _block(q, k, v, tokens, tokens, window, scale)
    out = []
    for begin in range(0, T, part):
        end = min(begin + part, T)
        query, key = (TokenPositions(*(x[:, first:end] for x in tokens)) for first in (begin, 0))
        out.append(reference(q[:, begin:end], k[:, :end], v[:, :end], query, key, window, scale, block))
    return jnp.concatenate(out, axis=1)


def over_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    keys: Float[Array, "B K S H"] | QuantizedKV,
    values: Float[Array, "B K S H"] | QuantizedKV,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """`reference` over a KV cache, to which k and v are already written."""
    keys, values = slots_first((keys, values))
    return reference(q, keys, values, query, key, window, scale, block)


def slots_first(stored: Any) -> Any:
    """Keys or values of a KV cache with slots before heads, as `reference` takes them."""
    return jax.tree.map(lambda a: a.swapaxes(1, 2), stored)


@functools.cache
def report_fallback(kernel: str, reason: str) -> None:
    """Logs once that a kernel does not apply, and why (`--debug` shows it)."""
    _log.debug("attention is computed by XLA instead of %s: %s", kernel, reason)


def _block(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | QuantizedKV,
    v: Float[Array, "B S K H"] | QuantizedKV,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`reference` for one block of queries."""
    B, T, N, H = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    f32, q = jnp.float32, q.reshape(B, T, K, N // K, H)
    keys, values = (x.numbers(q.dtype) if isinstance(x, QuantizedKV) else x.astype(q.dtype) for x in (k, v))
    # In this order of the axes, the softmax of a decoding step is one kernel on GPU.
    scores = jnp.einsum("BTKGH,BSKH->BKTGS", q, keys, precision=precision, preferred_element_type=f32) * scale
    if isinstance(k, QuantizedKV):
        scores = scores * _over_scores(k.scale)
    scores = jnp.where(attention_mask(query, key, window)[:, None, :, None], scores, MASK_VALUE)
    probs, divisor = jax.nn.softmax(scores, axis=-1), 1.0
    if isinstance(v, QuantizedKV):
        divisor = LARGEST[v.dtype]  # probabilities times scales are small for float16
        probs = probs * (_over_scores(v.scale) * divisor)
    probs = probs.astype(values.dtype)
    out = jnp.einsum("BKTGS,BSKH->BTKGH", probs, values, precision=precision, preferred_element_type=f32) / divisor
    return out.reshape(B, T, N, H).astype(q.dtype)


def _over_scores(scale: Float[Array, "B S K"]) -> Float[Array, "B K 1 1 S"]:
    return scale.swapaxes(1, 2)[:, :, None, None]

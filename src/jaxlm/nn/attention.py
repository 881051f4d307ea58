"""Attention over structure: positions and windows instead of masks, grouped heads, the cache, and the backends."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.devices import mesh
from jaxlm.nn import kv_cache as caches

# Largest block of scores that the reference forms at once, in float32 numbers over a device's rows and heads.
MAX_SCORE_ELEMENTS = 1 << 25
CAUSAL_BLOCKS = 4  # of the queries of a row on CPU, where each meets the keys up to its end
MASK_VALUE = -1e30  # a masked score: finite, so that a row that sees nothing gives numbers, not NaN

Backend = Callable[..., jax.Array]  # (q, k, v, query, key, window, scale): see `reference`


class TokenPositions(NamedTuple):
    """Where queries and keys stand: position and segment, each [B,T] or [B,S] int32. Only equal segments meet."""

    pos: jax.Array
    segment_ids: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos: jax.Array,
    cache: caches.LayerCache | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, caches.LayerCache | None]:
    """Causal attention of q [B,T,N,H] to k, v [B,T,K,H] and to all that the cache holds -> [B,T,N,H], cache.

    pos [B,T] int32 is each token's place in its own sequence, -1 for padding. A query sees a key when
    0 <= query - key, and < window in a sliding layer. Without a cache a sequence begins wherever pos does not exceed
    the token before it, and sequences do not see each other. Scores are scaled by H**-0.5 unless `scale` is given.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if cache is None:
        places = TokenPositions(pos, segment_ids(pos))
        return _dispatch(q, k.swapaxes(1, 2), v.swapaxes(1, 2), places, places, window, factor, in_order=True), None
    cache = caches.write(cache, k, v)
    query, key = (
        TokenPositions(pos, jnp.zeros_like(pos)),
        TokenPositions(cache.positions, jnp.zeros_like(cache.positions)),
    )
    return _dispatch(q, cache.k, cache.v, query, key, window, factor), cache


def _dispatch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
    in_order: bool = False,
) -> jax.Array:
    """The first backend that applies, chosen for the platform for which the program is lowered. in_order: keys are the
    queries' own, so that none is seen by one that stands before it."""

    def with_structure(run: Backend) -> Callable[..., jax.Array]:
        return lambda q, k, v, query, key: run(q, k, v, query, key, window, scale)

    runs = {"default": with_structure(reference)}
    if q.shape[1] == 1:
        runs["cpu"] = with_structure(_decode)
    elif in_order and q.shape[1] % CAUSAL_BLOCKS == 0 and math.prod(q.shape[:3]) * k.shape[2] <= MAX_SCORE_ELEMENTS:
        runs["cpu"] = with_structure(_causal_blocked)
    elif q.dtype != jnp.float32:
        runs["cpu"] = with_structure(_in_float32)
    if q.shape[1] > 1 and q.dtype != jnp.float32 and jax.default_backend() == "gpu":
        fast = [with_structure(run) for applies, run in GPU_BACKENDS if applies(q, k)]
        runs |= {"cuda": fast[0]} if fast else {}
    if len(runs) == 1:
        return runs["default"](q, k, v, query, key)
    return jax.lax.platform_dependent(q, k, v, query, key, **runs)


def _in_float32(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
    """`reference` for CPU: XLA compiles batched bfloat16 products there that it cannot run (jax 0.10 and 0.12)."""
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    return reference(q32, k32, v32, *rest).astype(q.dtype)


def _causal_blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> jax.Array:
    """`reference` for CPU where keys are the queries' own: each part of the queries meets the keys up to its end. Heads
    that share keys are one product, and sums come after products: three times as fast with its gradient."""
    (B, T, N, H), K = q.shape, k.shape[1]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), k, v))
    seen, out = attention_mask(query, key, window), []
    for end in range(T // CAUSAL_BLOCKS, T + 1, T // CAUSAL_BLOCKS):
        part = slice(end - T // CAUSAL_BLOCKS, end)
        folded = q32[:, :, :, part].reshape(B, K, -1, H)
        scores = jnp.einsum("BKTH,BKSH->BKTS", folded, k32[:, :, :end], precision=jax.lax.Precision.HIGHEST) * scale
        mask = jnp.tile(seen[:, part, :end], (1, N // K, 1))[:, None]
        scores = jnp.where(mask, scores, MASK_VALUE)
        exps = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        sums = jnp.einsum("BKTS,BKSH->BKTH", exps, v32[:, :, :end], precision=jax.lax.Precision.HIGHEST)
        out.append((sums / jnp.sum(exps, axis=-1, keepdims=True)).reshape(B, K, N // K, -1, H))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def _decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> jax.Array:
    """`reference` for the one token of a decoding step on CPU: sums of products, which XLA fuses with the conversion
    of the cache. Its batched products first write the cache as float32, and are ten times as slow."""
    B, _, N, H = q.shape
    K = k.shape[1]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q.reshape(B, K, N // K, 1, H), k[:, :, None], v[:, :, None]))
    scores = jnp.sum(q32 * k32, axis=-1) * scale  # [B,K,G,S]
    scores = jnp.where(attention_mask(query, key, window)[:, None], scores, MASK_VALUE)
    probs = jax.nn.softmax(scores, axis=-1)
    return jnp.sum(probs[..., None] * v32, axis=-2).reshape(B, 1, N, H).astype(q.dtype)


def segment_ids(pos: jax.Array) -> jax.Array:
    """The number of the sequence that each token of a row belongs to; padding in between changes nothing. [B,T]"""
    index = jnp.where(pos < 0, -1, jnp.arange(pos.shape[1], dtype=pos.dtype))
    last = jax.lax.cummax(index, axis=1)  # index of the newest token that is not padding
    before = jnp.take_along_axis(pos, jnp.maximum(last, 0), axis=1)[:, :-1]
    begins = (pos[:, 1:] >= 0) & (pos[:, 1:] <= before)
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=pos.dtype), ((0, 0), (1, 0)))


def attention_mask(query: TokenPositions, key: TokenPositions, window: int | None) -> jax.Array:
    """[B,T,S] bool: which key each query sees."""
    distance = query.pos[:, :, None] - key.pos[:, None, :]
    mask = (distance >= 0) & (key.pos >= 0)[:, None, :] & (query.segment_ids[:, :, None] == key.segment_ids[:, None, :])
    return mask if window is None else mask & (distance < window)


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> jax.Array:
    """q [B,T,N,H], k, v [B,K,S,H] -> [B,T,N,H] in plain XLA. Long T goes block by block: [B,N,T,S] never exists."""
    B, T, N, H = q.shape
    S = k.shape[2]
    rows = max(1, MAX_SCORE_ELEMENTS // (mesh.local_size("BN", (B, N)) * S))
    if rows >= T:
        return _block(q, k, v, query, key, window, scale)
    blocks = -(-T // rows)
    rows = -(-T // blocks)

    def split(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, blocks * rows - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(B, blocks, rows, *x.shape[2:]).swapaxes(0, 1)

    def one(block: tuple[jax.Array, TokenPositions]) -> jax.Array:
        # Tied to the queries, masks are made where they are used. In a scan over layers, which share the positions, jax
        # would else make all of them before it: [B,N,T,S] again.
        q, query = jax.lax.optimization_barrier(block)
        return _block(q, k, v, query, key, window, scale)

    places = TokenPositions(split(query.pos, -1), split(query.segment_ids, 0))
    out = jax.lax.map(jax.checkpoint(one), (split(q, 0), places))
    return out.swapaxes(0, 1).reshape(B, blocks * rows, N, H)[:, :T]


def _block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[1]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    f32, k, v = jnp.float32, k.astype(q.dtype), v.astype(q.dtype)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, precision=precision, preferred_element_type=f32) * scale
    scores = jnp.where(attention_mask(query, key, window)[:, None, None], scores, MASK_VALUE)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", probs, v, precision=precision, preferred_element_type=f32)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _cudnn_applies(q: jax.Array, k: jax.Array) -> bool:
    """cuDNN's flash attention: half precision, even lengths, heads of at most 256 (128 before Hopper) and a multiple
    of 8 wide. Single queries are left to XLA, and lengths whose mask alone would take half a gigabyte."""
    B, T, _, H = q.shape
    S = k.shape[2]
    device = jax.devices("gpu")[0]
    if "cuda" not in device.client.platform_version.lower():
        return False
    hopper = float(device.compute_capability) >= 9.0
    # Over a mesh its heads must lie alike: kv heads in groups, or a single one, do not.
    alike = mesh.traced_spec("N", q.shape[2:3]) == mesh.traced_spec("K", k.shape[1:2])
    shapes = alike and T > 1 and T % 2 == 0 and S % 2 == 0 and H % 8 == 0 and (256 if hopper else 128) >= H
    return shapes and q.dtype != jnp.float32 and B * T * S <= 1 << 28


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> jax.Array:
    """As `reference`, by cuDNN. Positions have gaps, padding and rings, so it is given the mask [B,1,T,S]."""
    mask = attention_mask(query, key, window)[:, None]
    k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")


# What runs instead of `reference` where it applies, best first. Each is tested against it (tests/ops).
GPU_BACKENDS: tuple[tuple[Callable[..., bool], Backend], ...] = ((_cudnn_applies, cudnn),)

"""Causal attention with grouped-query heads, sliding windows and a KV cache, and its backends.

`attend` takes positions and a window; the attention mask follows from them. One rule serves training, packed rows,
padding, prefill and decoding:

    a query attends to a key when 0 <= query position - key position, and < window in a sliding-window layer,
    when the key is not padding, and when both belong to the same segment.

`reference` is plain XLA and runs everywhere. The other backends compute the same for one platform: on CPU
`_causal_blocked` and, over a KV cache, `_cache_blocked`; on NVIDIA GPUs `cudnn`. What runs on CPU is tested against a
float64 twin in numpy (tests/nn/test_attention.py), `cudnn` against `reference` (tests/nn/test_attention_backends.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.devices import mesh
from jaxlm.nn import kv_cache

# Largest block of attention scores that `reference` computes at once, in float32 elements per device.
MAX_SCORE_ELEMENTS = 1 << 25
# Slots that `_cache_blocked` reads at a time in prefill (docs/performance.md).
PREFILL_BLOCK = 128
# Elements of a kv head that it reads at a time in decoding: at least, at most, and of all rows together.
DECODE_BLOCK = (1 << 12, 1 << 13, 1 << 16)
# Up to this number of query heads per kv head, decoding on CPU multiplies them one by one (docs/performance.md).
MAX_SINGLE_HEADS = 4
CAUSAL_BLOCKS = 4  # blocks of queries per row in `_causal_blocked`
MASK_VALUE = -1e30  # score of a masked key: finite, so that a fully masked row gives finite numbers instead of NaN

Backend = Callable[..., Array]  # (q, k, v, query, key, window, scale): see `reference`


class TokenPositions(NamedTuple):
    """Position and segment of each query or key token. Attention stays within a segment.

    pos: position of a token in its own sequence, -1 for padding and for empty cache slots.
    """

    pos: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pos: Int[Array, "B T"],
    cache: kv_cache.LayerCache | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], kv_cache.LayerCache | None]:
    """Causal grouped-query attention, over the KV cache if there is one.

    Args:
        q: Queries; query head n reads kv head n // (N // K).
        k: Keys, after the rotary position embedding.
        v: Values.
        pos: Position of each token in its own sequence, -1 for padding. Without a cache, a new sequence begins wherever
            pos does not exceed the position of the token before it, and packed sequences do not attend to each other.
        cache: This layer's part of the KV cache, to which k and v are written.
        window: Sliding window in tokens, including the query itself; None for full attention.
        scale: Factor on the scores; H**-0.5 by default.

    Returns:
        The attention output in q's dtype (finite but arbitrary at padding), and the updated cache.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if cache is None:
        tokens, scores = TokenPositions(pos, segment_ids(pos)), math.prod(q.shape[:3]) * k.shape[1]
        blocks = q.shape[1] % CAUSAL_BLOCKS == 0 and scores <= MAX_SCORE_ELEMENTS
        return _dispatch(_causal_blocked if blocks else _in_float32, q, k, v, tokens, tokens, window, factor), None
    query, key = (TokenPositions(x, jnp.zeros_like(x)) for x in (pos, cache.positions))
    cache = kv_cache.write(cache, k, v)

    def over_cache(q: Array, k: Array, v: Array, *rest: Any) -> Array:
        return _cache_blocked(q, cache.k, cache.v, *rest)  # the other backends take [B,S,K,H]

    blocks = math.prod(q.shape[:3]) * PREFILL_BLOCK <= MAX_SCORE_ELEMENTS
    return _dispatch(
        over_cache if blocks else _in_float32,
        q,
        cache.k.swapaxes(1, 2),
        cache.v.swapaxes(1, 2),
        query,
        key,
        window,
        factor,
    ), cache


def _dispatch(
    on_cpu: Backend,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Runs `on_cpu`, or the first backend that applies elsewhere, for the platform for which the program is lowered."""

    def bind(backend: Backend) -> Callable[..., Array]:
        return lambda q, k, v, query, key: backend(q, k, v, query, key, window, scale)

    backends = {"default": bind(reference), "cpu": bind(on_cpu)}
    if q.shape[1] > 1 and q.dtype != jnp.float32 and jax.default_backend() == "gpu":
        applicable = [bind(backend) for applies, backend in GPU_BACKENDS if applies(q, k)]
        backends |= {"cuda": applicable[0]} if applicable else {}
    return jax.lax.platform_dependent(q, k, v, query, key, **backends)


def _in_float32(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *rest: Any
) -> Float[Array, "B T N H"]:
    """`reference` on CPU: XLA compiles batched bfloat16 matmuls there that it cannot run (jax 0.10 and 0.12)."""
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    return reference(q32, k32, v32, *rest).astype(q.dtype)


def _causal_blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`reference` on CPU if queries and keys are the same tokens, as in training and prefill without a cache.

    Each block of queries is multiplied with the keys up to its end. Query heads that share a kv head share a matmul.
    The softmax is normalized after the matmul with the values. It is 3 times as fast as `reference`, including the
    gradient.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    q, k, v = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    mask, out = attention_mask(query, key, window), []
    for end in range(T // CAUSAL_BLOCKS, T + 1, T // CAUSAL_BLOCKS):
        block = slice(end - T // CAUSAL_BLOCKS, end)
        grouped = q32[:, :, :, block].reshape(B, K, -1, H)  # [B,K,G*t,H]
        scores = jnp.einsum("BKTH,BKSH->BKTS", grouped, k32[:, :, :end], precision=jax.lax.Precision.HIGHEST) * scale
        scores = jnp.where(jnp.tile(mask[:, block, :end], (1, N // K, 1))[:, None], scores, MASK_VALUE)
        exps = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        sums = jnp.einsum("BKTS,BKSH->BKTH", exps, v32[:, :, :end], precision=jax.lax.Precision.HIGHEST)
        out.append((sums / jnp.sum(exps, axis=-1, keepdims=True)).reshape(B, K, N // K, -1, H))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _cache_blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`reference` on CPU over a KV cache, for prefill and decoding.

    The KV cache is read in blocks of slots, from the first to the last that any query attends to, so that the cost
    grows with the number of tokens and not with the size of the cache. Each block is converted to float32 while it is
    in the CPU's cache. The softmax is computed online (Milakov and Gimelshein 2018, arXiv:1805.02867): `top` is the
    largest score so far, `total` the sum of the exponentials, `out` the sum of the values that they weight.
    """
    (B, T, N, H), (_, K, S, _) = q.shape, k.shape
    G, (least, most, of_all_rows) = N // K, DECODE_BLOCK
    decoding, slots = T == 1, jnp.arange(S)
    block = min(max(1, min(max(of_all_rows // B, least), most) // H) if decoding else PREFILL_BLOCK, S)
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    q32 = q.astype(jnp.float32).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4) * scale

    def product(spec: str, x: Array, y: Array) -> Array:
        # On a mesh, the heads that are multiplied one by one may be on several devices.
        if not decoding or G > MAX_SINGLE_HEADS or mesh.active():
            return einsum(spec, x, y)
        return jnp.stack([einsum(spec.replace("G", ""), x[:, :, g], y) for g in range(G)], axis=2)

    def add(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        begin = jnp.minimum(i * block, S - block)  # the last block may overlap the one before
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=block)
        keys, values = (part(x, axis=2).astype(jnp.float32) for x in (k, v))
        scores = product("BKGTH,BKSH->BKGTS", q32, keys)
        mask = attention_mask(query, TokenPositions(*(part(x, axis=1) for x in key)), window)
        attended = mask & (part(slots, axis=0) >= i * block)
        scores = jnp.where(attended[:, None, None], scores, MASK_VALUE)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        exps, kept = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        weighted = product("BKGTS,BKSH->BKGTH", exps, values)
        return highest, total * kept + jnp.sum(exps, axis=-1), out * kept[..., None] + weighted

    oldest = jnp.min(query.pos, axis=1, keepdims=True, where=query.pos >= 0, initial=jnp.iinfo(query.pos.dtype).max)
    used = (key.pos >= 0) & (key.pos <= query.pos.max(axis=1, keepdims=True))
    used = (used if window is None else used & (key.pos > oldest - window)).any(axis=0)
    first, last = jnp.argmax(used), S - 1 - jnp.argmax(used[::-1])
    if mesh.active():  # rows are on several devices, which would have to agree
        first, last = 0, S - 1
    nothing = jnp.full(q32.shape[:4], MASK_VALUE), jnp.zeros(q32.shape[:4]), jnp.zeros(q32.shape)
    _, total, out = jax.lax.fori_loop(first // block, last // block + 1, add, nothing)
    return (out / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


@_cache_blocked.defjvp
def _cache_blocked_jvp(
    window: int | None, scale: float, primals: Any, tangents: Any
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """A loop of a number of steps that is not known has no gradient. This is the derivative of `reference`."""
    *arrays, query, key = primals

    def attention(q: Array, k: Array, v: Array) -> Array:
        return _in_float32(q, k.swapaxes(1, 2), v.swapaxes(1, 2), query, key, window, scale)

    return jax.jvp(attention, tuple(arrays), tuple(tangents[:3]))


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


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention in plain XLA, the specification of every backend.

    Long sequences are computed in blocks of queries, so that the scores [B,N,T,S] are never in memory at once.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        query: Positions and segments of the queries [B,T].
        key: Positions and segments of the keys [B,S].
        window: Sliding window in tokens; None for full attention.
        scale: Factor on the scores.
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    rows = max(1, MAX_SCORE_ELEMENTS // (mesh.local_size("BN", (B, N)) * S))
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


def _block(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`reference` for one block of queries."""
    B, T, N, H = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    f32, k, v = jnp.float32, k.astype(q.dtype), v.astype(q.dtype)
    q = q.reshape(B, T, K, N // K, H)
    # In this order of the axes, the softmax of a decoding step is one kernel on GPU.
    scores = jnp.einsum("BTKGH,BSKH->BKTGS", q, k, precision=precision, preferred_element_type=f32) * scale
    scores = jnp.where(attention_mask(query, key, window)[:, None, :, None], scores, MASK_VALUE)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKTGS,BSKH->BTKGH", probs, v, precision=precision, preferred_element_type=f32)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _cudnn_applies(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> bool:
    """Whether cuDNN's flash attention supports these shapes and is faster.

    It needs half precision, even T and S, and H a multiple of 8 up to 256 (128 before Hopper). Single queries, and
    lengths whose mask would exceed half a gigabyte, are computed by XLA.
    """
    B, T, _, H = q.shape
    S = k.shape[1]
    device = jax.devices("gpu")[0]
    if "cuda" not in device.client.platform_version.lower():
        return False
    hopper = float(device.compute_capability) >= 9.0
    # On a mesh, query and kv heads must have the same sharding. With kv groups, or one kv head, they do not.
    same_sharding = mesh.traced_spec("N", q.shape[2:3]) == mesh.traced_spec("K", k.shape[2:3])
    shapes = same_sharding and T > 1 and T % 2 == 0 and S % 2 == 0 and H % 8 == 0 and (256 if hopper else 128) >= H
    return shapes and q.dtype != jnp.float32 and B * T * S <= 1 << 28


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`reference` with cuDNN's flash attention.

    It takes a dense mask [B,1,T,S]: positions may have gaps and padding, and a ring buffer is not in order.
    """
    mask = attention_mask(query, key, window)[:, None]
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")


# Tried in this order in place of `reference`.
GPU_BACKENDS: tuple[tuple[Callable[..., bool], Backend], ...] = ((_cudnn_applies, cudnn),)

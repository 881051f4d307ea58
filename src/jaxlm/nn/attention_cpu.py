"""Attention on CPU: in causal blocks without a KV cache, in blocks of slots over one. The same as `reference`."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.devices import mesh
from jaxlm.nn import attention_reference
from jaxlm.nn.attention_reference import MASK_VALUE, TokenPositions, attention_mask
from jaxlm.nn.quantized_kv import QuantizedKV

# Slots of the KV cache that `cache_blocked` reads at a time in prefill (docs/performance.md).
PREFILL_BLOCK = 128
QUERY_BLOCK = 128  # queries of a row that read them together, if they divide the number of tokens
# Elements of a kv head that it reads at a time in decoding: at least, at most, and of all rows together.
DECODE_BLOCK = (1 << 12, 1 << 13, 1 << 16)
# Up to this number of query heads per kv head, decoding multiplies them one by one (docs/performance.md).
MAX_SINGLE_HEADS = 4
CAUSAL_BLOCKS = 4  # blocks of queries per row in `causal_blocked`


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention without a KV cache."""
    scores = math.prod(q.shape[:3]) * q.shape[1]
    if q.shape[1] % CAUSAL_BLOCKS == 0 and scores <= attention_reference.MAX_SCORE_ELEMENTS:
        return causal_blocked(q, k, v, tokens, window, scale)
    return _in_float32(q, k, v, tokens, tokens, window, scale)


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
) -> Float[Array, "B T N H"]:
    """Attention over a KV cache, to which k and v are already written."""
    if math.prod(q.shape[:3]) * PREFILL_BLOCK <= attention_reference.MAX_SCORE_ELEMENTS:
        return cache_blocked(q, keys, values, query, key, window, scale)
    return _in_float32(q, *attention_reference.slots_first((keys, values)), query, key, window, scale)


def _in_float32(q: Array, k: Any, v: Any, *rest: Any) -> Array:
    """`reference` in float32: XLA compiles batched bfloat16 matmuls on CPU that it cannot run (jax 0.10 and 0.12)."""
    k32, v32 = (x if isinstance(x, QuantizedKV) else x.astype(jnp.float32) for x in (k, v))
    return attention_reference.reference(q.astype(jnp.float32), k32, v32, *rest).astype(q.dtype)


def causal_blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention where queries and keys are the same tokens, as in training and prefill without a cache.

    Each block of queries is multiplied with the keys up to its end. Query heads that share a kv head share a matmul.
    The softmax is normalized after the matmul with the values. It is 3 times as fast as `reference`, including the
    gradient.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    q, k, v = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    mask, out = attention_mask(tokens, tokens, window), []
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
def cache_blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedKV,
    v: Float[Array, "B K S H"] | QuantizedKV,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention over a KV cache, for prefill and decoding.

    Each block of queries reads the KV cache in blocks of slots, from the first to the last that any of them attends to.
    The cost grows with the number of tokens and not with the size of the cache, and later slots are skipped.
    """
    B, T, N, H = q.shape
    blocks = T // QUERY_BLOCK if T % QUERY_BLOCK == 0 else 1

    def split(x: Array) -> Array:
        return x.reshape(B, blocks, T // blocks, *x.shape[2:]).swapaxes(0, 1)

    def attend_block(block: tuple[Array, TokenPositions]) -> Array:
        return _online_softmax(block[0], k, v, block[1], key, window, scale)

    if blocks == 1:
        return attend_block((q, query))
    out = jax.lax.map(attend_block, (split(q), TokenPositions(*map(split, query))))
    return out.swapaxes(0, 1).reshape(B, T, N, H)


@cache_blocked.defjvp
def _cache_blocked_jvp(
    window: int | None, scale: float, primals: Any, tangents: Any
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """A loop of a number of steps that is not known has no gradient. This is the derivative of `reference`."""
    *arrays, query, key = primals

    def attention(q: Array, k: Any, v: Any) -> Array:
        return _in_float32(q, *attention_reference.slots_first((k, v)), query, key, window, scale)

    return jax.jvp(attention, tuple(arrays), tuple(tangents[:3]))


def _online_softmax(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedKV,
    v: Float[Array, "B K S H"] | QuantizedKV,
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`cache_blocked` for one block of queries.

    Each block of slots is converted to float32 while it is in the CPU's cache. The softmax is computed online (Milakov
    and Gimelshein 2018, arXiv:1805.02867): `top` is the largest score so far, `total` the sum of the exponentials,
    `out` the sum of the values that they weight.
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
        (keys, k_scale), (values, v_scale) = (_in_block(jax.tree.map(partial(part, axis=2), x)) for x in (k, v))
        scores = product("BKGTH,BKSH->BKGTS", q32, keys) * k_scale
        mask = attention_mask(query, TokenPositions(*(part(x, axis=1) for x in key)), window)
        attended = mask & (part(slots, axis=0) >= i * block)
        scores = jnp.where(attended[:, None, None], scores, MASK_VALUE)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        exps, kept = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        weighted = product("BKGTS,BKSH->BKGTH", exps * v_scale, values)
        return highest, total * kept + jnp.sum(exps, axis=-1), out * kept[..., None] + weighted

    oldest = jnp.min(query.pos, axis=1, keepdims=True, where=query.pos >= 0, initial=jnp.iinfo(query.pos.dtype).max)
    used = (key.pos >= 0) & (key.pos <= query.pos.max(axis=1, keepdims=True))
    used = (used if window is None else used & (key.pos > oldest - window)).any(axis=0)
    first, last = jnp.argmax(used), jnp.where(used.any(), S - 1 - jnp.argmax(used[::-1]), -1)
    if mesh.active():  # rows are on several devices, which would have to agree
        first, last = 0, S - 1
    nothing = jnp.full(q32.shape[:4], MASK_VALUE), jnp.zeros(q32.shape[:4]), jnp.zeros(q32.shape)
    _, total, out = jax.lax.fori_loop(first // block, (last + block) // block, add, nothing)
    total = jnp.maximum(total, 1)[..., None]  # 0 if nothing was read, else at least 1
    return (out / total).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _in_block(stored: Any) -> tuple[Array, Any]:
    """The float32 numbers [B,K,s,H] of a block of slots, and their scale [B,K,1,1,s], 1 for floats."""
    if not isinstance(stored, QuantizedKV):
        return stored.astype(jnp.float32), 1.0
    scale = stored.scale[:, :, None, None]
    if stored.dtype == jnp.int8:
        return stored.numbers(jnp.float32), scale
    return _shifted_to_float16(stored.values).astype(jnp.float32), scale * 2.0**8


def _shifted_to_float16(bits: Array) -> Array:
    """Numbers of float8_e4m3fn times 2**-8 in float16, whose exponent has one more bit and another bias. XLA's own
    conversion takes longer (docs/performance.md). NaN becomes a number: a QuantizedKV has it in its scale."""
    bits = bits.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)

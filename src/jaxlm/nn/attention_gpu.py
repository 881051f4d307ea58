"""Attention on NVIDIA GPUs: cuDNN's flash attention, where it applies.

cuDNN's causal and window modes skip the blocks of scores that are masked. They need rows of one sequence each, with
padding at the end alone. Other rows, and a KV cache with earlier tokens, take a dense mask. Which one it is depends on
the positions, so each device decides when the program runs.
"""

import functools
import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.devices import mesh
from jaxlm.nn import attention_reference
from jaxlm.nn.attention_reference import TokenPositions, attention_mask, consecutive, holds_only, report_fallback
from jaxlm.nn.quantized_kv import QuantizedKV, as_stored

MAX_MASK_ELEMENTS = 1 << 28  # of a dense mask per device: half a gigabyte in half precision


@functools.cache
def installed() -> bool:
    """Whether programs with cuDNN can be compiled for NVIDIA GPUs here, with or without one."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    one = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), one, one, one)
    except RuntimeError as error:  # jax's plugin is there without cuDNN
        report_fallback("cuDNN", str(error))
        return False
    return True


def unsupported(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]) -> str | None:
    """Why cuDNN's flash attention does not apply; None if it does.

    It needs half precision, an even number of tokens, and H a multiple of 8 up to 256 (128 before Hopper, and without a
    GPU at hand).
    """
    (_, T, N, H), K = q.shape, k.shape[2]
    gpu = jax.devices("gpu")[0] if jax.default_backend() == "gpu" else None
    widest = 256 if gpu is not None and float(getattr(gpu, "compute_capability", 0)) >= 9.0 else 128
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it has no {q.dtype}"
    if H % 8 or widest < H:
        return f"head width {H} is not a multiple of 8 up to {widest}"
    if T % 2:
        return f"{T} tokens are not an even number"
    if not mesh.heads_are_aligned(N, K):
        return f"{N} query heads and {K} kv heads are not sharded alike"
    return None


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention without a KV cache."""
    if reason := unsupported(q, k):
        report_fallback("cuDNN", reason)
        return attention_reference.causal(q, k, v, tokens, window, scale)

    def run(q: Array, k: Array, v: Array, tokens: TokenPositions) -> Array:
        def dense(q: Array, k: Array, v: Array) -> Array:
            if q.shape[0] * q.shape[1] ** 2 <= MAX_MASK_ELEMENTS:
                return _dense_mask(q, k, v, tokens, tokens, window, scale)
            return attention_reference.causal(q, k, v, tokens, window, scale)

        # Without the checkpoint, the gradient would keep a place for the dense mask in either case.
        return jax.lax.cond(
            _plain(tokens, window),
            lambda q, k, v: _causal_mode(q, k, v, tokens, window, scale),
            jax.checkpoint(dense),
            *(q, k, v),
        )

    return mesh.per_device(run, (q, k, v, tokens), ("BTNH", "BTKH", "BTKH", "BT"))


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
    """Attention over a KV cache, to which k and v are already written. Single queries are computed by XLA. While the KV
    cache holds no earlier tokens, prefill reads k and v."""
    if q.shape[1] == 1:
        return attention_reference.over_cache(q, k, v, keys, values, query, key, window, scale)
    if reason := unsupported(q, k):
        report_fallback("cuDNN", reason)
        return attention_reference.over_cache(q, k, v, keys, values, query, key, window, scale)

    def run(q: Array, k: Array, v: Array, keys: Any, values: Any, query: TokenPositions, key: TokenPositions) -> Array:
        def first(keys: Any, values: Any) -> Array:
            return _causal_mode(q, as_stored(k, keys.dtype), as_stored(v, values.dtype), query, window, scale)

        def later(keys: Any, values: Any) -> Array:
            fits = q.shape[0] * q.shape[1] * keys.shape[2] <= MAX_MASK_ELEMENTS
            if fits and not isinstance(keys, QuantizedKV):  # cuDNN takes no int8, and another fp8
                return _dense_mask(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), query, key, window, scale)
            return attention_reference.over_cache(q, k, v, keys, values, query, key, window, scale)

        return jax.lax.cond(holds_only(key, query) & _plain(query, window), first, jax.checkpoint(later), keys, values)

    letters = ("BTNH", "BTKH", "BTKH", "BKSH", "BKSH", "BT", "BS")
    return mesh.per_device(run, (q, k, v, keys, values, query, key), letters)


def _plain(tokens: TokenPositions, window: int | None) -> Bool[Array, ""]:
    """Whether each row is one sequence with padding at the end alone, and has no gaps if there is a window."""
    real = tokens.pos >= 0
    plain = jnp.all(tokens.segment_ids == 0) & jnp.all(real[:, :-1] | ~real[:, 1:])
    return plain if window is None else plain & consecutive(tokens)


def _causal_mode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """cuDNN's causal mode, with the length of each row."""
    lengths = jnp.sum(tokens.pos >= 0, axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _dense_mask(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: TokenPositions,
    key: TokenPositions,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """cuDNN with a mask [B,1,T,S], where T and S have to be even."""
    slots = (0, k.shape[1] % 2)
    mask = jnp.pad(attention_mask(query, key, window), ((0, 0), (0, 0), slots))[:, None]
    k, v = (jnp.pad(x.astype(q.dtype), ((0, 0), slots, (0, 0), (0, 0))) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")

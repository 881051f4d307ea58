"""Attention on TPU: splash attention, the Pallas kernel of JAX, where it applies.

It skips the blocks of scores that are causally masked or outside of the window, and takes segments, so that packed rows
and padding need no mask in memory. It counts a window in tokens. Rows whose positions have gaps, and a KV cache with
earlier tokens, are computed by XLA, in blocks of scores that fit the memory on the chip (VMEM). Which one it is depends
on the positions, so each device decides when the program runs.
"""

import functools
import importlib.util
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.devices import mesh
from jaxlm.nn import attention_reference
from jaxlm.nn.attention_reference import TokenPositions, consecutive, holds_only, report_fallback
from jaxlm.nn.quantized_kv import QuantizedKV, as_stored

SCORE_BLOCK = 1 << 23  # scores that XLA computes at once, in float32 elements (docs/performance.md)
BLOCKS = (1024, 512, 256, 128)  # tokens per block of the kernel: the largest that divides the length
# The device_kind that a program is compiled for ahead of time. Default: that of jax's own devices.
compiling_for: ContextVar[str] = ContextVar("compiling_for", default="")


@functools.cache
def installed() -> bool:
    """Whether programs can be compiled for TPUs here, with or without one."""
    return importlib.util.find_spec("libtpu") is not None


def has_kernel() -> bool:
    """Whether splash attention compiles for the devices: not for the matrix unit of TPU v2 and v3."""
    kind = compiling_for.get() or (jax.devices()[0].device_kind if jax.default_backend() == "tpu" else "")
    return kind not in ("TPU v2", "TPU v3")


def unsupported(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]) -> str | None:
    """Why splash attention does not apply; None if it does. It needs bfloat16 and lengths in whole blocks."""
    (_, T, N, _), K = q.shape, k.shape[2]
    if not has_kernel():
        return "TPU v2 and v3 have no kernel"
    if q.dtype != jnp.bfloat16:
        return f"its products are bfloat16, not {q.dtype}"
    if T % BLOCKS[-1]:
        return f"{T} tokens are not a multiple of {BLOCKS[-1]}"
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
        report_fallback("splash attention", reason)
        return attention_reference.causal(q, k, v, tokens, window, scale, SCORE_BLOCK)

    def run(q: Array, k: Array, v: Array, tokens: TokenPositions) -> Array:
        if window is None:
            return splash(q, k, v, tokens, window, scale)

        def gaps(q: Array, k: Array, v: Array) -> Array:  # in parts, it would compile for minutes
            return attention_reference.reference(q, k, v, tokens, tokens, window, scale, SCORE_BLOCK)

        return jax.lax.cond(
            consecutive(tokens),
            lambda q, k, v: splash(q, k, v, tokens, window, scale),
            jax.checkpoint(gaps),
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
        report_fallback("splash attention", reason)
        return attention_reference.over_cache(q, k, v, keys, values, query, key, window, scale, SCORE_BLOCK)

    def run(q: Array, k: Array, v: Array, keys: Any, values: Any, query: TokenPositions, key: TokenPositions) -> Array:
        def first(keys: Any, values: Any) -> Array:
            return splash(q, as_stored(k, keys.dtype), as_stored(v, values.dtype), query, window, scale)

        def later(keys: Any, values: Any) -> Array:
            return attention_reference.over_cache(q, k, v, keys, values, query, key, window, scale, SCORE_BLOCK)

        plain = holds_only(key, query)
        plain = plain if window is None else plain & consecutive(query)
        return jax.lax.cond(plain, first, jax.checkpoint(later), keys, values)

    letters = ("BTNH", "BTKH", "BTKH", "BKSH", "BKSH", "BT", "BS")
    return mesh.per_device(run, (q, k, v, keys, values, query, key), letters)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: TokenPositions,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention among the tokens of each row.

    Within a segment positions increase, so the causal mask is that of the tokens' order. Padding is a segment of its
    own.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        tokens: Positions and segments. With a window, positions are `consecutive`.
        window: Sliding window in tokens; None for full attention.
        scale: Factor on the scores.
        interpret: Run the kernel as plain JAX, on any platform.
    """
    # Imported here, because Pallas takes a third of a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    (_, T, N, _), block = q.shape, next(size for size in BLOCKS if q.shape[1] % size == 0)
    one = kernels.CausalMask((T, T)) if window is None else kernels.LocalMask((T, T), (window - 1, 0), 0)
    # Of one block, one kernel computes all gradients. Of more, it would leave parts of dq in memory for each block.
    fused = block == T
    apart = None if fused else block
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=apart, block_kv_dq=apart,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = kernels.MultiHeadMask([one] * N)
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    segments = jnp.where(tokens.pos < 0, -1, tokens.segment_ids)
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    heads = [x.astype(q.dtype).swapaxes(1, 2) for x in (scaled, k, v)]
    out: Any = jax.vmap(kernel)(*heads, kernels.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)

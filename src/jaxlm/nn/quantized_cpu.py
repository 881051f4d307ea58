"""Products with quantized weights on CPU. Forms and figures: docs/performance.md, "Quantized products on CPU".

All arrays have two axes, or three: x [B,D], q [F,D] (channels) or blocks of inputs [I,·,F] (groups, quantized.py).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn import linear

# Inputs that are multiplied with integers before a scale is applied. The sum of 32 products of 8 and 4 bits fits in 16
# bits, so that a vector instruction has twice the lanes that float32 has.
BLOCK = 32
SUMS = 1 << 21  # sums of groups that exist at a time, when a few rows are multiplied
MAX_ROWS = 16  # up to this number of rows, weights in groups are multiplied without the dequantized weight
CHANNELS, BLOCKS = 512, 16  # channels, or blocks of inputs, that are dequantized at a time for more rows


def round_rows(x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B D"], Float[Array, "*B 1"]]:
    """x as int8 and the scale of each row. The barrier keeps XLA from rounding again for each output channel."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
    return jax.lax.optimization_barrier((jnp.round(x / scale).astype(jnp.int8), scale))


def integer_channels(x: Float[Array, "B D"], q: Int[Array, "F D"]) -> Float[Array, "B F"]:
    """x rounded to int8, times q, without the scales of q."""
    x, scale = round_rows(x)
    y = jnp.einsum("BD,FD->BF", x, q, preferred_element_type=jnp.int32)
    # reduce_precision to the precision of float32 does not change values. It keeps XLA from fusing the scales with a
    # norm after the product, which is slower.
    return jax.lax.reduce_precision(y.astype(jnp.float32) * scale, exponent_bits=8, mantissa_bits=23)


def integer_row(x: Float[Array, " D"], q: Int[Array, "F D"]) -> Float[Array, " F"]:
    """A single row x rounded to int8, times q, without the scales of q.

    LLVM has an instruction for the sum of products of unsigned and signed bytes, so 128 is added to q on the fly. It
    recognizes the pattern with jax 0.12; with older versions this is slower than the product in float32. Sums above
    2**24 are rounded to float32 before 128 times the sum of x is subtracted, which is less than x's own rounding.
    """
    rounded, scale = round_rows(x)
    of_x, unsigned = rounded.astype(jnp.int32), jax.lax.bitcast_convert_type(q, jnp.uint8) ^ jnp.uint8(128)
    y = linear.single_row(of_x, unsigned.astype(jnp.int32)) - 128 * of_x.sum().astype(jnp.float32)
    return jax.lax.reduce_precision(y * scale, exponent_bits=8, mantissa_bits=23)


def float_channels(x: Float[Array, "B D"], q: Any) -> Float[Array, "B F"]:
    """x times q, without the scales of q. More than a few rows: CHANNELS channels are converted at a time."""
    if x.shape[0] <= linear.MAX_SINGLE_ROWS:
        return jnp.stack([linear.single_row(row, q.astype(jnp.float32)) for row in x.astype(jnp.float32)])
    channels, size = q.shape[0], min(CHANNELS, q.shape[0])

    def add(i: Any, y: Array) -> Array:
        begin = jnp.minimum(i * size, channels - size)  # the last part overlaps the one before
        part = _channels(q, begin, size).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, linear.plain_einsum("BD,FD->BF", x, part), begin, axis=1)

    return jax.lax.fori_loop(0, -(-channels // size), add, jnp.zeros((x.shape[0], channels), jnp.float32))


def _channels(q: Any, begin: Any, size: int) -> Any:
    """Channels of q. The bits of e4m3 are sliced: XLA on CPU would slice by way of the whole weight in float16. The
    barrier keeps it from copying the bits of the whole weight before the loop."""
    if q.dtype != jnp.float8_e4m3fn:
        return jax.lax.dynamic_slice_in_dim(q, begin, size)
    q, begin = jax.lax.optimization_barrier((q, begin))
    part = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(q, jnp.uint8), begin, size)
    return jax.lax.bitcast_convert_type(part, q.dtype)


def from_channels(y: Float[Array, "B F"], q: Any) -> Float[Array, "B D"]:
    """y times the transpose of q: the gradient of an input. CHANNELS channels are converted at a time."""
    channels, size = q.shape[0], min(CHANNELS, q.shape[0])

    def add(i: Any, x: Array) -> Array:
        begin = jnp.minimum(i * size, channels - size)
        part = _channels(q, begin, size).astype(y.dtype)
        of_y = jax.lax.dynamic_slice_in_dim(y, begin, size, axis=1)
        fresh = (begin + jnp.arange(size)) >= i * size  # the last part overlaps the one before
        return x + linear.plain_einsum("BF,FD->BD", jnp.where(fresh, of_y, jnp.zeros((), y.dtype)), part)

    return jax.lax.fori_loop(0, -(-channels // size), add, jnp.zeros((y.shape[0], q.shape[1]), jnp.float32))


def grouped_rows(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """A few rows of x times a weight in groups, in tiles. SUMS sums of groups are computed at a time."""
    (blocks, tiles), t = w.q.shape[:2], w.q.shape[-1]
    size = min(tiles, max(1, SUMS // (len(x) * blocks * t)))
    if size == tiles:
        return _grouped_rows(x, w)

    def add(i: Any, y: Array) -> Array:
        begin = jnp.minimum(i * size, tiles - size)  # the last part overlaps the one before

        def cut(name: str, a: Array) -> Array:
            n = 1 if name == "q" else t
            return jax.lax.dynamic_slice_in_dim(a, begin * n, size * n, axis=1)

        part = replace(w, **{name: cut(name, a) for name, a in w.arrays().items()})
        return jax.lax.dynamic_update_slice_in_dim(y, _grouped_rows(x, part), begin * t, axis=1)

    return jax.lax.fori_loop(0, -(-tiles // size), add, jnp.zeros((len(x), tiles * t), jnp.float32))


def _grouped_rows(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """Sums over the inputs of each group, then over all groups.

    With `activations` and q of 4 bits, x is rounded to 8 bits in blocks: sums of a block are then exact in 16 bits. For
    q of 8 bits, float32 is as fast as integers (jax 0.12), or much faster (0.10).
    """
    rows, groups, t = len(x), w.scale.shape[0], w.q.shape[-1]
    x = x.astype(jnp.float32).reshape(rows, -1, BLOCK)
    blocks, dtype, factor = x.shape[1], jnp.float32, jnp.ones(x.shape[:2], jnp.float32)
    if w.activations and w.kind == "int4":
        dtype = jnp.int16
        factor = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / 127
        x = jnp.round(x / factor[..., None])
    parts = max(1, groups // blocks)  # groups of a block, if they are smaller than it
    sums = x.reshape(rows, blocks, parts, -1).sum(axis=-1)
    factor = jnp.repeat(factor, parts, axis=1)
    begin = sums.transpose(1, 2, 0).astype(dtype) * -center(w.kind)
    sums = sums.reshape(rows, -1) * factor
    x, begin, sums, factor = jax.lax.optimization_barrier((x.swapaxes(0, 1).astype(dtype), begin, sums, factor))
    total = _sums_of_groups(x, begin, w).reshape(groups, -1, w.q.shape[1], rows, t)

    def by_row(a: Float[Array, "B I"]) -> Float[Array, "g n 1 B 1"]:
        return a.T.reshape(groups, -1, 1, rows, 1)

    def by_channel(a: Float[Array, "g F"]) -> Float[Array, "g 1 n 1 t"]:
        return a.reshape(groups, 1, -1, 1, t)

    scale, offset = w.scales()
    shift = center(w.kind) - w.zero
    y = total * (by_channel(scale) * by_row(factor))
    if offset is not None or shift != 0:
        y += by_channel(shift * scale + (0 if offset is None else offset)) * by_row(sums)
    y = jax.lax.optimization_barrier(y.reshape(blocks * parts, -1))
    # For one row a product with ones is faster than a sum; for several it is slower with jax 0.10.
    y = jnp.ones(len(y), jnp.float32) @ y if rows == 1 else y.sum(axis=0)
    return y.reshape(-1, rows, t).swapaxes(0, 1).reshape(rows, -1)


def _sums_of_groups(x: Array, begin: Array, w: Any) -> Float[Array, "I p n B t"]:
    """Products of x [I,B,BLOCK] and the codes of a weight, summed over the p groups of each block, in float32.

    If x is int16, the codes are 0 to 15, and each sum starts at `begin` [I,p,B], minus `center` times the sum
    of x. A sum that overflows on the way ends in range.
    """
    half, low, parts = BLOCK // 2, w.kind in ("int4", "mxfp4"), begin.shape[1]
    # Two sums for 8 bits: with one of 32 products, jax 0.10 takes four times as long.
    totals: list[Array] = [jnp.zeros((), x.dtype)] * (parts if low else 2)
    of, q = x[:, None, :, :, None], w.q[:, :, None]  # [I,1,B,BLOCK,1], [I,F/t,1,S,t]
    if x.dtype == jnp.int16:
        totals = [begin[:, i, None, :, None] for i in range(parts)]
    for i in range(half if low else BLOCK):
        if not low:
            totals[i // half] += of[:, :, :, i] * q[:, :, :, i].astype(x.dtype)
            continue
        if x.dtype == jnp.int16:
            pair = q[:, :, :, i].astype(x.dtype)
            one, other = pair & 15, pair >> 4
        else:
            one, other = (codes(c, w.kind).astype(x.dtype) for c in (q[:, :, :, i] & 15, q[:, :, :, i] >> 4))
        totals[0] += of[:, :, :, i] * one
        totals[-1] += of[:, :, :, i + half] * other
    total = jax.lax.optimization_barrier(jnp.stack(totals, axis=1))
    return (total.sum(axis=1, keepdims=True) if len(totals) > parts else total).astype(jnp.float32)


def center(kind: str) -> int:
    """What `codes` subtracts from q."""
    return 8 if kind == "int4" else 0


def codes(q: Array, kind: str) -> Array:
    """Codes of 4 bits as int8: less `center`, or of MXFP4 twice the values."""
    if kind == "int4":
        return q.astype(jnp.int8) - jnp.int8(8)
    size = q & 7
    value = jnp.where(size < 4, size, (2 + (size & 1)) << jnp.maximum(size >> 1, 1) - 1).astype(jnp.int8)
    return jnp.where(q > 7, -value, value)


def by_blocks(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """Many rows of x times a weight in groups: a few blocks of inputs are dequantized at a time."""
    parts, size, each = w.parts(BLOCKS)

    def add(i: Any, y: Array) -> Array:
        of_x = jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)
        return y + linear.plain_einsum("BD,DF->BF", of_x, each(i, x.dtype))

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((x.shape[0], w.scale.shape[-1]), jnp.float32))


def from_blocks(y: Float[Array, "B F"], w: Any) -> Float[Array, "B D"]:
    """y times the transpose of a weight in groups: the gradient of an input."""
    parts, size, each = w.parts(BLOCKS)

    def add(i: Any, x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            x, linear.plain_einsum("BF,DF->BD", y, each(i, y.dtype)), i * size, 1
        )

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((y.shape[0], parts * size), jnp.float32))

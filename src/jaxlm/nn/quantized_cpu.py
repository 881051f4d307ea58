"""Products with quantized weights on CPU. Forms and figures: docs/performance.md, "Quantized products on CPU".

All arrays have two axes, or three: x [B,D], q [F,D] (channels) or blocks of inputs [I,·,F] (groups, quantized.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn import linear

# Inputs that are multiplied with integers before a scale is applied. The sum of 32 products of 8 and 4 bits fits in 16
# bits, so that a vector instruction has twice the lanes that float32 has.
BLOCK = 32
MAX_WIDTH = 2048  # of a product of one row: XLA's fast kernel takes vectors of less than 16 KiB
MAX_SINGLE_ROWS = 2  # up to this number of rows, weights in groups are multiplied row by row
CHANNELS, BLOCKS = 512, 16  # channels, or blocks of inputs, that are dequantized at a time for more rows


def round_rows(x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B D"], Float[Array, "*B 1"]]:
    """x as int8 and the scale of each row. The barrier keeps XLA from rounding again for each output channel."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
    return jax.lax.optimization_barrier((jnp.round(x / scale).astype(jnp.int8), scale))


def integer_channels(x: Float[Array, "B D"], q: Int[Array, "F D"]) -> Float[Array, "B F"]:
    """x rounded to int8, times q, without the scales of q."""
    x, scale = round_rows(x)
    if x.shape[0] > linear.MAX_SINGLE_ROWS:
        y = jnp.einsum("BD,FD->BF", x, q, preferred_element_type=jnp.int32)
    else:
        y = jnp.stack([_integer_row(row, q) for row in x])
    return y.astype(jnp.float32) * scale


def _integer_row(x: Int[Array, " D"], q: Int[Array, "F D"]) -> Int[Array, " F"]:
    parts = [slice(begin, begin + MAX_WIDTH) for begin in range(0, x.size, MAX_WIDTH)]
    return sum(x[part].astype(jnp.int32) @ q[:, part].astype(jnp.int32).T for part in parts)


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
    """Channels of q. The bits of e4m3 are sliced: XLA on CPU would slice by way of the whole weight in float16."""
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


def grouped_row(x: Float[Array, " D"], w: Any) -> Float[Array, " F"]:
    """One row of x times a weight in groups.

    With `activations`, x is rounded to 8 bits in blocks. Sums of integers over a block are exact in 16 bits if q has 4.
    """
    x = x.astype(jnp.float32).reshape(-1, BLOCK)
    factor = jnp.ones(len(x), jnp.float32)
    dtype = jnp.float32
    if w.activations and w.kind != "mxfp4":
        rounded, scale = round_rows(x)
        dtype = jnp.int16 if w.kind == "int4" else jnp.int32
        x, factor = rounded.astype(jnp.float32) * scale, scale[:, 0]
        inputs = jax.lax.optimization_barrier(rounded.astype(dtype))
    else:
        inputs = jax.lax.optimization_barrier(x)
    half, low = BLOCK // 2, w.kind in ("int4", "mxfp4")
    total: Any = jnp.zeros((), dtype)
    for i in range(half if low else BLOCK):
        if low:
            total += inputs[:, i, None] * codes(w.q[:, i] & 15, w.kind).astype(dtype)
            total += inputs[:, i + half, None] * codes(w.q[:, i] >> 4, w.kind).astype(dtype)
        else:
            total += inputs[:, i, None] * w.q[:, i].astype(dtype)
    total = jax.lax.optimization_barrier(total).astype(jnp.float32)
    scale, offset = w.scales()
    total = (total.reshape(len(scale), -1, total.shape[-1]) * scale[:, None]).reshape(total.shape)
    y = factor @ jax.lax.optimization_barrier(total)
    sums = x.reshape(len(scale), -1).sum(axis=1)
    if (shift := center(w.kind) - w.zero) != 0:
        y += shift * (sums @ scale)
    return y if offset is None else y + sums @ offset


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

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((x.shape[0], w.q.shape[-1]), jnp.float32))


def from_blocks(y: Float[Array, "B F"], w: Any) -> Float[Array, "B D"]:
    """y times the transpose of a weight in groups: the gradient of an input."""
    parts, size, each = w.parts(BLOCKS)

    def add(i: Any, x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            x, linear.plain_einsum("BF,DF->BD", y, each(i, y.dtype)), i * size, 1
        )

    return jax.lax.fori_loop(0, parts, add, jnp.zeros((y.shape[0], parts * size), jnp.float32))

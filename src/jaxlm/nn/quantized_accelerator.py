"""Products with quantized weights on TPU and GPU. Figures: docs/performance.md, "Quantized products on TPU and GPU".

All arrays have two axes, or three: x [B,D], q [F,D] (channels) or [I,S,F] without tiles (groups, quantized.py).

Weights of channels are converted within the product, which then reads 8 bits a weight: integers and e4m3 alike, so that
no device needs units for fp8. Activations are rounded only in products of many rows, which arithmetic limits. Those of
few rows are limited by memory, and rounding would only add to them.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.nn import quantized_cpu as cpu
from jaxlm.nn.linear import MAX_DECODE_ROWS, eight_rows, plain_einsum
from jaxlm.nn.quantized_cpu import BLOCK

ROWS_ON_GPU = 4  # up to this number of rows, a weight in groups is multiplied without the matrix units of a GPU
ROWS_ON_TPU = 8  # up to this number of rows, each block of inputs of a weight in groups has its own product on TPU
CHANNELS = 1024  # channels of a weight in groups that are dequantized at a time for more rows


def on_tpu(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """x times a flat weight, on TPU."""
    if w.grouped:
        return by_blocks(x, w) if x.shape[0] <= ROWS_ON_TPU and _is_block_scaled(w) else by_channels(x, w)
    if x.shape[0] <= MAX_DECODE_ROWS:
        return eight_rows(x, w.q.astype(x.dtype)) * w.scale.astype(jnp.float32)
    return _channels(x, w)


def on_gpu(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """x times a flat weight, on GPU."""
    if w.grouped:
        return reduced(x, w) if x.shape[0] <= ROWS_ON_GPU and _is_block_scaled(w) else by_channels(x, w)
    return _channels(x, w)


def transposed(y: Float[Array, "B F"], w: Any) -> Float[Array, "B D"]:
    """y times the transpose of a flat weight: the gradient of an input."""
    if w.grouped:
        return cpu.from_blocks(y, w)
    y = (y.astype(jnp.float32) * w.scale.astype(jnp.float32)).astype(y.dtype)
    return plain_einsum("BF,FD->BD", y, w.q.astype(y.dtype))


def _channels(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    scale = w.scale.astype(jnp.float32)
    if w.activations and w.kind == "int8" and x.shape[0] > MAX_DECODE_ROWS:
        rounded, of_rows = cpu.round_rows(x)
        y = jnp.einsum("BD,FD->BF", rounded, w.q, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * of_rows * scale
    return plain_einsum("BD,FD->BF", x, w.q.astype(x.dtype)) * scale


def by_blocks(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """Few rows on TPU: a product of each block with the integers, whose results are scaled and summed. XLA converts the
    integers within the product. It would write a weight that is scaled before the product to memory."""
    rows, blocks = x.shape[0], w.q.shape[0]
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 8 - rows), (0, 0))))
    scale = w.scales()[0]
    scale = jnp.repeat(scale, blocks // len(scale), axis=0)[:, None]
    # Each product is summed on its own: XLA (jax 0.10 and 0.12) computes wrong sums of two added products with a batch
    # axis, as the test shows.
    products = [plain_einsum("BIS,ISF->IBF", of_x, codes.astype(x.dtype)) for of_x, codes in _halves(x, w)]
    y = sum((each * scale).sum(axis=0) for each in products)
    return (y + _added(x, w))[:rows]


def by_channels(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """Many rows: CHANNELS channels are dequantized at a time, which the caches of the device hold."""
    channels, size = w.q.shape[-1], min(CHANNELS, w.q.shape[-1])
    x = jax.lax.optimization_barrier(x)

    def add(i: Any, y: Array) -> Array:
        begin = jnp.minimum(i * size, channels - size)  # the last part overlaps the one before
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size, a.ndim - 1), w)
        products = [
            plain_einsum("BD,DF->BF", of_x.reshape(len(x), -1), values.astype(x.dtype).reshape(-1, size))
            for of_x, values in _values(x, part)
        ]
        return jax.lax.dynamic_update_slice_in_dim(y, sum(products), begin, axis=1)

    return jax.lax.fori_loop(0, -(-channels // size), add, jnp.zeros((len(x), channels), jnp.float32))


def reduced(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """Few rows on GPU: float32 sums over each block, without matrix units. XLA writes no part of the weight as floating
    point numbers to memory, as it does before a product."""
    scale = w.scales()[0]
    scale = jnp.repeat(scale, w.q.shape[0] // len(scale), axis=0)
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    rows: list[Any] = [0] * len(x)
    for of_x, codes in _halves(x, w):
        for i in range(codes.shape[1]):
            values = codes[:, i].astype(jnp.float32)
            rows = [total + of_x[row, :, i, None] * values for row, total in enumerate(rows)]
    y = jnp.stack([(total * scale).sum(axis=0) for total in rows])
    return y + _added(x, w)


def _added(x: Float[Array, "B D"], w: Any) -> Float[Array, "B F"]:
    """What offsets and the zero of the codes add to a product: multiples of the sums of x over groups."""
    scale, offset = w.scales()
    each = (0 if offset is None else offset) - w.zero * scale
    return plain_einsum("BI,IF->BF", x.astype(jnp.float32).reshape(len(x), len(scale), -1).sum(axis=2), each)


def _is_block_scaled(w: Any) -> bool:
    """Whether a group is one or several whole blocks."""
    return w.q.shape[0] % w.scale.shape[0] == 0


def _halves(x: Float[Array, "B D"], w: Any) -> Iterator[tuple[Array, Array]]:
    """Inputs [B,I,S] and codes [I,S,F] as int8. Of 4 bits, those in the low and those in the high bits: the codes are
    not concatenated, because XLA would write the result to memory."""
    x = x.reshape(len(x), -1, BLOCK)
    if w.q.shape[1] == BLOCK:
        yield x, w.q
        return
    yield x[..., : BLOCK // 2], _codes(w.q & 15, w.kind)
    yield x[..., BLOCK // 2 :], _codes(w.q >> 4, w.kind)


def _codes(q: Array, kind: str) -> Array:
    """4 bits as int8. Those of int4 stay 0 to 15: `_added` subtracts the zero, one operation less for each weight."""
    return q.astype(jnp.int8) if kind == "int4" else cpu.codes(q, kind)


def _values(x: Float[Array, "B D"], w: Any) -> Iterator[tuple[Array, Array]]:
    """Inputs [B,I,S] and the values of the weight [I,S,F] in float32."""
    scale, offset = w.scales()
    pieces = list(_halves(x, w))

    def spread(a: Array, i: int) -> Array:
        """Scales or offsets [g,F] of the inputs of a piece: [I,S,F], or [I,1,F]."""
        if _is_block_scaled(w):
            return jnp.repeat(a, w.q.shape[0] // len(a), axis=0)[:, None]
        each = jnp.repeat(a, x.shape[1] // len(a), axis=0).reshape(w.q.shape[0], BLOCK, -1)
        return jnp.split(each, len(pieces), axis=1)[i]

    for i, (of_x, codes) in enumerate(pieces):
        values = (codes.astype(jnp.float32) - w.zero) * spread(scale, i)
        yield of_x, values if offset is None else values + spread(offset, i)

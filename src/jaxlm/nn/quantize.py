"""Makes quantized weights from arrays: int8 and fp8 with a scale for each output channel, int4 in groups of 32."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxlm.devices import mesh
from jaxlm.nn import params
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized_cpu import BLOCK

# What `load(quantize=)` and --quantize take. int8 also rounds activations to 8 bits, a scale for each token.
TYPES = ("int8", "int8-weights", "int4", "fp8")
FP8_MAX = 448.0  # the largest value of e4m3
# Elements that are quantized at a time on one device: temporary arrays in float32 are several times as large.
ELEMENTS = 1 << 20
# Factors on the range of the values of a group, of which int4 takes the best: clipping a few may make the others finer.
RANGES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)


def type_of(row: params.TensorSpec, name: str) -> str | None:
    """The type of one weight of a model that is quantized to `name` of TYPES; None if it is not quantized.

    Norms are not. With int4, embedding and head are int8: a lookup needs rows, and errors of the head reach every
    logit. Neither are weights int4 whose number of inputs is not a multiple of a group's; they are int8.
    """
    if name not in TYPES:
        raise ValueError(f"unknown type {name!r} of quantized weights: choose one of {', '.join(TYPES)}")
    if row.letters in params.NORMS:
        return None
    in_groups = row.path not in ("embed", "head") and math.prod(row.shape[-num_inputs(row) :]) % BLOCK == 0
    return name if name != "int4" or in_groups else "int8"


def num_inputs(row: params.TensorSpec) -> int:
    """The number of input axes of a weight."""
    return len(params.summed_letters(row.letters))


def stored(row: params.TensorSpec, dtype: Any, name: str | None) -> Any:
    """A weight of a model that is quantized to `name` of TYPES, or is not (None): shapes and dtypes, nothing is
    computed."""
    if name is None or (type := type_of(row, name)) is None:
        return jax.ShapeDtypeStruct(row.shape, dtype)
    return _shapes(type, num_inputs(row), row.shape, jnp.dtype(dtype))


@lru_cache(maxsize=256)
def _shapes(type: str, inputs: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.eval_shape(partial(quantize, type=type, inputs=inputs), jax.ShapeDtypeStruct(shape, dtype))


def quantizer(name: str) -> Callable[[params.TensorSpec, jax.Array], Any]:
    """A function that quantizes the array of a row of PARAMS to a type of TYPES, on its devices."""

    def run(row: params.TensorSpec, w: jax.Array) -> Any:
        if (type := type_of(row, name)) is None:
            return w
        return jax.block_until_ready(_program(type, num_inputs(row), row.letters, w.shape, w.dtype, w.sharding)(w))

    return run


@lru_cache(maxsize=64)
def _program(type: str, inputs: int, letters: str, shape: tuple[int, ...], dtype: Any, where: Any) -> Any:
    make = partial(quantize, type=type, inputs=inputs)
    if not isinstance(where, NamedSharding):
        return jax.jit(make, out_shardings=where)
    made = jax.eval_shape(partial(make, by_parts=False), jax.ShapeDtypeStruct(shape, dtype))
    of = made.letters(letters)
    shardings = jax.tree.map(lambda a, letters: mesh.sharding(letters, a.shape, where.mesh), made, of)
    return jax.jit(partial(make, by_parts=False), out_shardings=shardings)


def quantize(w: Float[Array, "*w"], type: str, inputs: int, by_parts: bool = True) -> Quantized:
    """Quantizes a weight.

    Args:
        w: The weight. Its last `inputs` axes are those that a product sums.
        type: One of TYPES.
        inputs: Number of input axes.
        by_parts: Quantize some output channels at a time, to save memory. Not for an array on several devices.
    """
    kept, summed = w.shape[: w.ndim - inputs], w.shape[w.ndim - inputs :]
    flat = w.reshape(math.prod(kept), math.prod(summed))
    size = max(1, min(len(flat), ELEMENTS // flat.shape[1])) if by_parts else len(flat)
    parts = jax.lax.map(_int4 if type == "int4" else partial(_channel, type), flat, batch_size=size)
    if type != "int4":
        q, scale = parts
        kind = "fp8" if type == "fp8" else "int8"
        return Quantized(q.reshape(w.shape), scale.reshape(kept), kind=kind, inputs=summed, dtype=w.dtype,
                         activations=type == "int8")  # fmt: skip
    q, scale, offset = (jnp.moveaxis(a, 0, -1) for a in parts)  # the channels last
    q, scale, offset = (a.reshape(*a.shape[:-1], *kept) for a in (q, scale, offset))
    return Quantized(q, scale, offset, kind="int4", grouped=True, inputs=summed, dtype=w.dtype, activations=True)


def _channel(type: str, w: Float[Array, " D"]) -> tuple[Array, Array]:
    """q [D] and the scale of a channel, whose largest value becomes the largest of the type."""
    limit = FP8_MAX if type == "fp8" else 127.0
    w = w.astype(jnp.float32)
    most = jnp.max(jnp.abs(w))
    scale = jnp.where(most > 0, most, limit) / limit
    return (w / scale).astype(jnp.float8_e4m3fn) if type == "fp8" else jnp.round(w / scale).astype(jnp.int8), scale


def _int4(w: Float[Array, " D"]) -> tuple[Array, Array, Array]:
    """Bytes [g,BLOCK/2], scales and offsets [g] of a channel, with the least squared error of those tried."""
    w = w.astype(jnp.float32).reshape(-1, BLOCK)
    low, high = w.min(axis=1), w.max(axis=1)
    best = _codes(w, low, high)
    for part in RANGES[1:]:
        cut = (high - low) * (1 - part) / 2
        found = _codes(w, low + cut, high - cut)
        better = found[0] < best[0]
        best = tuple(jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(found, best))
    _, code, scale, offset = best
    code = code.astype(jnp.uint8)
    return code[:, : BLOCK // 2] | code[:, BLOCK // 2 :] << 4, scale, offset


def _codes(w: Float[Array, "g s"], low: Float[Array, " g"], high: Float[Array, " g"]) -> tuple[Array, ...]:
    """Squared error, codes 0 to 15, scales and offsets for a range of values. Scale and offset are then fitted to the
    codes (linear regression), in float16, as they are stored."""
    scale = jnp.where(high > low, high - low, 1.0) / 15
    code = jnp.clip(jnp.round((w - low[:, None]) / scale[:, None]), 0, 15)
    mean = code.mean(axis=1)
    centered = code - mean[:, None]
    variance = jnp.sum(centered**2, axis=1)
    slope = jnp.sum(centered * w, axis=1) / jnp.where(variance > 0, variance, 1.0)
    scale = jnp.where(variance > 0, slope, scale).astype(jnp.float16)
    offset = (w.mean(axis=1) - scale.astype(jnp.float32) * mean).astype(jnp.float16)
    fitted = scale.astype(jnp.float32)[:, None] * code + offset.astype(jnp.float32)[:, None]
    return jnp.sum((fitted - w) ** 2, axis=1), code, scale, offset

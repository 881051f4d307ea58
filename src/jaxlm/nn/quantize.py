"""Makes quantized weights from arrays: int8 and fp8 with a scale for each output channel, int4 in groups of 32."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from jaxlm.devices import hardware, mesh
from jaxlm.nn import params
from jaxlm.nn.quantized import Quantized, is_quantized, rotated, tile
from jaxlm.nn.quantized_cpu import BLOCK

# What `load(quantize=)` and --quantize take. int8 also rounds activations to 8 bits, a scale for each token; for that,
# inputs are rotated (quantized.rotated), the most of ROTATIONS that divides their number.
TYPES = ("int8", "int8-weights", "int4", "fp8")
ROTATIONS = (1, 4, 16, 64)
FP8_MAX = 448.0  # the largest value of e4m3
# Elements that are quantized at a time on one device: temporary arrays in float32 are several times as large.
ELEMENTS = 1 << 20
# Factors on the range of the values of a group, of which int4 takes the best: clipping a few may make the others finer.
RANGES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)


def type_of(row: params.TensorSpec, name: str) -> str | None:
    """The type of one weight of a model that is quantized to `name` of TYPES; None if it is not quantized.

    Norms are not. With int4, some weights are int8: embedding and head, because errors of the head reach every logit;
    those of keys and values, which are small, and whose errors reach every later token; and those whose number of
    inputs is not a multiple of a group's.
    """
    if row.letters in params.NORMS:
        return None
    kept = row.path in ("embed", "head") or "K" in row.letters
    in_groups = not kept and math.prod(row.shape[-num_inputs(row) :]) % BLOCK == 0
    return name if name != "int4" or in_groups else "int8"


def describe(weights: Any) -> str:
    """What a repr says of quantized weights: the type of most in the layers, and the memory of all weights, as in
    "int8 in 0.62 GB, ". Empty if no weight is quantized."""
    sizes: Counter[str] = Counter()
    for leaf in jax.tree.leaves(weights["layers"], is_leaf=is_quantized):
        if is_quantized(leaf):
            sizes[f"{leaf.kind}{'-weights' * (leaf.kind == 'int8' and not leaf.activations)}"] += math.prod(leaf.shape)
    found = sizes.most_common(1)
    return f"{found[0][0]} in {hardware.gigabytes(params.nbytes(weights))}, " if found else ""


def num_inputs(row: params.TensorSpec) -> int:
    """The number of input axes of a weight."""
    return len(params.summed_letters(row.letters))


def check_type(name: str) -> None:
    """Raises ValueError for a name that is not one of TYPES."""
    if name not in TYPES:
        raise ValueError(f"unknown type {name!r} of quantized weights: choose one of {', '.join(TYPES)}")


def quantizer(name: str, rules: mesh.Rules = mesh.RULES) -> Callable[[params.TensorSpec, jax.Array], Any]:
    """A function that quantizes the array of a row of PARAMS to a type of TYPES, on its devices.

    Args:
        name: One of TYPES.
        rules: How the result is sharded over a mesh: `mesh.RULES`, or `mesh.FSDP_RULES` in training.
    """
    check_type(name)

    def run(row: params.TensorSpec, w: jax.Array) -> Any:
        if (type := type_of(row, name)) is None:
            return w
        sizes = (type, num_inputs(row), row.letters, w.shape, w.dtype, w.sharding, tuple(rules.items()))
        return jax.block_until_ready(_program(*sizes)(w))

    return run


def stored_bytes(row: params.TensorSpec, itemsize: int, name: str) -> float:
    """Bytes of an element of a weight that is quantized to `name` of TYPES, scales included; itemsize: without."""
    if (type := type_of(row, name)) is None:
        return itemsize
    # float32 scales of channels; float16 scales and offsets of groups
    return 0.5 + 4 / BLOCK if type == "int4" else 1 + 4 / math.prod(row.shape[-num_inputs(row) :])


def shapes(table: params.Table, cfg: Any, dtype: Any, name: str) -> dict[str, Any]:
    """The weights of a model that is quantized to `name` of TYPES, as jax.ShapeDtypeStruct.

    Args:
        table: PARAMS of the family.
        cfg: Config of the model.
        dtype: dtype of the represented weights.
        name: One of TYPES.
    """
    weights: dict[str, Any] = {}
    for row in params.tensors(table, cfg):
        type, leaf = type_of(row, name), jax.ShapeDtypeStruct(row.shape, dtype)
        make = partial(quantize, type=type or "", inputs=num_inputs(row), by_parts=False)
        params.put(weights, row.path, leaf if type is None else jax.eval_shape(make, leaf))
    return weights


@lru_cache(maxsize=64)
def _program(
    type: str, inputs: int, letters: str, shape: tuple[int, ...], dtype: Any, where: Any, rules: tuple[Any, ...]
) -> Any:
    make = partial(quantize, type=type, inputs=inputs)
    if not isinstance(where, NamedSharding) or not isinstance(where.mesh, Mesh):
        return jax.jit(make, out_shardings=where)
    made = jax.eval_shape(partial(make, by_parts=False), jax.ShapeDtypeStruct(shape, dtype))
    of = made.letters(letters)
    over = where.mesh
    shardings = jax.tree.map(lambda a, letters: mesh.sharding(letters, a.shape, over, dict(rules)), made, of)
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
    rotation = max(n for n in ROTATIONS if flat.shape[1] % n == 0) if type == "int8" else 0
    size = max(1, min(len(flat), ELEMENTS // flat.shape[1])) if by_parts else len(flat)
    parts = jax.lax.map(_int4 if type == "int4" else partial(_channel, type, rotation), flat, batch_size=size)
    if type != "int4":
        q, scale = parts
        kind = "fp8" if type == "fp8" else "int8"
        return Quantized(q.reshape(w.shape), scale.reshape(kept), kind=kind, inputs=summed, dtype=w.dtype,
                         activations=type == "int8", rotation=rotation)  # fmt: skip
    q, scale, offset = parts
    scale, offset = (a.T.reshape(-1, *kept) for a in (scale, offset))
    return Quantized(tiled(q, kept), scale, offset, kind="int4", grouped=True, inputs=summed, zero=8, dtype=w.dtype,
                     activations=True)  # fmt: skip


def tiled(q: Array, kept: tuple[int, ...]) -> Array:
    """q of a weight in groups, [channels,I,s], as it is stored: [I,*kept[:-1],kept[-1] / t,s,t]."""
    size = tile(kept[-1])
    q = q.reshape(-1, size, *q.shape[1:]).transpose(2, 0, 3, 1)
    return q.reshape(q.shape[0], *kept[:-1], kept[-1] // size, *q.shape[2:])


def _channel(type: str, rotation: int, w: Float[Array, " D"]) -> tuple[Array, Array]:
    """q [D] and the scale of a channel, whose largest value becomes the largest of the type."""
    limit = FP8_MAX if type == "fp8" else 127.0
    w = rotated(w.astype(jnp.float32), rotation)
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
    code = (code + 8).astype(jnp.uint8)
    return code[:, : BLOCK // 2] | code[:, BLOCK // 2 :] << 4, scale, offset


@jax.jit
def symmetric_scales(w: Float[Array, "F g s"]) -> Float[Array, "F g"]:
    """Scales of groups in float16, for codes -8 to 7 without an offset: w is about scale * code.

    They have the least squared error of those tried: the largest value of a group becomes -8 or 7, or is clipped
    (RANGES). A scale may be negative.
    """
    most = jnp.take_along_axis(w, jnp.argmax(jnp.abs(w), axis=-1, keepdims=True), axis=-1)[..., 0]
    best: Any = None
    for part, code_of_most in itertools.product(RANGES, (-8.0, 7.0)):
        code = _symmetric_codes(w, most * part / code_of_most)
        total = jnp.sum(code**2, axis=-1)
        scale = (jnp.sum(code * w, axis=-1) / jnp.where(total > 0, total, 1.0)).astype(jnp.float16)  # linear regression
        wide = scale.astype(jnp.float32)
        error = jnp.sum((wide[..., None] * _symmetric_codes(w, wide) - w) ** 2, axis=-1)
        best = (
            (error, scale)
            if best is None
            else tuple(jnp.where(error < best[0], a, b) for a, b in zip((error, scale), best))
        )
    return best[1]


def _symmetric_codes(w: Float[Array, "F g s"], scale: Float[Array, "F g"]) -> Array:
    return jnp.clip(jnp.round(w / jnp.where(scale == 0, 1.0, scale)[..., None]), -8, 7)


def _codes(w: Float[Array, "g s"], low: Float[Array, " g"], high: Float[Array, " g"]) -> tuple[Array, ...]:
    """Squared error, codes -8 to 7, scales and offsets for a range of values. Scale and offset are then fitted to the
    codes (linear regression), in float16, as they are stored."""
    scale = jnp.where(high > low, high - low, 1.0) / 15
    code = jnp.clip(jnp.round((w - low[:, None]) / scale[:, None]), 0, 15) - 8
    mean = code.mean(axis=1)
    centered = code - mean[:, None]
    variance = jnp.sum(centered**2, axis=1)
    slope = jnp.sum(centered * w, axis=1) / jnp.where(variance > 0, variance, 1.0)
    scale = jnp.where(variance > 0, slope, 0.0).astype(jnp.float16)
    offset = (w.mean(axis=1) - scale.astype(jnp.float32) * mean).astype(jnp.float16)
    fitted = scale.astype(jnp.float32)[:, None] * code + offset.astype(jnp.float32)[:, None]
    return jnp.sum((fitted - w) ** 2, axis=1), code, scale, offset

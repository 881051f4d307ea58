"""Makes quantized weights from arrays: int8 and fp8 with a scale for each output channel, int4 in groups of 32."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, UInt8

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
    check_type(name)
    if row.letters in params.NORMS:
        return None
    kept = row.path in ("embed", "head") or "K" in row.letters
    in_groups = not kept and math.prod(row.shape[-num_inputs(row) :]) % BLOCK == 0
    return name if name != "int4" or in_groups else "int8"


def describe(weights: Any) -> str:
    """What a repr says of quantized weights: the type of most in the layers, and the memory of all weights, as in
    "int8 in 0.62 GB, ". Empty if no weight is quantized."""
    found = _elements_of_types(weights["layers"]).most_common(1)
    return f"{found[0][0]} in {hardware.gigabytes(params.nbytes(weights))}, " if found else ""


def type_of_weights(weights: Any) -> str:
    """The types of a model's weights, for messages: "bfloat16", or of a quantized model "int4 and int8"."""
    return " and ".join(sorted(_elements_of_types(weights))) or jnp.dtype(jax.tree.leaves(weights)[0].dtype).name


def _elements_of_types(weights: Any) -> Counter[str]:
    """The number of elements of the quantized weights of each type."""
    sizes: Counter[str] = Counter()
    for leaf in jax.tree.leaves(weights, is_leaf=is_quantized):
        if is_quantized(leaf):
            sizes[f"{leaf.kind}{'-weights' * (leaf.kind == 'int8' and not leaf.activations)}"] += math.prod(leaf.shape)
    return sizes


def num_inputs(row: params.TensorSpec) -> int:
    """The number of input axes of a weight."""
    return len(params.summed_letters(row.letters))


def stored(row: params.TensorSpec, dtype: Any, name: str | None, platform: str = "cpu") -> Any:
    """A weight of a model that is quantized to `name` of TYPES, or is not (None): shapes and dtypes, nothing is
    computed. platform: "cpu", "gpu" or "tpu"."""
    if name is None or (type := type_of(row, name)) is None:
        return jax.ShapeDtypeStruct(row.shape, dtype)
    return _shapes(type, num_inputs(row), row.shape, jnp.dtype(dtype), platform)


def _shapes(type: str, inputs: int, shape: tuple[int, ...], dtype: Any, platform: str) -> Quantized:
    """What `quantize` makes. Tracing it would take a second for each shape."""
    kept, summed = shape[: len(shape) - inputs], shape[len(shape) - inputs :]
    options: dict[str, Any] = {"inputs": summed, "dtype": dtype, "activations": type in ("int8", "int4")}
    if type == "int4":
        blocks, size = math.prod(summed) // BLOCK, tile(kept[-1], platform)
        of_q = (*kept[:-1], kept[-1] // size, BLOCK // 2, size) if size else (BLOCK // 2, *kept)
        q = jax.ShapeDtypeStruct((blocks, *of_q), jnp.uint8)
        scale = jax.ShapeDtypeStruct((blocks, *kept), jnp.float16)
        return Quantized(q, scale, scale, kind="int4", grouped=True, zero=8, **options)
    q = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn if type == "fp8" else jnp.int8)
    kind = "fp8" if type == "fp8" else "int8"
    return Quantized(q, jax.ShapeDtypeStruct(kept, jnp.float32), kind=kind,
                     rotation=rotation_of(type, math.prod(summed)), **options)  # fmt: skip


def rotation_of(type: str, inputs: int) -> int:
    """The number of inputs that a type rotates together; 0 for none."""
    return max(n for n in ROTATIONS if inputs % n == 0) if type == "int8" else 0


def check_type(name: str, more: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a name that is not one of TYPES, nor of `more` that the caller takes."""
    if name not in (*TYPES, *more):
        raise ValueError(f"unknown type {name!r} of quantized weights: choose one of {', '.join((*TYPES, *more))}")


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


def shapes(table: params.Table, cfg: Any, dtype: Any, name: str, platform: str = "cpu") -> dict[str, Any]:
    """The weights of a model that is quantized to `name` of TYPES, as jax.ShapeDtypeStruct.

    Args:
        table: PARAMS of the family.
        cfg: Config of the model.
        dtype: dtype of the represented weights.
        name: One of TYPES.
        platform: "cpu", "gpu" or "tpu".
    """
    weights: dict[str, Any] = {}
    for row in params.tensors(table, cfg):
        params.put(weights, row.path, stored(row, dtype, name, platform))
    return weights


@lru_cache(maxsize=64)
def _program(
    type: str, inputs: int, letters: str, shape: tuple[int, ...], dtype: Any, where: Any, rules: tuple[Any, ...]
) -> Any:
    platform = mesh.platform(where)
    make = partial(quantize, type=type, inputs=inputs, platform=platform)
    if not isinstance(where, NamedSharding) or not isinstance(where.mesh, Mesh):
        return jax.jit(make, out_shardings=where)
    made = _shapes(type, inputs, shape, dtype, platform)
    of = made.letters(letters)
    over = where.mesh
    shardings = jax.tree.map(lambda a, letters: mesh.sharding(letters, a.shape, over, dict(rules)), made, of)
    return jax.jit(partial(make, by_parts=False), out_shardings=shardings)


def quantize(w: Float[Array, "*w"], type: str, inputs: int, by_parts: bool = True, platform: str = "cpu") -> Quantized:
    """Quantizes a weight.

    Args:
        w: The weight. Its last `inputs` axes are those that a product sums.
        type: One of TYPES.
        inputs: Number of input axes.
        by_parts: Quantize a part of the weight at a time, to save memory. Not for an array on several devices.
        platform: The platform of the devices, "cpu", "gpu" or "tpu".
    """
    kept, summed = w.shape[: w.ndim - inputs], w.shape[w.ndim - inputs :]
    flat = w.reshape(math.prod(kept), math.prod(summed))
    if type == "int4":
        q, scale, offset = _blocks(flat, by_parts)
        scale, offset = (a.reshape(-1, *kept) for a in (scale, offset))
        q = q.reshape(*q.shape[:2], *kept)
        if size := tile(kept[-1], platform):
            q = jnp.moveaxis(q.reshape(*q.shape[:-1], kept[-1] // size, size), 1, -2)
        return Quantized(q, scale, offset, kind="int4", grouped=True, inputs=summed,
                         zero=8, dtype=w.dtype, activations=True)  # fmt: skip
    rotation = rotation_of(type, flat.shape[1])
    q, scale = _by_parts(partial(_channels, type, rotation), flat) if by_parts else _channels(type, rotation, flat)
    kind = "int8"
    if type == "fp8":
        kind, q = "fp8", jax.lax.bitcast_convert_type(q, jnp.float8_e4m3fn)
    return Quantized(q.reshape(w.shape), scale.reshape(kept), kind=kind, inputs=summed, dtype=w.dtype,
                     activations=type == "int8", rotation=rotation)  # fmt: skip


def _by_parts(make: Callable[[Array], tuple[Array, Array]], w: Float[Array, "F D"]) -> tuple[Array, Array]:
    """`make(w)`, some rows at a time. lax.map with a batch size would copy the whole weight, if it has a rest."""
    size = max(1, min(len(w), ELEMENTS // w.shape[1]))

    def add(i: Any, made: tuple[Array, Array]) -> tuple[Array, ...]:
        begin = jnp.minimum(i * size, len(w) - size)  # the last part overlaps the one before
        part = make(jax.lax.dynamic_slice_in_dim(w, begin, size))
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, begin, 0) for a, b in zip(made, part, strict=True))

    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(make, w))
    return jax.lax.fori_loop(0, -(-len(w) // size), add, empty)


def _channels(type: str, rotation: int, w: Float[Array, "F D"]) -> tuple[Array, Array]:
    """q [F,D], of fp8 its bits, and the scales [F] of channels, whose largest value becomes the largest of the type."""
    limit = FP8_MAX if type == "fp8" else 127.0
    w = rotated(w.astype(jnp.float32), rotation)
    most = jnp.max(jnp.abs(w), axis=1)
    scale = jnp.where(most > 0, most, limit) / limit
    w = w / scale[:, None]
    return e4m3(w) if type == "fp8" else jnp.round(w).astype(jnp.int8), scale


def e4m3(x: Float[Array, "*x"]) -> UInt8[Array, "*x"]:
    """The bits of float32 of at most FP8_MAX as e4m3, rounded to nearest even. Bits, because XLA on CPU copies
    e4m3 by way of float16: with its own conversion, quantizing takes 20 times as long."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)  # 3 bits of the mantissa; a bias of 7, not 127
    subnormal = jnp.round(jnp.abs(x) * 512).astype(jnp.uint32)  # multiples of 2**-9
    return (jnp.where(jnp.abs(x) < 2**-6, subnormal, normal) | bits >> 31 << 7).astype(jnp.uint8)


def _blocks(w: Float[Array, "F D"], by_parts: bool) -> tuple[Array, Array, Array]:
    """Bytes [I,BLOCK/2,F], scales and offsets [I,F]."""
    if not by_parts:
        return _int4(jnp.moveaxis(w.reshape(len(w), -1, BLOCK), 0, -1))
    return jax.lax.map(
        lambda i: _int4(jax.lax.dynamic_slice_in_dim(w, i * BLOCK, BLOCK, axis=1).T), jnp.arange(w.shape[1] // BLOCK)
    )


def _int4(w: Float[Array, "*I S F"]) -> tuple[Array, Array, Array]:
    """Bytes [*I,BLOCK/2,F], scales and offsets [*I,F] of blocks of inputs, with the least squared error of RANGES.

    The values of a block are separate arrays over the channels, which are the last axis as in the result.
    """
    w = jax.lax.optimization_barrier(w.astype(jnp.float32))  # otherwise each use of a value transposes again
    x = [w[..., i, :] for i in range(BLOCK)]
    low, high, mean = reduce(jnp.minimum, x), reduce(jnp.maximum, x), sum(x) / BLOCK

    def fitted(part: Array) -> tuple[Array, list[Array], Array, Array]:
        """Squared error, codes -8 to 7, scales and offsets for a part of the range of values. Scale and offset are
        fitted to the codes (linear regression), in float16, as they are stored."""
        step = jnp.where(high > low, high - low, 1.0) * part / 15
        least = low + (high - low) * (1 - part) / 2
        code = [jnp.clip(jnp.round((v - least) / step), 0, 15) - 8 for v in x]
        center = sum(code) / BLOCK
        variance = sum((c - center) ** 2 for c in code)
        slope = sum((c - center) * v for c, v in zip(code, x, strict=True)) / jnp.where(variance > 0, variance, 1.0)
        scale = jnp.where(variance > 0, slope, 0.0).astype(jnp.float16)
        offset = (mean - scale.astype(jnp.float32) * center).astype(jnp.float16)
        error: Any = sum(
            (scale.astype(jnp.float32) * c + offset.astype(jnp.float32) - v) ** 2 for c, v in zip(code, x, strict=True)
        )
        return error, code, scale, offset

    def attempt(i: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        part = jnp.asarray(RANGES, jnp.float32)[i]
        error = fitted(part)[0]
        return jnp.minimum(error, best[0]), jnp.where(error < best[0], part, best[1])

    first = jnp.full_like(low, jnp.inf), jnp.ones_like(low)
    _, code, scale, offset = fitted(jax.lax.fori_loop(0, len(RANGES), attempt, first)[1])
    pairs = zip(code[: BLOCK // 2], code[BLOCK // 2 :], strict=True)
    halves = [((lower + 8).astype(jnp.uint8), (upper + 8).astype(jnp.uint8)) for lower, upper in pairs]
    q = jnp.stack([lower | upper << 4 for lower, upper in halves], axis=-2)
    return q, scale, offset


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

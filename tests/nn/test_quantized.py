"""Quantized weights against plain numpy: the values they represent, their products, gradients and shardings."""

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from jaxlm.devices import mesh
from jaxlm.devices.hardware import jax_before
from jaxlm.devices.topology import make
from jaxlm.nn import einsum, embed, params, quantize
from jaxlm.nn import quantized_cpu as cpu
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized_cpu import BLOCK

pytestmark = pytest.mark.smoke

# Product, shape of the weight, number of its input axes. The last one has more inputs than a product of one row reads
# at a time, and more channels than are dequantized at a time.
PRODUCTS = {
    "BTD,NHD->BTNH": ((3, 20, 64), 1),
    "BTNH,DNH->BTD": ((36, 2, 48), 2),
    "BTF,DF->BTD": ((520, 4160), 1),
}
ROWS = (1, 2, cpu.MAX_ROWS + 1)


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normally distributed, with channels of different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * rng.uniform(0.1, 2, (shape[0], *[1] * (len(shape) - 1)))).astype(np.float32)


def rounded(x: np.ndarray, size: int) -> np.ndarray:
    """Rounded to 8 bits, with a scale for each `size` consecutive numbers of the last axis."""
    parts = x.reshape(*x.shape[:-1], -1, size)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(127)
    return (np.round(parts / scale) * scale).reshape(x.shape)


@cache
def computed(spec: str, type: str, rows: int) -> tuple[np.ndarray, ...]:
    """x, the dense weight, what weighs the product, the product, and its gradient of x."""
    shape, inputs = PRODUCTS[spec]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 1, *shape[len(shape) - inputs :])).astype(np.float32)
    of_y = rng.normal(size=(rows, 1, *shape[: len(shape) - inputs])).astype(np.float32)
    w = jax.jit(partial(quantize.quantize, type=type, inputs=inputs))(jnp.asarray(weight(shape)))

    @jax.jit
    def run(x: jax.Array, w: Quantized) -> Any:
        y = einsum(spec, x, w, dtype="float32")
        _, back = jax.vjp(lambda x: einsum(spec, x, w, dtype="float32"), x)
        return y, back(jnp.asarray(of_y))[0]

    with jax.numpy_dtype_promotion("strict"):
        return x, np.asarray(w.dense()), of_y, *map(np.asarray, run(jnp.asarray(x), w))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("type", quantize.TYPES)
@pytest.mark.parametrize("spec", PRODUCTS)
def test_products_equal_those_with_the_dense_weight(spec: str, type: str, rows: int) -> None:
    """int8 rounds each token, and int4 blocks of few tokens, which the numpy version does too."""
    x, w, _, y, _ = computed(spec, type, rows)
    flat = x.reshape(rows, -1)
    if type == "int8" and not (rows == 1 and jax_before(0, 12)):
        size = max(n for n in (1, 4, 16, 64) if flat.shape[1] % n == 0)
        turn = np.kron(np.eye(flat.shape[1] // size), hadamard(size) / math.sqrt(size)).astype(np.float32)
        flat = rounded(flat @ turn, flat.shape[1]) @ turn.T
    elif type == "int4" and rows <= cpu.MAX_ROWS:
        flat = rounded(flat, BLOCK)
    expected = np.einsum(spec, flat.reshape(x.shape).astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(y, expected, atol=3e-5 * np.abs(expected).max())  # float32 sums of 4,160 numbers


@pytest.mark.parametrize("type", quantize.TYPES)
@pytest.mark.parametrize("spec", PRODUCTS)
def test_gradients_are_those_through_the_dense_weight(spec: str, type: str) -> None:
    _, w, of_y, _, gradient = computed(spec, type, 5)
    expected = np.einsum(f"{spec.split('->')[1]},{spec.split('->')[0].split(',')[1]}->{spec.split(',')[0]}",
                         of_y.astype(np.float64), w.astype(np.float64))  # fmt: skip
    np.testing.assert_allclose(gradient, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("codes", [0x00, 0xFF, 0x0F, 0xF0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("groups", [2, 4])
def test_largest_sums_of_int4(codes: int, sign: float, groups: int) -> None:
    """Sums of 127 times 15 exceed 16 bits on the way, and end in range. Groups of 32 and of 16 inputs."""
    w = quantize.quantize(jnp.asarray(weight((64, 64))), "int4", 1)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (groups, 64)), jnp.float16)
    w = replace(w, q=jnp.full_like(w.q, codes), scale=scale, offset=jnp.zeros_like(scale))
    x = jnp.full((2, 64), sign, jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64).T
    np.testing.assert_allclose(jax.jit(cpu.grouped_rows)(x, w), expected, rtol=1e-5, atol=1e-4)


def test_parts_of_a_weight_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part overlaps the one before."""
    w = quantize.quantize(jnp.asarray(weight((160, 64))), "int4", 1)
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    whole = jax.jit(cpu.grouped_rows)(x, w)
    monkeypatch.setattr(cpu, "SUMS", 3 * 2 * 32 * 2)  # two of five tiles
    np.testing.assert_allclose(jax.jit(lambda x: cpu.grouped_rows(x, w))(x), whole, atol=1e-5)


def test_what_is_not_differentiated_is_rounded_and_what_is_is_not() -> None:
    x, w, _, y, _ = computed("BTD,NHD->BTNH", "int8", 5)
    exact = np.einsum("BTD,NHD->BTNH", x, w)
    q = quantize.quantize(jnp.asarray(weight((3, 20, 64))), "int8", 1)
    value, _ = jax.value_and_grad(lambda x: einsum("BTD,NHD->BTNH", x, q).sum())(jnp.asarray(x))
    assert value == pytest.approx(float(exact.sum()), abs=1e-3)
    assert abs(y - exact).max() > 1e-3


@pytest.mark.parametrize("type", quantize.TYPES)
def test_errors_of_a_weight(type: str) -> None:
    """int8: half a step of a channel. fp8: e4m3 has 4 significant bits. int4: better than from smallest to largest."""
    w = weight((40, 64))
    made = quantize.quantize(jnp.asarray(w), type, 1)
    error = np.abs(np.asarray(made.dense()) - w)
    if type == "int8":  # of rotated numbers, which a rotation back leaves as large on average
        assert (np.sqrt((error**2).mean(axis=1)) <= made.scale / 2 * (1 + 1e-5)).all()
    elif type == "int8-weights":
        assert (error <= np.abs(w).max(axis=1, keepdims=True) / 127 / 2 * (1 + 1e-5)).all()
    elif type == "fp8":
        assert (error <= np.maximum(np.abs(w) / 16, np.abs(w).max(axis=1, keepdims=True) / 448 / 2**9)).all()
    else:
        groups = w.reshape(40, -1, BLOCK)
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        plain = np.round((groups - low) / ((high - low) / 15)) * ((high - low) / 15) + low
        squared = (error.reshape(groups.shape) ** 2).sum(axis=-1), ((plain - groups) ** 2).sum(axis=-1)
        assert (squared[0] <= squared[1] * 1.01).all()  # scale and offset are float16
        assert squared[0].sum() < 0.9 * squared[1].sum()


@pytest.mark.parametrize("type", quantize.TYPES)
def test_weights_without_a_range(type: str) -> None:
    """Zeros, a constant, one sign, and numbers that are very small or large."""
    w = np.stack(
        [np.zeros(64), np.full(64, 0.75), np.linspace(1, 2, 64), np.full(64, -3e-6), np.linspace(-9e3, 9e3, 64)]
    )
    dense = np.asarray(quantize.quantize(jnp.asarray(w, jnp.float32), type, 1).dense())
    assert (dense[0] == 0).all()
    assert (np.abs(dense - w) <= 0.07 * np.abs(w).max(axis=1, keepdims=True)).all()


def fields(kind: str, in_tiles: bool, **more: Any) -> Quantized:
    """A weight [64,2,48] of random codes in groups, whose scales and offsets differ."""
    rng, four = np.random.default_rng(3), kind in ("int4", "mxfp4")
    q = rng.integers(0 if four else -128, 256 if four else 128, (3, 64, BLOCK // 2 if four else BLOCK))
    q = jnp.asarray(q.swapaxes(1, 2), jnp.uint8 if four else jnp.int8)
    q = q.reshape(3, -1, 2, 32).swapaxes(1, 2) if in_tiles else q
    groups = {"scale": 3, "offset": 3, "outer_scale": 1, "outer_offset": 1}
    arrays = {
        name: jnp.asarray(rng.uniform(0.5, 2, (more.pop(name, n), 64)), jnp.float32) for name, n in groups.items()
    }
    arrays = {name: a for name, a in arrays.items() if len(a)}
    return Quantized(q, **arrays, kind=kind, grouped=True, inputs=(2, 48), dtype=jnp.dtype("float32"), **more)


def plain(w: Quantized) -> np.ndarray:
    """The weight, from the definition in its docstring."""
    q = np.asarray(w.q)
    q = np.concatenate(list(q.swapaxes(0, 1)), axis=2) if w.tiled else q
    q = q.transpose(2, 0, 1)  # [F,I,·]
    if w.kind in ("int4", "mxfp4"):
        q = np.concatenate([q & 15, q >> 4], axis=2)
    if w.kind == "mxfp4":
        q = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])[q]
    values = q.reshape(64, 96).astype(np.float64) - w.zero

    def each(a: Any, outer: Any) -> Any:
        if a is None:
            return 0.0
        a = np.repeat(np.asarray(a, np.float64), 96 // len(a), axis=0)
        return (a if outer is None else a * np.repeat(np.asarray(outer, np.float64), 96 // len(outer), axis=0)).T

    values = each(w.scale, w.outer_scale) * values + each(w.offset, w.outer_offset)
    if w.order is not None:
        values[:, np.asarray(w.order)] = values.copy()
    return values.reshape(64, 2, 48)


FORMS = {
    "scales": {"offset": 0, "outer_scale": 0, "outer_offset": 0},
    "offsets": {"outer_scale": 0, "outer_offset": 0},
    "outer scales": {},
    "one group": {"scale": 1, "offset": 1, "outer_scale": 0, "outer_offset": 0, "zero": 8},
    "order": {"offset": 0, "outer_scale": 0, "outer_offset": 0, "zero": 7,
              "order": jnp.asarray(np.random.default_rng(2).permutation(96), jnp.int32)},
}  # fmt: skip


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["int4", "int8", "mxfp4"])
def test_every_field_of_groups(kind: str, form: str, activations: bool) -> None:
    w = fields(kind, in_tiles=form not in ("outer scales", "one group"), activations=activations, **FORMS[form])
    expected = plain(w)
    np.testing.assert_allclose(w.dense(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    rng = np.random.default_rng(4)
    many = cpu.MAX_ROWS + 1
    x = rng.normal(size=(many, 1, 2, 48)).astype(np.float32)
    for rows in (1, 3, many):
        flat = x[:rows].reshape(rows, 96).astype(np.float64)
        if activations and rows < many and kind == "int4":
            order = np.arange(96) if w.order is None else np.asarray(w.order)
            flat[:, order] = rounded(flat[:, order], BLOCK)
        y = jax.jit(partial(einsum, "BTNH,DNH->BTD"))(x[:rows], w)
        exact = np.einsum("BTNH,DNH->BTD", flat.reshape(rows, 1, 2, 48), expected)
        np.testing.assert_allclose(y, exact, atol=1e-5 * np.abs(expected).max() * 96)


WITHOUT_TILES = "int4 without tiles"  # as on accelerators


@pytest.mark.parametrize("type", [*quantize.TYPES, WITHOUT_TILES])
@pytest.mark.parametrize(("spec", "shape", "inputs"), [
    ("BTD,NHD->BTNH", (4, 16, 64), 1), ("BTNH,DNH->BTD", (64, 4, 32), 2), ("BTF,DF->BTD", (64, 96), 1),
    ("BTD,FD->BTF", (96, 64), 1), ("BTD,VD->BTV", (100, 64), 1),
])  # fmt: skip
def test_on_a_mesh(spec: str, shape: tuple[int, ...], inputs: int, type: str) -> None:
    """Each device multiplies its part: sharded channels, sharded inputs, and what does not divide."""
    over = make({"data": 2, "model": 4}, 4)
    row = params.TensorSpec("layers.0.w", spec.split("->")[0].split(",")[1], shape, shape, ())
    type, platform = ("int4", "tpu") if type == WITHOUT_TILES else (type, "cpu")
    w = quantize.quantize(jnp.asarray(weight(shape)), type, inputs, platform=platform)
    where = jax.tree.map(lambda a, letters: mesh.sharding(letters, a.shape, over), w, w.letters(row.letters))
    x = np.random.default_rng(0).normal(size=(4, 1, *shape[len(shape) - inputs :])).astype(np.float32)
    single = jax.jit(partial(einsum, spec, dtype="float32"))(x, w)
    sharded = jax.device_put(w, where)
    with mesh.use_mesh(over):
        y, back = jax.vjp(jax.jit(partial(einsum, spec, dtype="float32", w=sharded)), jnp.asarray(x))
        rounding = jax.jit(partial(einsum, spec, dtype="float32"))(jnp.asarray(x), sharded)
        gradient = back(jnp.ones_like(y))[0]
    dense = np.asarray(w.dense())
    np.testing.assert_allclose(y, np.einsum(spec, x, dense), atol=1e-4)
    # A token's scale is that of a device's inputs.
    np.testing.assert_allclose(rounding, single, atol=0.02 * np.abs(single).max())
    transposed = f"{spec.split('->')[1]},{row.letters}->{spec.split(',')[0]}"
    np.testing.assert_allclose(gradient, np.einsum(transposed, np.ones(y.shape, np.float32), dense), atol=1e-3)


def test_a_weight_is_quantized_where_it_is() -> None:
    over = make({"data": 2, "model": 4}, 4)
    row = params.TensorSpec("layers.0.gate", "FD", (96, 64), (96, 64), ())
    w = mesh.place(weight(row.shape), row.letters, over)
    made = quantize.quantizer("int4")(row, w)
    assert made.scale.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    assert made.q.sharding.is_fully_replicated  # 3 tiles of 32 channels
    np.testing.assert_array_equal(made.dense(), quantize.quantize(jnp.asarray(weight(row.shape)), "int4", 1).dense())


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_stored_is_the_shape_of_what_is_made(platform: str) -> None:
    row = params.TensorSpec("layers.0.q", "NHD", (4, 48, 64), (4, 48, 64), ())
    make = partial(quantize.quantize, type="int4", inputs=1, by_parts=False, platform=platform)
    made = jax.eval_shape(make, jax.ShapeDtypeStruct(row.shape, jnp.bfloat16))
    found = quantize.stored(row, jnp.bfloat16, "int4", platform)
    assert made.tiled == (platform == "cpu")
    assert jax.tree.structure(found) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_which_weights_are_quantized() -> None:
    shapes = {
        "embed": ("VD", (96, 64)), "head": ("VD", (96, 64)), "layers.0.q": ("NHD", (4, 16, 64)),
        "layers.0.k": ("KHD", (2, 16, 64)), "layers.0.o": ("DNH", (64, 3, 20)),
        "layers.0.attn_norm": ("D", (64,)), "layers.0.q_norm": ("NH", (4, 16)),
    }  # fmt: skip
    rows = {path: params.TensorSpec(path, letters, shape, shape, ()) for path, (letters, shape) in shapes.items()}
    found = {path: [quantize.type_of(row, type) for type in quantize.TYPES] for path, row in rows.items()}
    not_int4 = ["int8", "int8-weights", "int8", "fp8"]
    assert found == {
        "embed": not_int4, "head": not_int4, "layers.0.k": not_int4, "layers.0.o": not_int4,
        "layers.0.q": ["int8", "int8-weights", "int4", "fp8"],
        "layers.0.attn_norm": [None] * 4, "layers.0.q_norm": [None] * 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="int7"):
        quantize.quantizer("int7")


@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_lookup_of_embeddings(type: str) -> None:
    w = quantize.quantize(jnp.asarray(weight((30, 64)), jnp.bfloat16), type, 1)
    tokens = jnp.asarray([[0, 29], [3, 3]])
    found = embed(tokens, w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, w.dense()[tokens])

"""Keys and values in 8 bits: rounding against numpy and ml_dtypes, attention against float32 attention over the numbers
that they stand for."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.nn import attend, attention_cpu, attention_gpu, attention_reference, attention_tpu, kv_cache, quantized_kv
from jaxlm.nn.attention_reference import TokenPositions
from jaxlm.nn.quantized_kv import QuantizedKV, quantize

pytestmark = pytest.mark.smoke
FORMATS = ["int8", "fp8"]


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_equals_numpy(name: str) -> None:
    x = np.random.RandomState(0).standard_normal((2, 3, 5, 16)).astype(np.float32) * 7
    x[0, 0, 0], x[1, 2, 4, 3] = 0, np.nan
    dtype = quantized_kv.dtype_of(name)
    got = quantize(jnp.asarray(x), dtype)
    largest = 127 if name == "int8" else 448
    scale = (np.abs(x).max(-1) / np.float32(largest)).astype(np.float32)
    ratio = np.clip(x / np.where(scale == 0, 1, scale)[..., None], -largest, largest)
    expected = np.round(ratio) if name == "int8" else ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    real = ~np.isnan(x).any(-1)
    np.testing.assert_allclose(got.scale[real], scale[real], rtol=2e-7)
    numbers = np.asarray(got.numbers(jnp.float32))
    step = np.maximum(np.abs(expected) / 8, 1) if name == "fp8" else 1  # where the quotients round to two sides
    assert (np.abs(numbers - expected)[real] <= np.broadcast_to(step, numbers.shape)[real]).all()
    assert (numbers != expected)[real].mean() < 0.01
    assert float(got.scale[0, 0, 0]) == 0
    assert np.isnan(got.scale[1, 2, 4])  # so that the row is found to be not finite
    assert (np.abs(numbers[real]).max(-1)[1:] == largest).all()  # the scale follows from the data


def test_the_fast_conversion_equals_that_of_ml_dtypes() -> None:
    bits = np.arange(256, dtype=np.uint8)
    expected = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = np.asarray(attention_cpu._shifted_to_float16(jnp.asarray(bits)).astype(jnp.float32)) * 256
    real = np.isfinite(expected)
    assert real.sum() == 254
    np.testing.assert_array_equal(got[real], expected[real])


# Attention

ROWS = {  # positions of the slots, and the window
    "ragged rows": ([range(50), range(3), range(17)], None),
    "a ring": ([[*range(48, 53), *range(5, 48)], range(20), []], 40),
}


def drawn(rows: Any, T: int, name: str, S: int = 53) -> tuple[Any, ...]:
    """q, k and v of the newest T tokens of each row, their positions, and one layer's cache of the others."""
    random, B, positions = np.random.RandomState(S + T), len(rows), np.full((len(rows), S), -1, np.int32)
    for row, pos in enumerate(rows):
        positions[row, : len(pos)] = pos
    q, k, v, *old = (
        jnp.asarray(random.standard_normal(shape) * random.uniform(0.3, 3, shape[:-1])[..., None], jnp.float32)
        for shape in ((B, T, 6, 8), (B, T, 2, 8), (B, T, 2, 8), (B, 2, S, 8), (B, 2, S, 8))
    )
    index = np.argsort(positions, axis=1)[:, -T:].astype(np.int32)
    newest = np.take_along_axis(positions, index, axis=1)
    index = np.where(newest < 0, S + np.arange(T, dtype=np.int32), index)
    stored = [quantize(x, quantized_kv.dtype_of(name)) for x in old]
    return q, k, v, jnp.asarray(newest), kv_cache.LayerCache(*stored, jnp.asarray(index), jnp.asarray(positions))


def dequantized(cache: kv_cache.LayerCache) -> kv_cache.LayerCache:
    """The float32 cache of the same numbers."""
    return replace(cache, k=floats(cache.k), v=floats(cache.v))


def floats(x: QuantizedKV) -> jax.Array:
    return x.numbers(jnp.float32) * x.scale[..., None]


def over(backend: Any, window: int | None, q: Any, k: Any, v: Any, pos: Any, cache: Any) -> jax.Array:
    query, key = (TokenPositions(x, jnp.zeros_like(x)) for x in (pos, cache.positions))
    return backend.over_cache(q, k, v, cache.k, cache.v, query, key, window, 0.4)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize(("rows", "window"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_attention_equals_that_over_the_same_numbers_in_float32(
    name: str, rows: Any, window: int | None, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's blocks, and the reference, which other platforms run. A scale of the wrong token is noticed."""
    for block, size in (("QUERY_BLOCK", 3), ("PREFILL_BLOCK", 8), ("DECODE_BLOCK", (64, 64, 64))):
        monkeypatch.setattr(attention_cpu, block, size)
    q, k, v, pos, cache = drawn(rows, T, name)

    @jax.jit
    def run(cache: Any) -> list[jax.Array]:
        cache = kv_cache.write(cache, k, v)
        shifted = [replace(x, scale=jnp.roll(x.scale, 1, axis=2)) for x in (cache.k, cache.v)]
        faults = [replace(cache, k=shifted[0]), replace(cache, v=shifted[1])]
        caches = [dequantized(cache), cache, *faults]
        outs = [over(attention_reference, window, q, k, v, pos, each) for each in caches]
        return [*outs, *(over(attention_cpu, window, q, k, v, pos, each) for each in caches[1:])]

    expected, *outs = (np.asarray(out)[np.asarray(pos >= 0)] for out in run(cache))
    for at, out in enumerate(outs):
        distance = np.abs(out - expected).max()
        assert (distance < 5e-6) if at % 3 == 0 else (distance > 0.1), at


@pytest.mark.parametrize(("name", "dtype"), [("int8", "float16"), ("fp8", "float16"), ("int8", "bfloat16")])
def test_half_precision(name: str, dtype: str) -> None:
    """The reference on accelerators multiplies in half precision: the stored numbers are exact in it, also where scales
    are small and many tokens share the probability."""
    S = 4096
    random = np.random.RandomState(0)
    q = jnp.asarray(random.standard_normal((1, 1, 2, 16)), dtype)
    k = q[:, :, :1]
    old = [jnp.asarray(random.standard_normal((1, 1, S, 16)) * size, jnp.float32) for size in (0.1, 0.01)]
    keys, values = (quantize(x, quantized_kv.dtype_of(name)) for x in old)
    pos, slots = jnp.array([[S]], jnp.int32), jnp.arange(S, dtype=jnp.int32)[None]
    cache = kv_cache.LayerCache(keys, values, pos, slots)
    got = np.asarray(over(attention_reference, None, q, k, k, pos, cache), np.float32)
    exact = np.asarray(over(attention_reference, None, q.astype("float32"), k, k, pos, dequantized(cache)))
    # Probabilities are rounded to the dtype: the errors of a sum of S products add up as a random walk.
    limit = 4 * float(jnp.finfo(dtype).eps) * float(jnp.abs(floats(values)).max()) * S**-0.5 + np.abs(exact) * 0.01
    assert (np.abs(got - exact) <= limit).all()


@pytest.mark.parametrize("backend", [attention_gpu, attention_tpu])
def test_kernels_take_the_first_chunk_and_xla_the_rest(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get keys and values as they are stored. Later chunks read the cache through the reference."""
    T, given = 128, []
    monkeypatch.setattr(backend, "unsupported", lambda q, k: None)
    kernel = "splash" if backend is attention_tpu else "_causal_mode"

    def causal(q: Any, k: Any, v: Any, tokens: Any, window: Any, scale: float) -> jax.Array:
        given.append(1)
        return attention_reference.reference(q, k, v, tokens, tokens, window, scale)

    monkeypatch.setattr(backend, kernel, causal)
    monkeypatch.setattr(attention_gpu, "_dense_mask", lambda *args: 1 / 0)  # cuDNN takes no int8
    random = np.random.RandomState(1)
    q, k, v = (jnp.asarray(random.standard_normal((1, T, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    cache = kv_cache.init(1, 2 * T, [None], K=2, H=8, dtype=jnp.int8, chunk=T)

    @partial(jax.jit, static_argnums=0)
    def run(backend: Any, pos: jax.Array, cache: kv_cache.KVCache) -> Any:
        _, [view] = kv_cache.advance(cache, pos)
        view = kv_cache.write(view, k, v)
        after = replace(cache, positions={str(2 * T): view.positions}, layers=[{"k": view.k, "v": view.v}])
        return over(backend, None, q, k, v, pos, view), after

    for begin in (0, T):
        pos = begin + jnp.arange(T, dtype=jnp.int32)[None]
        expected, after = run(attention_reference, pos, cache)
        np.testing.assert_allclose(run(backend, pos, cache)[0], expected, atol=2e-6)
        cache = after
    assert given


def test_a_gradient_through_rounding_is_refused() -> None:
    q, k, v, pos, cache = drawn([range(5)], 1, "int8")
    with pytest.raises(ValueError, match="no gradient"):
        jax.grad(lambda k: attend(q, k, v, pos, cache)[0].sum())(k)


@pytest.mark.parametrize("dtype", ["int4", "float64", 3, None])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        quantized_kv.dtype_of(dtype)
    with pytest.raises(ValueError, match="bfloat16"):
        quantized_kv.check_name(dtype)

"""Attention against a slow twin in numpy float64, in blocks against unblocked, and its memory on long sequences."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import attend, attention_cpu, attention_reference, kv_cache

pytestmark = pytest.mark.smoke


def slow(q: np.ndarray, k: np.ndarray, v: np.ndarray, pos: np.ndarray, window: int | None, scale: float) -> np.ndarray:
    """One query at a time in float64. A sequence begins wherever pos does not exceed the position before it."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    out = np.zeros((B, T, N, H))
    for b in range(B):
        segment, before, segments = 0, -1, []
        for p in pos[b]:
            if 0 <= p <= before:
                segment += 1
            before = p if p >= 0 else before
            segments.append(segment)
        for t in range(T):
            keys = [
                s
                for s in range(T)
                if pos[b, s] >= 0 and segments[s] == segments[t] and 0 <= pos[b, t] - pos[b, s] < (window or T * T)
            ]
            for n in range(N if pos[b, t] >= 0 else 0):
                scores = np.array([q[b, t, n] @ k[b, s, n // G] * scale for s in keys], np.float64)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ np.stack([v[b, s, n // G] for s in keys]) / weights.sum()
    return out


# Positions of two rows of 11 tokens.
ROWS = {
    "one sequence per row": [range(11), range(5, 16)],
    "ragged": [[*range(4)] + [-1] * 7, [-1] * 3 + [*range(8)]],
    "packed": [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2], [3, 4, 5, 1, 2, -1, -1, 3, 4, 0, 1]],
    "gaps": [[0, 2, 3, 9, 10, 11, 30, 31, 32, 33, 40], [0, -1, 1, -1, -1, 2, 3, -1, 4, 5, -1]],
    "a row of padding": [[-1] * 11, range(11)],
}


def drawn(T: int, N: int, K: int, H: int = 8, B: int = 2) -> tuple[np.ndarray, ...]:
    random = np.random.RandomState(T + N)
    return tuple(random.standard_normal((B, T, heads, H)).astype(np.float32) * 1.5 for heads in (N, K, K))


@cache
def compiled(window: int | None, scores: int) -> Any:
    """`attend`, traced while `scores` is MAX_SCORE_ELEMENTS."""
    return jax.jit(partial(attend, window=window, scale=0.4))


@pytest.mark.parametrize("T", [11, 8])  # 8 takes causal_blocked on CPU
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_the_slow_twin(rows: Any, window: int | None, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pos = np.array([list(row)[:T] for row in rows], np.int32)
    q, k, v = drawn(T, 6, 2)
    expected = slow(q, k, v, pos, window, 0.4)
    for scores in (attention_reference.MAX_SCORE_ELEMENTS, 200):  # unblocked, and in blocks of one or two queries
        monkeypatch.setattr(attention_reference, "MAX_SCORE_ELEMENTS", scores)
        out, kv = compiled(window, scores)(q, k, v, pos)
        out = np.asarray(out)
        assert kv is None
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[pos >= 0], expected[pos >= 0], atol=3e-6)


def cached(rows: Any, S: int, T: int = 1) -> tuple[Any, ...]:
    """The newest T tokens of each row, their positions, and a cache whose slots hold `rows`, in which their own slots
    still have other contents."""
    random, B = np.random.RandomState(S), len(rows)
    q, k, v, *stored = (random.standard_normal(shape).astype(np.float32) for shape in (
        (B, T, 6, 8), (B, T, 2, 8), (B, T, 2, 8), (B, 2, S, 8), (B, 2, S, 8)))  # fmt: skip
    positions = np.full((B, S), -1, np.int32)
    for row, pos in enumerate(rows):
        positions[row, : len(pos)] = pos
    index = np.argsort(positions, axis=1)[:, -T:].astype(np.int32)  # of the newest tokens, in order
    newest = np.take_along_axis(positions, index, axis=1)
    index = np.where(newest < 0, S + np.arange(T, dtype=np.int32), index)
    cache = kv_cache.LayerCache(*map(jnp.asarray, (*stored, index, positions)))
    return *map(jnp.asarray, (q, k, v, newest)), cache


def windowed(pos: np.ndarray, cache: kv_cache.LayerCache, window: int | None) -> jax.Array:
    """The slots that each token attends to, its own included."""
    distance = pos[:, :, None] - cache.positions[:, None]
    return (cache.positions >= 0)[:, None] & (distance >= 0) & (distance < (window or 1000))


def plain(window: int | None, q: Any, k: Any, v: Any, pos: Any, cache: kv_cache.LayerCache) -> Any:
    """The twin: softmax over the whole written cache."""
    cache = kv_cache.write(cache, k, v)
    grouped = q.reshape(*q.shape[:2], cache.k.shape[1], -1, q.shape[3])
    mask = windowed(pos, cache, window)[:, None, None]
    scores = jnp.where(mask, jnp.einsum("BTKGH,BKSH->BKGTS", grouped, cache.k) * 0.4, -1e30)
    return jnp.einsum("BKGTS,BKSH->BTKGH", jax.nn.softmax(scores), cache.v).reshape(q.shape)


def attended(window: int | None, q: Any, k: Any, v: Any, pos: Any, cache: kv_cache.LayerCache) -> Any:
    return attend(q, k, v, pos, cache, window=window, scale=0.4)[0]


SLOTS = {
    "one row": [range(50)],
    "ragged rows": [range(50), range(3), range(17)],
    "a ring": [[*range(48, 53), *range(5, 48)]],
    "gaps": [[0, 2, -1, 3, *[-1] * 20, 9, 10]],
    "a first token": [[0], range(4)],
    "a row of padding": [[], range(9)],
}
SLOTS = {name: (rows + [[]] * 3)[:3] for name, rows in SLOTS.items()}  # of one shape, for fewer compilations


@cache
def with_gradients(backend: Any, window: int | None, block: int) -> Any:
    """The output and its gradients by q, k, v and the stored keys and values. block: see the caller."""

    def value(arrays: Any, pos: Any, cache: kv_cache.LayerCache) -> Any:
        q, k, v, keys, values = arrays
        out = backend(window, q, k, v, pos, replace(cache, k=keys, v=values))
        return jnp.sum(jnp.where((pos >= 0)[..., None, None], jnp.sin(out), 0)), out

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@cache
def output(window: int | None, block: int) -> Any:
    return jax.jit(partial(attended, window))


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize(("S", "block"), [(53, 7), (53, 64), (56, 8)])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("rows", SLOTS.values(), ids=SLOTS)
def test_attention_over_a_cache_equals_the_slow_twin(
    rows: Any, window: int | None, S: int, block: int, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill (two blocks of queries) and decoding, in blocks that divide S and others, with the gradients."""
    monkeypatch.setattr(attention_cpu, "QUERY_BLOCK", 3)
    monkeypatch.setattr(attention_cpu, "PREFILL_BLOCK", block)
    monkeypatch.setattr(attention_cpu, "DECODE_BLOCK", (8 * block,) * 3)
    q, k, v, pos, cache = cached(rows, S, T)
    args, real = ((q, k, v, cache.k, cache.v), pos, cache), np.asarray(pos >= 0)
    out = output(window, block)(q, k, v, pos, cache)  # under differentiation, the output is that of `reference`
    _, grads = with_gradients(attended, window, block)(*args)
    (_, expected), exact = with_gradients(plain, window, 0)(*args)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=3e-6)
    for a, b in zip(grads, exact):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the paths of the CPU backend")
@pytest.mark.parametrize(
    ("T", "window", "read"), [(1, None, range(3)), (1, 4, range(2, 3)), (3, None, range(4)), (3, 4, range(2, 4))]
)
def test_only_the_blocks_that_are_attended_to_are_read(
    T: int, window: int | None, read: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other block of the KV cache is NaN. Of three queries of a row, the last two are in another block."""
    monkeypatch.setattr(attention_cpu, "PREFILL_BLOCK", 8)
    monkeypatch.setattr(attention_cpu, "DECODE_BLOCK", (64, 64, 64))
    *args, cache = cached([range(26 if T > 1 else 22), range(22), []], 64, T)
    run = jax.jit(lambda cache: attended(window, *args, cache)[:2])
    expected = jax.jit(partial(plain, window))(*args, cache)[:2]
    block = np.arange(64)[:, None] // 8
    unread = ~np.isin(block, read)
    cache = replace(cache, k=jnp.where(unread, jnp.nan, cache.k), v=jnp.where(unread, jnp.nan, cache.v))
    np.testing.assert_allclose(run(cache), expected, atol=3e-6)
    for end in (read[0], read[-1]):
        assert np.isnan(run(replace(cache, v=jnp.where(block == end, jnp.nan, cache.v)))).any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the paths of the CPU backend")
def test_a_block_of_queries_reads_the_slots_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of two queries over blocks of eight slots. Slots from 24 on, which hold the last two tokens, are
    NaN, then all slots, while the last four queries are padding."""
    monkeypatch.setattr(attention_cpu, "PREFILL_BLOCK", 8)
    monkeypatch.setattr(attention_cpu, "QUERY_BLOCK", 2)
    q, k, v, pos, cache = cached([range(26)], 64, 6)
    run = jax.jit(lambda pos, cache, v: attended(None, q, k, v, pos, cache))
    last = jnp.arange(6)[:, None, None] >= 4
    out = np.asarray(run(pos, replace(cache, v=cache.v.at[:, :, 24:].set(jnp.nan)), jnp.where(last, jnp.nan, v)))
    assert np.isfinite(out[:, :4]).all()
    assert np.isnan(out[:, 4:]).all()
    padded = jnp.where(jnp.arange(6) < 2, pos, -1)
    nothing = replace(cache, v=jnp.full_like(cache.v, jnp.nan), index=jnp.where(padded < 0, 64, cache.index))
    nothing = replace(nothing, positions=jnp.where(nothing.positions > 21, -1, nothing.positions))
    assert np.isfinite(np.asarray(run(padded, nothing, v))[:, 2:]).all()


@pytest.mark.parametrize("T", [1, 3])
def test_a_row_does_not_depend_on_the_length_of_others(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "PREFILL_BLOCK", 8)
    monkeypatch.setattr(attention_cpu, "DECODE_BLOCK", (64, 64, 64))
    run = jax.jit(partial(attended, None))
    q, k, v, pos, cache = cached([range(9), range(60), []], 64, T)
    alone = run(q, k, v, pos.at[1].set(-1), replace(cache, positions=cache.positions.at[1].set(-1)))
    np.testing.assert_array_equal(run(q, k, v, pos, cache)[0], alone[0])


# Half precision. Scores, softmax and sums are float32, so the only errors are one rounding of the output to the dtype
# (relative: half an ulp, eps / 2) and those of the float32 twin test. The twin gets the rounded inputs.
HALF = {"blocked": 8, "unblocked": 11}  # tokens per row: causal_blocked, _in_float32


def assert_rounded_once(out: jax.Array, expected: np.ndarray, real: np.ndarray, dtype: str) -> None:
    assert out.dtype == dtype
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(out, np.float64)[real], expected[real], rtol=half_ulp, atol=3e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the paths of the CPU backend")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("path", HALF)
def test_half_precision_on_cpu_equals_the_slow_twin(path: str, window: int | None, dtype: str) -> None:
    T = HALF[path]
    pos = np.array([list(row)[:T] for row in (ROWS["packed"][0], ROWS["gaps"][1])], np.int32)
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in drawn(T, 6, 2))
    out, _ = compiled(window, attention_reference.MAX_SCORE_ELEMENTS)(q, k, v, pos)
    expected = slow(*(x.astype(np.float64) for x in (q, k, v)), pos, window, 0.4)
    assert_rounded_once(out, expected, pos >= 0, dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the paths of the CPU backend")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 3])
def test_half_precision_decoding_on_cpu_equals_the_slow_twin(window: int | None, dtype: str) -> None:
    """Prefill of 5 tokens into a KV cache, then one token at a time through a ring buffer where there is a window."""
    pos = np.array([range(11), [-1] * 2 + [*range(9)]], np.int32)
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in drawn(11, 6, 2))
    expected = slow(*(x.astype(np.float64) for x in (q, k, v)), pos, window, 0.4)

    @jax.jit
    def step(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, cache: Any) -> Any:
        cache, [view] = kv_cache.advance(cache, pos)
        out, view = attend(q, k, v, pos, view, window=window, scale=0.4)
        return out, replace(cache, layers=[{"k": view.k, "v": view.v}])

    cache, outs = kv_cache.init(2, 16, [window], K=2, H=8, dtype=dtype, chunk=5), []
    for begin, end in [(0, 5), *((t, t + 1) for t in range(5, 11))]:
        out, cache = step(*(x[:, begin:end] for x in (q, k, v, pos)), cache)
        outs.append(out)
    assert_rounded_once(jnp.concatenate(outs, axis=1), expected, pos >= 0, dtype)


def test_default_scale_is_that_of_the_head_width() -> None:
    q, k, v = map(jnp.asarray, drawn(5, 2, 1))
    pos = jnp.asarray(np.tile(np.arange(5, dtype=np.int32), (2, 1)))
    default, same, other = map(np.asarray, jax.jit(lambda: [
        attend(q, k, v, pos, **options)[0] for options in ({}, {"scale": 8**-0.5}, {"scale": 0.4})
    ])())  # fmt: skip
    np.testing.assert_array_equal(default, same)
    assert np.abs(default - other).max() > 0.01


LENGTHS = [(None, 36), (7, 37), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(None, 37), (7, 36)])]


@pytest.mark.parametrize(("window", "T"), LENGTHS)  # 36 takes causal_blocked on CPU
def test_blocks_and_their_gradient_equal_unblocked_attention(
    window: int | None, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = map(jnp.asarray, drawn(T, 4, 2))
    pos = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    pos[1, :5], pos[1, 20:] = -1, np.arange(T - 20)
    target = jnp.asarray(np.random.RandomState(0).standard_normal(q.shape), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attend(q, k, v, jnp.asarray(pos), window=window)[0]
        return jnp.where(pos[:, :, None, None] >= 0, out * target, 0).sum()

    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    monkeypatch.setattr(
        attention_reference, "MAX_SCORE_ELEMENTS", 2 * 4 * T * 8
    )  # 8 queries per block: 5 blocks, the last one padded
    text = jax.jit(loss).lower(q, k, v).as_text()
    assert f"2x2x8x2x{T}" in text
    assert f"2x2x{T}x2x{T}" not in text
    blocked = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocked)):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("what", ["forward", "gradient", "cache"])
def test_memory_on_long_sequences_is_not_quadratic(what: str) -> None:
    """At T = 16,384 the scores of 4 heads would be 4.3 GB; a block is 0.13 GB."""
    T, N = 16_384, 4
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (N, 2))
    pos = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> jax.Array:
        return attend(q, k, v, pos)[0].sum()

    def over_cache(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> jax.Array:
        _, [view] = kv_cache.advance(kv_cache.init(1, T, [None], K=2, H=16, dtype=q.dtype, chunk=T), pos)
        return attend(q, k, v, pos, view)[0].sum()

    function = {"forward": loss, "gradient": jax.grad(loss, argnums=(0, 1, 2)), "cache": over_cache}[what]
    memory = jax.jit(function).lower(q, k, k, pos).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * attention_reference.MAX_SCORE_ELEMENTS * 4 < N * T * T * 4 / 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the paths of the CPU backend")
def test_prefill_of_a_short_chunk_needs_little_memory() -> None:
    """512 tokens over 4,096 slots: the scores of all slots would be 134 MB. jax 0.10 also copies the bfloat16 cache."""
    T, S, N = 512, 4096, 16
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 64), jnp.bfloat16) for heads in (N, 8))
    cache = kv_cache.init(1, S, [None], K=8, H=64, dtype=jnp.bfloat16, chunk=T)

    def prefill(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, cache: Any) -> jax.Array:
        return attend(q, k, v, pos, kv_cache.advance(cache, pos)[1][0])[0]

    pos = jax.ShapeDtypeStruct((1, T), jnp.int32)
    memory = jax.jit(prefill).lower(q, k, k, pos, cache).compile().memory_analysis()
    assert (
        memory.temp_size_in_bytes
        < 2 * (4 * T * N * attention_cpu.PREFILL_BLOCK * 4) + 2 * 8 * S * 64 * 2
        < T * N * S * 4 / 3
    )

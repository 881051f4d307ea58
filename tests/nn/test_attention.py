"""Attention against a slow twin in numpy, block by block against whole, and what a long sequence costs in memory."""

from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import attend

pytestmark = pytest.mark.smoke

module = import_module("jaxlm.nn.attention")


def slow(q: np.ndarray, k: np.ndarray, v: np.ndarray, pos: np.ndarray, window: int | None, scale: float) -> np.ndarray:
    """One query at a time in float64; a sequence begins wherever pos does not exceed the last one before it."""
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
            seen = [
                s
                for s in range(T)
                if pos[b, s] >= 0 and segments[s] == segments[t] and 0 <= pos[b, t] - pos[b, s] < (window or T * T)
            ]
            for n in range(N if pos[b, t] >= 0 else 0):
                scores = np.array([q[b, t, n] @ k[b, s, n // G] * scale for s in seen], np.float64)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ np.stack([v[b, s, n // G] for s in seen]) / weights.sum()
    return out


# Places of two rows of 11 tokens.
ROWS = {
    "two texts": [range(11), range(5, 16)],
    "ragged": [[*range(4)] + [-1] * 7, [-1] * 3 + [*range(8)]],
    "packed": [[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2], [3, 4, 5, 1, 2, -1, -1, 3, 4, 0, 1]],
    "gaps": [[0, 2, 3, 9, 10, 11, 30, 31, 32, 33, 40], [0, -1, 1, -1, -1, 2, 3, -1, 4, 5, -1]],
    "padding alone": [[-1] * 11, range(11)],
}


def drawn(T: int, N: int, K: int, H: int = 8, B: int = 2) -> tuple[np.ndarray, ...]:
    random = np.random.RandomState(T + N)
    return tuple(random.standard_normal((B, T, heads, H)).astype(np.float32) * 1.5 for heads in (N, K, K))


@cache
def compiled(window: int | None, scores: int) -> Any:
    """`attend` as it is traced while `scores` is the limit of a block."""
    return jax.jit(partial(attend, window=window, scale=0.4))


@pytest.mark.parametrize("T", [11, 8])  # 8 is cut into parts on CPU
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_the_slow_twin(rows: Any, window: int | None, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pos = np.array([list(row)[:T] for row in rows], np.int32)
    q, k, v = drawn(T, 6, 2)
    expected = slow(q, k, v, pos, window, 0.4)
    for scores in (module.SCORES, 200):  # whole, and in blocks of one or two queries
        monkeypatch.setattr(module, "SCORES", scores)
        out, kv = compiled(window, scores)(q, k, v, pos)
        out = np.asarray(out)
        assert kv is None
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[pos >= 0], expected[pos >= 0], atol=3e-6)


def test_scale_is_that_of_the_head_width_unless_given() -> None:
    q, k, v = map(jnp.asarray, drawn(5, 2, 1))
    pos = jnp.asarray(np.tile(np.arange(5, dtype=np.int32), (2, 1)))
    default, same, other = map(np.asarray, jax.jit(lambda: [
        attend(q, k, v, pos, **given)[0] for given in ({}, {"scale": 8**-0.5}, {"scale": 0.4})
    ])())  # fmt: skip
    np.testing.assert_array_equal(default, same)
    assert np.abs(default - other).max() > 0.01


CUTS = [(None, 36), (7, 37), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(None, 37), (7, 36)])]


@pytest.mark.parametrize(("window", "T"), CUTS)  # 36 is cut into parts on CPU
def test_blocks_and_their_gradient_equal_the_whole(window: int | None, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = map(jnp.asarray, drawn(T, 4, 2))
    pos = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    pos[1, :5], pos[1, 20:] = -1, np.arange(T - 20)
    target = jnp.asarray(np.random.RandomState(0).standard_normal(q.shape), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attend(q, k, v, jnp.asarray(pos), window=window)[0]
        return jnp.where(pos[:, :, None, None] >= 0, out * target, 0).sum()

    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    monkeypatch.setattr(module, "SCORES", 2 * 4 * T * 8)  # 8 queries a block: 5 blocks, the last one filled up
    text = jax.jit(loss).lower(q, k, v).as_text()
    assert f"2x2x2x8x{T}" in text
    assert f"2x2x2x{T}x{T}" not in text
    blocked = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocked)):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_long_sequences_form_no_square_of_scores(what: str) -> None:
    """At T = 16,384 all scores of 4 heads would be 4.3 GB; a block is 0.13."""
    T, N = 16_384, 4
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (N, 2))
    pos = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array) -> jax.Array:
        return attend(q, k, v, pos)[0].sum()

    function = loss if what == "forward" else jax.grad(loss, argnums=(0, 1, 2))
    memory = jax.jit(function).lower(q, k, k, pos).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * module.SCORES * 4 < N * T * T * 4 / 4

"""Caches: which slot a position takes, what a ring still holds, padding, and rows that join a batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import tiny

from jaxlm import Model
from jaxlm.nn import kv_cache as caches

pytestmark = pytest.mark.smoke

TEXT = np.random.RandomState(1).randint(0, 199, (3, 24)).astype(np.int32)


advance, insert, write = map(jax.jit, (caches.advance, caches.insert, caches.write))


def written(cache: caches.KVCache, *calls: list[list[int]]) -> caches.KVCache:
    for pos in calls:
        cache, _ = advance(cache, np.array(pos, np.int32))
    return cache


def test_a_sliding_layer_keeps_window_plus_chunk_less_one_slots() -> None:
    cache = caches.init(2, 64, [8, None, 8, 100], K=1, H=2, dtype=jnp.float32, chunk=5)
    assert [layer["k"].shape for layer in cache.layers] == [(2, 1, S, 2) for S in (12, 64, 12, 64)]
    assert {S: a.shape for S, a in cache.positions.items()} == {"12": (2, 12), "64": (2, 64)}  # one record a size
    assert all((np.asarray(a) == -1).all() for a in cache.positions.values())
    whole = caches.init(1, 64, [8, None], K=1, H=2, dtype=jnp.float32, chunk=None)
    assert [layer["v"].shape[2] for layer in whole.layers] == [64, 64]


def test_a_ring_holds_what_the_first_of_a_chunk_still_needs() -> None:
    """For every window and chunk size, after every write."""
    for window in (1, 2, 5):
        for chunk in (1, 2, 3, 7):
            cache = caches.init(1, 40, [window], K=1, H=2, dtype=jnp.float32, chunk=chunk)
            for begin in range(0, 40 - chunk, chunk):
                cache = written(cache, [list(range(begin, begin + chunk))])
                held = set(np.asarray(next(iter(cache.positions.values())))[0].tolist())
                needed = range(max(0, begin - window + 1), begin + chunk)
                assert set(needed) <= held, (window, chunk, begin)


def test_padding_is_never_written() -> None:
    cache = caches.init(2, 6, [None], K=1, H=2, dtype=jnp.float32, chunk=None)
    cache = written(cache, [[0, 1, -1, -1, 2, 3], [-1, -1, -1, -1, 0, 1]], [[-1, 4, 5], [-1, -1, -1]])
    np.testing.assert_array_equal(cache.positions["6"], [[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(caches.next_position(cache), [6, 2])
    cache, (view,) = advance(cache, np.full((2, 2), -1, np.int32))
    ones = np.ones((2, 2, 1, 2), np.float32)
    assert not np.any(write(view, ones, ones).k)


def test_positions_past_the_cache_are_dropped() -> None:
    cache = caches.init(1, 4, [None, 2], K=1, H=2, dtype=jnp.float32, chunk=2)
    cache = written(cache, [[2, 3]], [[4, 5]])
    assert max(np.max(a) for a in cache.positions.values()) == 3


def test_more_tokens_than_a_call_may_write_are_refused() -> None:
    cache = caches.init(1, 16, [4], K=1, H=2, dtype=jnp.float32, chunk=3)
    with pytest.raises(ValueError, match=r"5 tokens at once do not fit this cache: it takes 3 a call and 16 in all"):
        written(cache, [[0, 1, 2, 3, 4]])


def step(model: Model, kv: caches.KVCache, tokens: list[int], pos: list[int]) -> np.ndarray:
    """The logits [B,V] of one token a row."""
    column = [np.array(x, np.int32)[:, None] for x in (tokens, pos)]
    return np.asarray(model.forward(column[0], model.weights, kv, column[1])[0])[:, 0]


@pytest.fixture(scope="module")
def gemma() -> Model:
    return tiny("gemma3")  # window 5


POS = np.tile(np.arange(12), (3, 1))
POS[2, 7:] = -1


def prefilled(gemma: Model) -> caches.KVCache:
    """Rows 0 and 2 in a cache of their own, 12 and 7 tokens."""
    return gemma.forward(TEXT[[0, 2], :12], gemma.weights, gemma.init_kv(2, 16, chunk=12), POS[[0, 2]])[1]


@pytest.mark.parametrize("chunk", [4, 12, None], ids=["smaller ring", "same ring", "no ring"])
def test_insert_equals_direct_prefill(gemma: Model, chunk: int | None) -> None:
    """Two rows, prefilled in a cache of their own, join a batch of three; row 1 stays as it was."""
    direct = gemma.forward(TEXT[:, :12], gemma.weights, gemma.init_kv(3, 24, chunk=12), POS)[1]
    part = prefilled(gemma)
    target = gemma.init_kv(3, 24, chunk=chunk)
    for begin in range(0, 12, 4):
        target = gemma.forward(TEXT[:, begin : begin + 4], gemma.weights, target, POS[:, begin : begin + 4])[1]
    before = jax.tree.map(lambda a: np.asarray(a)[1], (target.positions, target.layers))
    stale = gemma.forward(TEXT[:, 3:7], gemma.weights, target, np.array([[12, 13, 14, 15], [-1] * 4, [9] + [-1] * 3]))[
        1
    ]
    joined = insert(stale, part, np.array([0, 2]))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((joined.positions, joined.layers))):
        np.testing.assert_array_equal(a, np.asarray(b)[1])
    np.testing.assert_array_equal(caches.next_position(joined), [12, 12, 7])
    after = [12, 12, 7]
    np.testing.assert_allclose(step(gemma, joined, [5, 6, 7], after), step(gemma, direct, [5, 6, 7], after), atol=1e-5)
    swapped = insert(stale, part, np.array([2, 0]))
    assert np.abs(step(gemma, swapped, [5, 6, 7], after) - step(gemma, direct, [5, 6, 7], after)).max() > 0.1


def test_insert_drops_rows_past_the_end(gemma: Model) -> None:
    joined = insert(gemma.init_kv(2, 16, chunk=2), prefilled(gemma), np.array([1, 7]))
    first, second = np.asarray(joined.positions["16"])
    assert (first == -1).all()
    np.testing.assert_array_equal(second, [*range(12), -1, -1, -1, -1])


def test_the_newest_positions_win_where_the_target_ring_is_smaller() -> None:
    part = caches.init(2, 30, [5], K=1, H=2, dtype=jnp.float32, chunk=4)  # 8 slots
    part = written(part, *([[*range(i, i + 4)]] * 2 for i in range(0, 20, 4)))  # 12 to 19, 16 in the first
    target = insert(caches.init(2, 30, [5], K=1, H=2, dtype=jnp.float32, chunk=1), part, np.array([0, 1]))
    np.testing.assert_array_equal(target.positions["5"], [[15, 16, 17, 18, 19]] * 2)


def test_a_ring_of_window_slots_alone_shows(gemma: Model) -> None:
    """The planted fault: with `window` slots, a chunk of 4 destroys what its first query needs."""

    def last_logits(kv: caches.KVCache) -> np.ndarray:
        for begin in range(0, 12, 4):
            out, kv = gemma.forward(TEXT[:, begin : begin + 4], gemma.weights, kv, POS[:, begin : begin + 4])
        return np.asarray(out)[:2]

    whole = np.asarray(gemma.forward(TEXT[:, :12], gemma.weights, gemma.init_kv(3, 24, chunk=12), POS)[0])[:2, 8:]
    np.testing.assert_allclose(last_logits(gemma.init_kv(3, 24, chunk=4)), whole, atol=1e-5)
    assert np.abs(last_logits(replace(gemma.init_kv(3, 24, chunk=1), chunk=4)) - whole).max() > 0.1

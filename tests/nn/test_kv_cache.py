"""KV cache: slots of positions, ring buffers of sliding-window layers, padding, rewinding, continuous batching."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import tiny

from jaxlm import Model
from jaxlm.inference import cache_rows
from jaxlm.model import next_position
from jaxlm.nn import kv_cache

pytestmark = pytest.mark.smoke

TEXT = np.random.RandomState(1).randint(0, 199, (3, 24)).astype(np.int32)


advance, insert, write = map(jax.jit, (kv_cache.advance, cache_rows.insert, kv_cache.write))


def written(cache: kv_cache.KVCache, *calls: list[list[int]]) -> kv_cache.KVCache:
    for pos in calls:
        cache, _ = advance(cache, np.array(pos, np.int32))
    return cache


def test_sliding_window_layers_keep_window_plus_chunk_less_one_slots() -> None:
    cache = kv_cache.init(2, 64, [8, None, 8, 100], K=1, H=2, dtype=jnp.float32, chunk=5)
    assert [cache.slots(i) for i in range(4)] == [12, 64, 12, 64]
    for name in ("k", "v"):
        assert [layer[name].shape for layer in cache.layers] == [(2, 1, S, 2) for S in (12, 64, 12, 64)]
    assert {S: a.shape for S, a in cache.positions.items()} == {"12": (2, 12), "64": (2, 64)}  # one array per size
    assert all((np.asarray(a) == -1).all() for a in cache.positions.values())
    full = kv_cache.init(1, 64, [8, None], K=1, H=2, dtype=jnp.float32, chunk=None)
    assert [full.slots(i) for i in range(2)] == [64, 64]


def test_ring_buffer_holds_the_window_of_the_first_token_of_a_chunk() -> None:
    """After every write, for several windows and chunk sizes."""
    for window in (1, 2, 5):
        for chunk in (1, 2, 3, 7):
            cache = kv_cache.init(1, 40, [window], K=1, H=2, dtype=jnp.float32, chunk=chunk)
            for begin in range(0, 40 - chunk, chunk):
                cache = written(cache, [list(range(begin, begin + chunk))])
                stored = set(np.asarray(next(iter(cache.positions.values())))[0].tolist())
                needed = range(max(0, begin - window + 1), begin + chunk)
                assert set(needed) <= stored, (window, chunk, begin)


def test_padding_is_never_written() -> None:
    cache = kv_cache.init(2, 6, [None], K=1, H=2, dtype=jnp.float32, chunk=None)
    cache = written(cache, [[0, 1, -1, -1, 2, 3], [-1, -1, -1, -1, 0, 1]], [[-1, 4, 5], [-1, -1, -1]])
    np.testing.assert_array_equal(cache.positions["6"], [[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(next_position(cache), [6, 2])
    cache, (view,) = advance(cache, np.full((2, 2), -1, np.int32))
    ones = np.ones((2, 2, 1, 2), np.float32)
    assert not np.any(write(view, ones, ones).k)


def test_positions_past_the_cache_are_dropped() -> None:
    cache = kv_cache.init(1, 4, [None, 2], K=1, H=2, dtype=jnp.float32, chunk=2)
    cache = written(cache, [[2, 3]], [[4, 5]])
    assert max(np.max(a) for a in cache.positions.values()) == 3


def test_more_tokens_than_the_chunk_are_rejected() -> None:
    cache = kv_cache.init(1, 16, [4], K=1, H=2, dtype=jnp.float32, chunk=3)
    with pytest.raises(ValueError, match="5 tokens"):
        written(cache, [[0, 1, 2, 3, 4]])


def step(model: Model, kv: kv_cache.KVCache, tokens: list[int], pos: list[int]) -> np.ndarray:
    """The logits [B,V] of one token per row."""
    column = [np.array(x, np.int32)[:, None] for x in (tokens, pos)]
    return np.asarray(model.forward(column[0], model.weights, kv, column[1])[0])[:, 0]


@pytest.fixture(scope="module")
def gemma() -> Model:
    return tiny("gemma3")  # window 5


POS = np.tile(np.arange(12), (3, 1))
POS[2, 7:] = -1


def prefilled(gemma: Model) -> kv_cache.KVCache:
    """A cache of rows 0 and 2, with 12 and 7 tokens."""
    return gemma.forward(TEXT[[0, 2], :12], gemma.weights, gemma.init_kv(2, 16, chunk=12), POS[[0, 2]])[1]


@pytest.mark.parametrize("chunk", [4, 12, None], ids=["smaller ring buffer", "same ring buffer", "no ring buffer"])
def test_insert_equals_direct_prefill(gemma: Model, chunk: int | None) -> None:
    """Two rows, prefilled in another cache, join a batch of three. Row 1 does not change."""
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
    np.testing.assert_array_equal(next_position(joined), [12, 12, 7])
    after = [12, 12, 7]
    np.testing.assert_allclose(step(gemma, joined, [5, 6, 7], after), step(gemma, direct, [5, 6, 7], after), atol=1e-5)
    swapped = insert(stale, part, np.array([2, 0]))
    assert np.abs(step(gemma, swapped, [5, 6, 7], after) - step(gemma, direct, [5, 6, 7], after)).max() > 0.1


def test_insert_drops_rows_past_the_end(gemma: Model) -> None:
    joined = insert(gemma.init_kv(2, 16, chunk=2), prefilled(gemma), np.array([1, 7]))
    first, second = np.asarray(joined.positions["16"])
    assert (first == -1).all()
    np.testing.assert_array_equal(second, [*range(12), -1, -1, -1, -1])


def test_insert_into_a_smaller_ring_buffer_keeps_the_newest_positions() -> None:
    part = kv_cache.init(2, 30, [5], K=1, H=2, dtype=jnp.float32, chunk=4)  # 8 slots
    part = written(part, *([[*range(i, i + 4)]] * 2 for i in range(0, 20, 4)))  # 12 to 19, 16 in the first
    target = insert(kv_cache.init(2, 30, [5], K=1, H=2, dtype=jnp.float32, chunk=1), part, np.array([0, 1]))
    np.testing.assert_array_equal(target.positions["5"], [[15, 16, 17, 18, 19]] * 2)


def test_ring_buffer_of_window_slots_is_too_small(gemma: Model) -> None:
    """The planted fault: with `window` slots, a chunk of 4 overwrites keys that its first query attends to."""

    def last_logits(kv: kv_cache.KVCache) -> np.ndarray:
        for begin in range(0, 12, 4):
            out, kv = gemma.forward(TEXT[:, begin : begin + 4], gemma.weights, kv, POS[:, begin : begin + 4])
        return np.asarray(out)[:2]

    expected = np.asarray(gemma.forward(TEXT[:, :12], gemma.weights, gemma.init_kv(3, 24, chunk=12), POS)[0])[:2, 8:]
    np.testing.assert_allclose(last_logits(gemma.init_kv(3, 24, chunk=4)), expected, atol=1e-5)
    assert np.abs(last_logits(replace(gemma.init_kv(3, 24, chunk=1), chunk=4)) - expected).max() > 0.1

"""Key/value caches. A slot's position is stored, so a mask never has to guess what a slot holds.

A layer that sees everything keeps position p in slot p. A sliding layer keeps it in slot p % S, a ring of
window + chunk - 1 slots: writing `chunk` tokens at once then destroys nothing that the first of them still needs.
Layers with the same number of slots share one record of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "layers"], meta_fields=["length", "chunk"])
@dataclass(frozen=True)
class KVCache:
    """positions {slots S: [B,S] int32}: the position of the token in each slot, -1 when empty; layers: k, v [B,K,S,H]
    each."""

    positions: dict[str, jax.Array]
    layers: list[dict[str, jax.Array]]
    length: int  # positions 0 to length - 1 fit
    chunk: int  # the most tokens of a row that one call may write


class LayerCache(NamedTuple):
    """One layer's view of a cache: k, v [B,K,S,H], where the call's tokens go (index [B,T]) and the positions
    [B,S] that the slots hold once they are there."""

    k: jax.Array
    v: jax.Array
    index: jax.Array
    positions: jax.Array


def init(
    batch: int, length: int, windows: Sequence[int | None], K: int, H: int, dtype: Any, chunk: int | None
) -> KVCache:
    """An empty cache for layers with these windows (None: sees all). Without `chunk`, any number of tokens may be
    written at once and every layer keeps all `length` positions."""
    chunk = min(chunk or length, length)
    counts = [length if window is None else min(length, window + chunk - 1) for window in windows]
    at = {str(S): jnp.full((batch, S), -1, jnp.int32) for S in counts}
    layers = [{"k": jnp.zeros((batch, K, S, H), dtype), "v": jnp.zeros((batch, K, S, H), dtype)} for S in counts]
    return KVCache(at, layers, length, chunk)


def map_arrays(cache: KVCache, put: Callable[[Any, str], Any]) -> KVCache:
    """`put(array, letters)` over every array of a cache: holds them to a mesh."""
    positions = {S: put(a, "BS") for S, a in cache.positions.items()}
    return replace(cache, positions=positions, layers=[{n: put(a, "BKSH") for n, a in w.items()} for w in cache.layers])


def slot_index(pos: jax.Array, S: int, length: int) -> jax.Array:
    """The slot [B,T] of each position. Padding (and what is past the cache) goes past the end, where writes are
    dropped: a negative index would wrap. No two tokens of a row share a slot, so the scatter may assume as much."""
    outside = S + jnp.arange(pos.shape[1], dtype=pos.dtype)
    return jnp.where((pos < 0) | (pos >= length), outside, pos % S)


def advance(cache: KVCache, pos: jax.Array) -> tuple[KVCache, list[LayerCache]]:
    """Notes that tokens at pos [B,T] are about to be written; -> the cache, and each layer's view of it."""
    if pos.shape[1] > cache.chunk:
        raise ValueError(
            f"{pos.shape[1]} tokens at once do not fit this cache: it takes {cache.chunk} a call and {cache.length} in "
            "all. Give init_kv(batch, length) more, or write in chunks."
        )
    index = {S: slot_index(pos, a.shape[1], cache.length) for S, a in cache.positions.items()}
    # A row that is rewound forgets what lay behind: it goes on from its newest token.
    newest = jnp.where((pos >= 0).any(axis=1), pos.max(axis=1), cache.length)[:, None]
    kept = {S: jnp.where(a > newest, -1, a) for S, a in cache.positions.items()}
    positions = {S: _by_row(_put_at, a, pos, index[S]) for S, a in kept.items()}
    views = [LayerCache(w["k"], w["v"], index[S], positions[S]) for w in cache.layers for S in [str(w["k"].shape[2])]]
    return replace(cache, positions=positions), views


def write(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Puts k, v [B,T,K,H] where `index` says."""
    return cache._replace(k=_by_row(_put, cache.k, k, cache.index), v=_by_row(_put, cache.v, v, cache.index))


def _put(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """One row: new [T,K,H] into old [K,S,H] at index [T]."""
    return old.at[:, index].set(new.swapaxes(0, 1).astype(old.dtype), mode="drop", unique_indices=True)


def _put_at(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return old.at[index].set(new, mode="drop", unique_indices=True)


# Over a mesh the rows of a batch lie on several devices: said as a batch, and not as one more index, a write stays on
# its own device.
def _by_row(put: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    return jax.vmap(put)(*arrays)


def next_position(cache: KVCache) -> jax.Array:
    """The position [B] that follows the last one written in each row."""
    return jnp.max(jnp.stack([a.max(axis=1) for a in cache.positions.values()]), axis=0) + 1


def insert(cache: KVCache, part: KVCache, rows: jax.Array) -> KVCache:
    """Replaces rows [b] of a cache by those of `part` (batch b, any number of slots): what prefill made joins a batch.

    A row number past the end is dropped. Where the target's ring is smaller, the newest positions win.
    """
    positions, layers = dict(cache.positions), []
    for new, old in zip(cache.layers, part.layers, strict=True):
        S = new["k"].shape[2]
        stored = part.positions[str(old["k"].shape[2])]
        stored = jnp.where(stored > stored.max(axis=1, keepdims=True) - S, stored, -1)
        index = slot_index(stored, S, cache.length)
        cleared = cache.positions[str(S)].at[rows].set(-1, mode="drop")
        positions[str(S)] = cleared.at[rows[:, None], index].set(stored, mode="drop")
        # Axes 0 and 2 are indexed, so the values come as [b,s,K,H].
        put = {n: new[n].at[rows[:, None], :, index].set(old[n].swapaxes(1, 2), mode="drop") for n in ("k", "v")}
        layers.append(put)
    return replace(cache, positions=positions, layers=layers)


def resize_cache(cache: KVCache, part: KVCache) -> KVCache:
    """An empty cache with the contents of a shorter one of as many rows; no row leaves its device."""
    positions, layers = dict(cache.positions), []
    for new, old in zip(cache.layers, part.layers, strict=True):
        S, stored = new["k"].shape[2], part.positions[str(old["k"].shape[2])]
        index = slot_index(stored, S, cache.length)
        view = write(LayerCache(new["k"], new["v"], index, stored), old["k"].swapaxes(1, 2), old["v"].swapaxes(1, 2))
        positions[str(S)] = _by_row(_put_at, cache.positions[str(S)], stored, index)
        layers.append({"k": view.k, "v": view.v})
    return replace(cache, positions=positions, layers=layers)

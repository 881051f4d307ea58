"""The KV cache: keys and values of earlier tokens, and the position of the token in each slot.

A full-attention layer stores position p in slot p. A sliding-window layer stores it in slot p % S of a ring buffer with
S = window + chunk - 1 slots, at most the length. Writing `chunk` tokens then does not overwrite positions that the
first of them attends to. The attention mask is computed from the stored positions. Layers with the same number of slots
share one array of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "layers"], meta_fields=["length", "chunk"])
@dataclass(frozen=True)
class KVCache:
    """The KV cache of all layers, a pytree. `init` creates one.

    Keys are stored after RoPE. Instead of arrays, the leaves may be their shapes, shardings or letters.

    Attributes:
        positions: Position of the token in each slot, [B,S] int32, -1 if empty. One array for each number of slots that
            layers have, under the key str(S).
        layers: {"k": [B,K,S,H], "v": [B,K,S,H]} of each layer.
        length: Maximum number of positions, 0 to length - 1.
        chunk: Maximum number of tokens per row and call.
    """

    positions: dict[str, Any]
    layers: list[dict[str, Any]]
    length: int
    chunk: int


class LayerCache(NamedTuple):
    """One layer's part of the KV cache during a call.

    Attributes:
        k, v: Keys and values.
        index: Slot of each token of the call.
        positions: Positions of all slots after these tokens are written.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    index: Int[Array, "B T"]
    positions: Int[Array, "B S"]


def init(
    batch: int, length: int, windows: Sequence[int | None], K: int, H: int, dtype: Any, chunk: int | None
) -> KVCache:
    """Creates an empty KV cache.

    Args:
        batch: Number of rows B.
        length: Maximum number of positions per row.
        windows: Sliding window of each layer; None for full attention.
        K: Number of kv heads.
        H: Head width.
        dtype: dtype of keys and values.
        chunk: Maximum number of tokens per row and call. None: any number, for which every layer stores all `length`
            positions.
    """
    chunk = min(chunk or length, length)
    slots = [length if window is None else min(length, window + chunk - 1) for window in windows]
    positions = {str(S): jnp.full((batch, S), -1, jnp.int32) for S in slots}
    layers = [{"k": jnp.zeros((batch, K, S, H), dtype), "v": jnp.zeros((batch, K, S, H), dtype)} for S in slots]
    return KVCache(positions, layers, length, chunk)


def map_arrays(cache: KVCache, put: Callable[[Any, str], Any]) -> KVCache:
    """Applies `put(array, letters)` to every array of a cache, for example to constrain its sharding."""
    positions = {S: put(a, "BS") for S, a in cache.positions.items()}
    return replace(cache, positions=positions, layers=[{n: put(a, "BKSH") for n, a in w.items()} for w in cache.layers])


def slot_index(pos: Int[Array, "B T"], S: int, length: int) -> Int[Array, "B T"]:
    """The slot of each position in a ring buffer of S slots.

    Padding and positions past `length` get indices past the end, which a scatter drops. (A negative index would wrap.)
    The indices of a row are distinct, as `unique_indices` of the scatter requires.
    """
    outside = S + jnp.arange(pos.shape[1], dtype=pos.dtype)
    return jnp.where((pos < 0) | (pos >= length), outside, pos % S)


def advance(cache: KVCache, pos: Int[Array, "B T"]) -> tuple[KVCache, list[LayerCache]]:
    """Records the positions of tokens that are about to be written, once for all layers.

    Returns:
        The cache with these positions, and the `LayerCache` of each layer, whose keys and values are not written yet.

    Raises:
        ValueError: More tokens than `cache.chunk`.
    """
    if pos.shape[1] > cache.chunk:
        raise ValueError(
            f"{pos.shape[1]} tokens do not fit this KV cache, which has room for {cache.chunk} per call and "
            f"{cache.length} in total: create a larger one with init_kv(batch, length), or pass the tokens in chunks"
        )
    index = {S: slot_index(pos, a.shape[1], cache.length) for S, a in cache.positions.items()}
    # Writing at an earlier position (rewinding) clears the slots of later positions, so that the next call continues
    # after the newest token of each row.
    newest = jnp.where((pos >= 0).any(axis=1), pos.max(axis=1), cache.length)[:, None]
    cleared = {S: jnp.where(a > newest, -1, a) for S, a in cache.positions.items()}
    positions = {S: _by_row(_put_at, a, pos, index[S]) for S, a in cleared.items()}
    views = [LayerCache(w["k"], w["v"], index[S], positions[S]) for w in cache.layers for S in [str(w["k"].shape[2])]]
    return replace(cache, positions=positions), views


def write(cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerCache:
    """Writes keys and values to the slots of `index`, in the cache's dtype."""
    return cache._replace(k=_by_row(_put, cache.k, k, cache.index), v=_by_row(_put, cache.v, v, cache.index))


def _put(old: Float[Array, "K S H"], new: Float[Array, "T K H"], index: Int[Array, " T"]) -> Float[Array, "K S H"]:
    return old.at[:, index].set(new.swapaxes(0, 1).astype(old.dtype), mode="drop", unique_indices=True)


def _put_at(old: Int[Array, " S"], new: Int[Array, " T"], index: Int[Array, " T"]) -> Int[Array, " S"]:
    return old.at[index].set(new, mode="drop", unique_indices=True)


# With a vmap over the sharded rows, instead of another index of the scatter, a write needs no communication.
def _by_row(put: Callable[..., Array], *arrays: Array) -> Array:
    return jax.vmap(put)(*arrays)


def next_position(cache: KVCache) -> Int[Array, " B"]:
    """The position after the newest token of each row; 0 for an empty row."""
    return jnp.max(jnp.stack([a.max(axis=1) for a in cache.positions.values()]), axis=0) + 1


def insert(cache: KVCache, part: KVCache, rows: Int[Array, " b"]) -> KVCache:
    """Replaces rows of a cache, to add prefilled requests to the decoding batch (continuous batching).

    Args:
        cache: The target.
        part: A cache of b rows with any number of slots. If a ring buffer of the target is smaller, it gets the newest
            positions.
        rows: Row of the target for each row of `part`. Rows past the end are dropped.
    """
    positions, layers = dict(cache.positions), []
    for new, old in zip(cache.layers, part.layers, strict=True):
        S = new["k"].shape[2]
        stored = part.positions[str(old["k"].shape[2])]
        stored = jnp.where(stored > stored.max(axis=1, keepdims=True) - S, stored, -1)
        index = slot_index(stored, S, cache.length)
        cleared = cache.positions[str(S)].at[rows].set(-1, mode="drop")
        positions[str(S)] = cleared.at[rows[:, None], index].set(stored, mode="drop")
        # Axes 0 and 2 are indexed, so the values are [b,s,K,H].
        put = {n: new[n].at[rows[:, None], :, index].set(old[n].swapaxes(1, 2), mode="drop") for n in ("k", "v")}
        layers.append(put)
    return replace(cache, positions=positions, layers=layers)


def resize_cache(cache: KVCache, part: KVCache) -> KVCache:
    """Copies a cache into an empty, longer one with the same number of rows. Rows stay on their devices."""
    positions, layers = dict(cache.positions), []
    for new, old in zip(cache.layers, part.layers, strict=True):
        S, stored = new["k"].shape[2], part.positions[str(old["k"].shape[2])]
        index = slot_index(stored, S, cache.length)
        view = write(LayerCache(new["k"], new["v"], index, stored), old["k"].swapaxes(1, 2), old["v"].swapaxes(1, 2))
        positions[str(S)] = _by_row(_put_at, cache.positions[str(S)], stored, index)
        layers.append({"k": view.k, "v": view.v})
    return replace(cache, positions=positions, layers=layers)

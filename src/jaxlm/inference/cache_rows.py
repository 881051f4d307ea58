"""Rows of a KV cache: inserting prefilled requests into a batch, taking prefixes of new requests from it, and copying a
batch into a longer cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.devices import mesh
from jaxlm.nn.kv_cache import KVCache, put, slot_index


def insert(cache: KVCache, part: KVCache, rows: Int[Array, " b"]) -> KVCache:
    """Replaces rows of a cache, to add prefilled requests to the decoding batch (continuous batching).

    Args:
        cache: The target.
        part: A cache of b rows with any number of slots. If a ring buffer of the target is smaller, it gets the newest
            positions.
        rows: Row of the target for each row of `part`. Rows past the end are dropped.
    """
    positions, layers = dict(cache.positions), []
    for i, (new, old) in enumerate(zip(cache.layers, part.layers, strict=True)):
        S, stored = cache.slots(i), part.positions[str(part.slots(i))]
        stored = jnp.where(stored > stored.max(axis=1, keepdims=True) - S, stored, -1)
        index = slot_index(stored, S, cache.length)
        cleared = cache.positions[str(S)].at[rows].set(-1, mode="drop")
        positions[str(S)] = cleared.at[rows[:, None], index].set(stored, mode="drop")
        # On a mesh, the row of a slice may be on another device.
        slices = _same_slots(cache, part, i) and not mesh.active()
        put_rows = partial(_put_slices, rows=rows) if slices else partial(_put_slots, rows=rows, index=index)
        layers.append(jax.tree.map(put_rows, new, old))
    return replace(cache, positions=positions, layers=layers)


def take(part: KVCache, cache: KVCache, rows: Int[Array, " b"], keep: Int[Array, " b"]) -> KVCache:
    """Copies the first positions of some rows into a new cache: the prefixes of new requests.

    Args:
        part: An empty cache of b rows, of any length.
        cache: The cache of the batch, without ring buffers.
        rows: Row of `cache` for each row of `part`.
        keep: Number of positions to copy, at most the length of either cache. 0: none.
    """
    few = min(part.length, cache.length)
    slots = jnp.arange(few, dtype=jnp.int32)
    kept = jnp.where(slots < keep[:, None], slots, -1)
    positions = {S: _put_first(empty, kept) for S, empty in part.positions.items()}

    def copy(new: Array, old: Array) -> Array:  # zero behind the prefix: see `clear`
        first, is_kept = old[rows, :, :few], jnp.expand_dims(kept >= 0, (1, *range(3, old.ndim)))
        return _put_first(new, jnp.where(is_kept, first, 0).astype(new.dtype))

    layers = [jax.tree.map(copy, new, old) for new, old in zip(part.layers, cache.layers, strict=True)]
    return replace(part, positions=positions, layers=layers)


def clear(cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """Empties a row and sets its keys and values to zero. Slots with NaN would spoil the row although they are masked,
    because zero times NaN is NaN."""
    positions = {S: stored.at[row].set(-1) for S, stored in cache.positions.items()}
    return replace(cache, positions=positions, layers=jax.tree.map(lambda a: a.at[row].set(0), cache.layers))


def _same_slots(cache: KVCache, part: KVCache, layer: int) -> bool:
    """Whether every position of a layer of `part` has the same slot in `cache`."""
    few, many = part.slots(layer), cache.slots(layer)
    return part.length <= cache.length and few <= many and few in (part.length, many)


def _put_slices(old: Array, new: Array, rows: Int[Array, " b"]) -> Array:
    """Writes whole rows, each as one slice. XLA writes the slots of a scatter one by one."""

    new = new.astype(old.dtype)

    def put_row(i: Array, old: Array) -> Array:
        where = (rows[i], *(0,) * (old.ndim - 1))
        slice_ = jax.lax.dynamic_slice(old, where, (1, *new.shape[1:]))
        row = jnp.where(rows[i] < old.shape[0], jax.lax.dynamic_slice_in_dim(new, i, 1), slice_)
        return jax.lax.dynamic_update_slice(old, row, where)

    return jax.lax.fori_loop(0, len(rows), put_row, old)


def _put_slots(old: Array, new: Array, rows: Int[Array, " b"], index: Int[Array, "b s"]) -> Array:
    """Writes each slot of rows to the slots of `index`."""
    new = new.swapaxes(1, 2).astype(old.dtype)  # the indexed axes come first in the values
    return old.at[rows[:, None], :, index].set(new, mode="drop")


def resize_cache(cache: KVCache, part: KVCache) -> KVCache:
    """Copies a cache into an empty, longer one with the same number of rows. Rows stay on their devices."""
    positions, layers = dict(cache.positions), []
    for i, (new, old) in enumerate(zip(cache.layers, part.layers, strict=True)):
        S, stored = cache.slots(i), part.positions[str(part.slots(i))]
        index = slot_index(stored, S, cache.length)
        positions[str(S)] = put(cache.positions[str(S)], stored, index)
        copy = _put_first if _same_slots(cache, part, i) else partial(put, index=index, axis=2)
        layers.append(jax.tree.map(copy, new, old))
    return replace(cache, positions=positions, layers=layers)


def _put_first(old: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

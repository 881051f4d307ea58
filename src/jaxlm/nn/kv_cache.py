"""The KV cache: keys and values of earlier tokens, and the position of the token in each slot.

A full-attention layer stores position p in slot p. A sliding-window layer stores it in slot p % S of a ring buffer with
S = window + chunk - 1 slots, at most the length. Writing `chunk` tokens then does not overwrite positions that the
first of them attends to. The attention mask is computed from the stored positions. Layers with the same number of slots
share one array of positions. The slots of one head are contiguous, [B,K,S,H], as the batched products of attention need
them (docs/decisions.md).

Keys and values are arrays of floats, or a QuantizedKV in 8 bits (quantized_kv.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from jaxlm.devices import mesh
from jaxlm.nn import quantized_kv
from jaxlm.nn.quantized_kv import QuantizedKV


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "layers"], meta_fields=["length", "chunk"])
@dataclass(frozen=True)
class KVCache:
    """The KV cache of all layers, a pytree. `init` creates one.

    Keys are stored after RoPE. Instead of arrays, the leaves may be their shapes, shardings or letters.

    Attributes:
        positions: Position of the token in each slot, [B,S] int32, -1 if empty. One array for each number of slots that
            layers have, under the key str(S).
        layers: {"k", "v"} of each layer, [B,K,S,H], an array or a QuantizedKV.
        length: Maximum number of positions, 0 to length - 1.
        chunk: Maximum number of tokens per row and call.
    """

    positions: dict[str, Any]
    layers: list[dict[str, Any]]
    length: int
    chunk: int

    def slots(self, layer: int) -> int:
        """Number of slots of a layer."""
        return self.layers[layer]["k"].shape[2]

    @property
    def dtype(self) -> Any:
        """dtype of the stored keys and values."""
        return self.layers[0]["k"].dtype


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "index", "positions"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the KV cache during a call.

    Attributes:
        k, v: Keys and values [B,K,S,H], an array or a QuantizedKV.
        index: Slot of each token of the call [B,T].
        positions: Positions of all slots after these tokens are written [B,S].
    """

    k: Any
    v: Any
    index: Any
    positions: Any


def init(
    batch: int,
    length: int,
    windows: Sequence[int | None],
    K: int,
    H: int,
    dtype: Any,
    chunk: int | None,
) -> KVCache:
    """Creates an empty KV cache.

    Args:
        batch: Number of rows B.
        length: Maximum number of positions per row.
        windows: Sliding window of each layer; None for full attention.
        K: Number of kv heads.
        H: Head width.
        dtype: dtype of keys and values; int8 and float8_e4m3fn have a scale (quantized_kv.py).
        chunk: Maximum number of tokens per row and call. None: any number, for which every layer stores all `length`
            positions.
    """
    chunk = min(chunk or length, length)
    slots = slot_counts(length, windows, chunk)
    positions = {str(S): jnp.full((batch, S), -1, jnp.int32) for S in slots}
    layers = [{name: quantized_kv.empty((batch, K, S, H), dtype) for name in ("k", "v")} for S in slots]
    return KVCache(positions, layers, length, chunk)


@lru_cache(maxsize=32)
def allocator(over: Any, *sizes: Any) -> Callable[[], KVCache]:
    """A function that creates an empty KV cache on a mesh, of which each device allocates only its own shard, or on a
    device, committed to it, so that a jitted loop compiles once.

    Args:
        over: The mesh or the device.
        sizes: Arguments of `init`.
    """
    create = partial(init, *sizes)
    if isinstance(over, jax.Device):
        return jax.jit(create, out_shardings=SingleDeviceSharding(over))
    where = map_arrays(jax.eval_shape(create), lambda a, letters: mesh.sharding(letters, a.shape, over))
    return jax.jit(create, out_shardings=where)


def slot_counts(length: int, windows: Sequence[int | None], chunk: int) -> list[int]:
    """The number of slots of each layer."""
    return [length if window is None else min(length, window + chunk - 1) for window in windows]


def map_arrays(cache: KVCache, put: Callable[[Any, str], Any]) -> KVCache:
    """Applies `put(array, letters)` to every array of a cache, for example to constrain its sharding."""
    positions = {S: put(a, "BS") for S, a in cache.positions.items()}
    layers = [{name: _map_layer(a, put) for name, a in layer.items()} for layer in cache.layers]
    return replace(cache, positions=positions, layers=layers)


def _map_layer(stored: Any, put: Callable[[Any, str], Any]) -> Any:
    if isinstance(stored, QuantizedKV):
        return QuantizedKV(put(stored.values, "BKSH"), put(stored.scale, "BKS"))
    return put(stored, "BKSH")


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
    positions = {S: put(a, pos, index[S]) for S, a in cleared.items()}
    sizes = [str(cache.slots(i)) for i in range(len(cache.layers))]
    views = [LayerCache(w["k"], w["v"], index[S], positions[S]) for w, S in zip(cache.layers, sizes)]
    return replace(cache, positions=positions), views


def write(cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerCache:
    """Writes keys and values to the slots of `index`, in the cache's dtype."""

    def written(old: Any, new: Array) -> Any:
        heads: Any = new.swapaxes(1, 2)
        if isinstance(old, QuantizedKV):
            heads = quantized_kv.quantize(heads, old.dtype)
        return jax.tree.map(lambda old, new: put(old, new, cache.index, 2), old, heads)

    return replace(cache, k=written(cache.k, k), v=written(cache.v, v))


def put(old: Array, new: Array, index: Int[Array, "B T"], axis: int = 1) -> Array:
    """Writes each row's items to its slots. axis: that of the slots in `old`, and of the tokens in `new`."""

    def put_tokens(old: Array, new: Array, index: Array) -> Array:
        return old.at[index].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    # With a vmap over rows and heads, instead of more indices of the scatter, a write of sharded ones needs no
    # communication. Without one over heads, XLA on TPU turns the whole cache, and XLA on GPU writes a single row in two
    # kernels instead of one (with the RoPE of k).
    for _ in range(axis):
        put_tokens = jax.vmap(put_tokens)
    index = jnp.broadcast_to(jnp.expand_dims(index, range(1, axis)), (*old.shape[:axis], index.shape[1]))
    return put_tokens(old, new, index)

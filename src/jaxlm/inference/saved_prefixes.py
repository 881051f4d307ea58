"""The prefix cache on disk: a safetensors file with the tokens, keys and values of rows that have no request.

The file belongs to one model, because keys and values depend on its weights (`weights_digest`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint import safetensors, writer
from jaxlm.checkpoint.atomic import staged_file
from jaxlm.checkpoint.safetensors import DTYPES, Tensor
from jaxlm.devices import mesh
from jaxlm.inference.scheduler import Scheduler
from jaxlm.nn import quantized_kv
from jaxlm.nn.kv_cache import KVCache
from jaxlm.nn.linear import WeightForm
from jaxlm.nn.quantized_kv import QuantizedKV

if TYPE_CHECKING:
    from jaxlm.model import Model

DIGEST = "weights_digest"  # [32] bytes
ADAPTERS = "adapters"  # index of the adapter of each row, [rows] int32
TOKENS = "{}.tokens"  # of a row: [n] int32
LAYER = "{}.layers.{}.{}"  # of a row and a layer, "k" or "v" [K,n,H], in 8 bits also "k_scale" or "v_scale" [K,n]
# Types in the file, and the arrays that they are read into. Those of float8 have the bits.
TYPES = {**DTYPES, "I8": np.dtype(np.int8), "F8_E4M3": np.dtype(np.uint8)}
KINDS = {dtype: kind for kind, dtype in TYPES.items()}
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "F8_E4M3": "fp8"}  # kv_dtype
PRIMES = (2654435761, 2246822519, 3266489917, 668265263)  # large odd numbers, one for each axis


def save(scheduler: Scheduler, path: Path) -> int:
    """Writes the cached prefixes, in the order in which they were last used.

    Returns:
        The number of tokens.
    """
    entries = [writer.Entry(DIGEST, "U8", (32,), lambda: [weights_digest(scheduler.model)])]
    cached = [(row, slot) for row, slot in enumerate(scheduler.rows) if slot.request is None and len(slot.ids)]
    cached.sort(key=lambda item: item[1].used)
    adapters = np.array([slot.adapter for _, slot in cached], np.int32)
    entries.append(writer.Entry(ADAPTERS, "I32", adapters.shape, lambda: [adapters.view(np.uint8)]))
    for number, (row, slot) in enumerate(cached):
        assert scheduler.state is not None
        n, ids = len(slot.ids), slot.ids
        entries.append(writer.Entry(TOKENS.format(number), "I32", (n,), lambda ids=ids: [ids.view(np.uint8)]))
        for layer, stored in enumerate(scheduler.state.kv.layers):
            for name, array in _named_arrays(stored).items():
                kept = np.ascontiguousarray(np.asarray(array[row])[:, :n])
                kind, bits = KINDS[kept.dtype], kept.reshape(-1).view(np.uint8)
                path_of = LAYER.format(number, layer, name)
                entries.append(writer.Entry(path_of, kind, kept.shape, lambda bits=bits: [bits]))
    with staged_file(path, sum(entry.nbytes for entry in entries)) as file:
        writer.write_safetensors(file, entries, lambda nbytes: None)
    return sum(len(slot.ids) for _, slot in cached)


def load(scheduler: Scheduler, path: Path) -> int:
    """Reads prefixes into free rows. If there are fewer rows, the prefixes used last are read. Of a prefix that is too
    long, the beginning is read.

    Returns:
        The number of tokens.

    Raises:
        ValueError: The file is damaged, is not a prefix cache, or belongs to another model or another kv_dtype.
    """
    tensors = safetensors.read_header(path)
    if DIGEST not in tensors:
        raise ValueError(f"{path} is not a prefix cache (Engine.save_prefix_cache)")
    model, total = scheduler.model, 0
    if _read(tensors[DIGEST], np.dtype(np.uint8)).tobytes() != weights_digest(model).tobytes():
        raise ValueError(f"{path} was saved with other weights, or another dtype, than those of {model.source}")
    saved = sum(name.endswith(TOKENS.format("")) for name in tensors)
    expected = [ADAPTERS, *(TOKENS.format(n) for n in range(saved))]
    first, own = tensors.get(LAYER.format(0, 0, "k")), quantized_kv.name_of(model.cache_dtype)
    if first is not None and (other := NAMES.get(first.dtype)) != own:
        raise ValueError(f"{path} was saved from a KV cache in {other}, and that of this engine is {own}: load the "
                         f"model with kv_dtype={other!r} (--kv-dtype {other})")  # fmt: skip
    names = ("k", "v", "k_scale", "v_scale") if model.cache_dtype in quantized_kv.LARGEST else ("k", "v")
    expected += [LAYER.format(n, i, name) for n in range(saved) for i in range(model.config.L) for name in names]
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{path} lacks {safetensors.listed(missing)}: save it again")
    adapters = _read(tensors[ADAPTERS], np.dtype(np.int32))
    free = sum(slot.request is None for slot in scheduler.rows)
    for number in range(max(0, saved - free), saved):
        ids = _read(tensors[TOKENS.format(number)], np.dtype(np.int32))[: scheduler.lengths.prefill[-1] - 1]
        layers = []
        for layer in range(model.config.L):
            found = {name: tensors[LAYER.format(number, layer, name)] for name in names}
            layers.append({name: _read(tensor, TYPES[tensor.dtype])[:, : len(ids)] for name, tensor in found.items()})
        scheduler.store_prefix(ids, int(adapters[number]), _kv_cache(scheduler, len(ids), layers))
        total += len(ids)
    return total


def weights_digest(model: "Model") -> np.ndarray:
    """A digest of the config, of the static fields of weight forms, such as the scale of an adapter, and of type, shape
    and a checksum of each weight; [32] bytes."""
    leaves = jax.tree.leaves(model.weights)
    described = (model.config, [*_static_fields(model.weights)], [(leaf.shape, str(leaf.dtype)) for leaf in leaves])
    digest = hashlib.sha256(repr(described).encode())
    for value in jax.device_get(jax.jit(lambda leaves: [_checksum(leaf) for leaf in leaves])(leaves)):
        digest.update(value.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _static_fields(weights: Any) -> Iterator[Any]:
    """The static fields of weight forms, also of those within others, such as a quantized weight with an adapter."""
    for form in filter(_is_form, jax.tree.leaves(weights, is_leaf=_is_form)):
        for each in fields(form):
            value = getattr(form, each.name)
            yield from [value] if each.metadata.get("static") else _static_fields(value)


def _is_form(leaf: Any) -> bool:
    return isinstance(leaf, WeightForm)


def _checksum(a: jax.Array) -> jax.Array:
    """A sum of all elements, as the integers of their bits, modulo 2^32. The factor depends on the position."""
    unsigned = f"uint{8 * a.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(a, unsigned) if jnp.issubdtype(a.dtype, jnp.floating) else a
    factor = jnp.uint32(1)
    for axis in range(a.ndim):
        factor += jnp.uint32(PRIMES[axis]) * jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)


def _named_arrays(stored: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a layer's KV cache by their names in the file."""
    arrays: dict[str, Any] = {}
    for name, of in stored.items():
        arrays |= {name: of.values, f"{name}_scale": of.scale} if isinstance(of, QuantizedKV) else {name: of}
    return arrays


def _kv_cache(scheduler: Scheduler, n: int, layers: list[dict[str, np.ndarray]]) -> KVCache:
    """A KV cache with n positions of a prefix in its first row. layers: the named arrays of each layer."""
    model, rows = scheduler.model, mesh.round_up_batch(1, scheduler.model.mesh)
    length = next(length for length in scheduler.lengths.prefill if length >= n)
    kv = model.init_kv(rows, length)

    def filled(empty: jax.Array, values: np.ndarray) -> jax.Array:
        array = np.zeros(empty.shape, empty.dtype)
        array[:, :, :n] = values
        return jax.device_put(array, empty.sharding)

    pos = np.where(np.arange(length) < n, np.arange(length, dtype=np.int32), np.int32(-1))
    positions = {S: jax.device_put(np.tile(pos, (rows, 1)), empty.sharding) for S, empty in kv.positions.items()}
    stored = [
        {name: QuantizedKV(of[name], of[f"{name}_scale"]) if f"{name}_scale" in of else of[name] for name in ("k", "v")}
        for of in layers
    ]
    return replace(kv, positions=positions, layers=jax.tree.map(filled, kv.layers, stored))


def _read(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """A tensor of the file."""
    buffer = np.empty(tensor.nbytes, np.uint8)
    safetensors.read_into(buffer, tensor, 0)
    return buffer.view(dtype).reshape(tensor.shape)

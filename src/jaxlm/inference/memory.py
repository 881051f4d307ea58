"""Estimates the memory of KV caches, and checks that they fit before anything is allocated."""

from functools import partial
from typing import TYPE_CHECKING

import jax

from jaxlm.devices import hardware, mesh
from jaxlm.inference import engine
from jaxlm.nn import kv_cache, params

if TYPE_CHECKING:
    from jaxlm.model import Model


def check_memory(model: "Model", requests: list[engine.Request], slots: int) -> engine.CacheLengths:
    """Checks that the KV caches of a batch fit in device memory, and chooses their lengths.

    Args:
        model: The model.
        requests: All requests.
        slots: Batch size.

    Returns:
        The lengths that are shared by the most prompts, if they fit, else the shortest ones.

    Raises:
        MemoryError: The shortest lengths do not fit; the message has a batch size that does.
    """
    free = hardware.available_memory(model.device)
    shards, _ = memories(model)  # the rows are divided over them
    rows = -(-slots // shards)
    lengths = engine.cache_lengths(requests, slots, model.config.context)
    if free is None or rows * row_bytes(model, lengths) <= free:
        return lengths
    shortest = engine.shortest_cache_lengths(requests, model.config.context)
    row = row_bytes(model, shortest)
    hint = "use a shorter prompt or fewer max_tokens (--max-tokens)"
    if row <= free:
        batch = shards * (free // row)
        hint = f"use batch_size={batch} (--batch-size {batch}), or " + hint
    longest = max(len(r.ids) + r.max_tokens for r in requests)
    hardware.require(rows * row, model.device, f"{slots} sequences of {longest:,} tokens", hint)
    return shortest


def row_bytes(model: "Model", lengths: engine.CacheLengths) -> int:
    """Bytes of one row at the peak, when two KV caches exist: the longest, and that of new prompts or (while the cache
    grows) the previous one."""
    others = [cache_bytes(model, lengths.prefill[-1], None)]
    others += [cache_bytes(model, length, 1) for length in lengths.decode[:-1]]
    return cache_bytes(model, lengths.decode[-1], 1) + max(others)


def cache_bytes(model: "Model", length: int, chunk: int | None) -> int:
    """Bytes per device of a KV cache of one row and this length, written in chunks of `chunk` tokens."""
    cfg, platform = model.config, model.device.platform
    dtype = hardware.cache_dtype(model.dtype, platform)
    make = partial(kv_cache.init, 1, length, cfg.windows, cfg.K, cfg.H, dtype, chunk or hardware.CHUNK[platform])
    return params.nbytes(jax.eval_shape(make)) // memories(model)[1]


def memories(model: "Model") -> tuple[int, int]:
    """The number of device memories that rows and kv heads are divided over. Virtual CPU devices share one memory."""
    over = None if model.device.platform == "cpu" else model.mesh
    return (1, 1) if over is None else (over.shape[mesh.DATA], mesh.num_shards("K", (model.config.K,), over))


def kv_bytes(model: "Model", length: int) -> int:
    """Bytes of the KV cache that a decoding step reads for a sequence of `length` tokens."""
    cfg = model.config
    slots = sum(length if window is None else min(length, window) for window in cfg.windows)
    return 2 * slots * cfg.K * cfg.H * hardware.cache_dtype(model.dtype, model.device.platform).itemsize

"""Memory of KV caches: what a request needs and what fits, before anything is allocated."""

from functools import partial
from typing import TYPE_CHECKING

import jax

from jaxlm.devices import hardware, mesh
from jaxlm.inference import decoding, engine
from jaxlm.nn import params

if TYPE_CHECKING:
    from jaxlm.model import Model


def check_memory(model: "Model", requests: list[engine.Request], slots: int) -> None:
    """Raises MemoryError for a KV cache that does not fit, with the batch size that would."""
    longest = max(len(r.ids) + r.max_tokens for r in requests)
    prompts = cache_bytes(model, max(len(r.ids) for r in requests), None)
    # Besides the cache at its longest there is the one of new prompts or, while it grows, the one that it was.
    before = [cache_bytes(model, length, 1) for length in engine.cache_lengths(requests)[:-1]]
    row = cache_bytes(model, longest, 1) + max([prompts, *before])
    free = hardware.available_memory(model.device)
    fits = "use a shorter prompt or fewer max_tokens (--max-tokens)"
    copies, _ = memories(model)  # each holds its share of the rows
    if free is not None and row <= free:
        some = copies * (free // row)
        fits = f"{some} at a time would fit (batch_size={some}, --batch-size {some}), or " + fits
    hardware.require(-(-slots // copies) * row, model.device, f"{slots} sequences of {longest:,} tokens", fits)


def cache_bytes(model: "Model", length: int, chunk: int | None) -> int:
    """Bytes on one device of the KV cache of one sequence of `length` tokens, of which `chunk` are written at once."""
    make = partial(model.init_kv, 1, decoding.bucket(length), chunk=chunk or hardware.CHUNK[model.device.platform])
    return params.nbytes(jax.eval_shape(make)) // memories(model)[1]


def memories(model: "Model") -> tuple[int, int]:
    """The number of device memories that rows are divided over, and kv heads. Virtual CPU devices share one memory."""
    over = None if model.device.platform == "cpu" else model.mesh
    return (1, 1) if over is None else (over.shape[mesh.DATA], mesh.num_shards("K", (model.config.K,), over))


def kv_bytes(model: "Model", length: int) -> int:
    """Bytes of the KV cache that a decoding step reads for a sequence of `length` tokens."""
    cfg = model.config
    slots = sum(length if window is None else min(length, window) for window in cfg.windows)
    return 2 * slots * cfg.K * cfg.H * hardware.cache_dtype(model.dtype, model.device.platform).itemsize

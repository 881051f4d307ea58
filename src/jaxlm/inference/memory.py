"""How much memory KV caches take, and what fits, before anything is allocated."""

from functools import partial
from typing import TYPE_CHECKING

import jax

from jaxlm.devices import hardware, mesh
from jaxlm.inference import decoding, engine
from jaxlm.nn import params

if TYPE_CHECKING:
    from jaxlm.model import Model


def check_memory(model: "Model", requests: list[engine.Request], slots: int) -> None:
    """Refuses a cache that cannot be allocated, and says what could."""
    longest = max(len(r.ids) + r.max_tokens for r in requests)
    prompts = cache_bytes(model, max(len(r.ids) for r in requests), None)
    # Beside the cache at its longest there is that of new prompts, or while it grows the one that it was.
    before = [cache_bytes(model, length, 1) for length in engine.cache_lengths(requests)[:-1]]
    row = cache_bytes(model, longest, 1) + max([prompts, *before])
    free = hardware.available_memory(model.device)
    fits = "use a shorter prompt or fewer max_tokens (--max-tokens)"
    copies, _ = memories(model)  # each takes its part of the rows
    if free is not None and row <= free:
        some = copies * (free // row)
        fits = f"{some} at a time would fit (batch_size={some}, --batch-size {some}), or " + fits
    hardware.require(-(-slots // copies) * row, model.device, f"{slots} sequences of {longest:,} tokens", fits)


def cache_bytes(model: "Model", length: int, chunk: int | None) -> int:
    """Bytes on one device of the cache that is made for one sequence of `length` tokens, `chunk` written at once."""
    make = partial(model.init_kv, 1, decoding.bucket(length), chunk=chunk or hardware.CHUNK[model.device.platform])
    return params.nbytes(jax.eval_shape(make)) // memories(model)[1]


def memories(model: "Model") -> tuple[int, int]:
    """Over how many memories rows are divided, and kv heads. Virtual devices of a CPU share one."""
    over = None if model.device.platform == "cpu" else model.mesh
    return (1, 1) if over is None else (over.shape[mesh.DATA], mesh.num_shards("K", (model.config.K,), over))


def kv_bytes(model: "Model", length: int) -> int:
    """Bytes that a decoding step reads of a sequence of `length` tokens."""
    cfg = model.config
    slots = sum(length if window is None else min(length, window) for window in cfg.windows)
    return 2 * slots * cfg.K * cfg.H * hardware.cache_dtype(model.dtype, model.device.platform).itemsize

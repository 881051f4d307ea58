"""The lengths of KV caches, their memory, and whether they fit before anything is allocated."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax

from jaxlm.devices import distributed, hardware, mesh
from jaxlm.inference import decoding, roofline
from jaxlm.inference.requests import Request
from jaxlm.nn import kv_cache, params, quantized_kv

if TYPE_CHECKING:
    from jaxlm.model import Model

# Prompts that are prefilled together, at most. More would compile more programs. Chunks have as many tokens in all.
MAX_JOINING = 16
HEADROOM = 512  # slots of a new KV cache beyond the longest prompt, if memory is scarce
# Otherwise it has slots for the longest prompt and this number of tokens at least, unless max_tokens is smaller.
LEAST_HEADROOM = 64
# Slots of the smallest KV cache: per row at least, at most, and of all rows together. More slots are shared by more
# prompts and max_tokens. Fewer are less work on accelerators, where a decoding step reads all slots.
SMALLEST_CACHE = (64, 1024, 4096)
PREFILL_CACHE = 512  # slots of the smallest KV cache of a prompt, of which prefill on accelerators reads all


class CacheLengths(NamedTuple):
    """Lengths of the KV caches of a batch, in ascending order. A cache takes the first length that is enough.

    Attributes:
        prefill: Of prompts before they are inserted.
        decode: Of the batch. The last one fits all tokens.
    """

    prefill: list[int]
    decode: list[int]


def cache_lengths(requests: Sequence[Request], slots: int, context: int) -> CacheLengths:
    """Lengths of the KV caches of `slots` rows: the smallest ones and their doubles, at most the context length."""
    prompt, total = max(len(r.ids) for r in requests), max(len(r.ids) + r.max_tokens for r in requests)
    least, most, of_all_rows = SMALLEST_CACHE
    smallest = least
    while 2 * smallest <= min(most, of_all_rows // slots):
        smallest *= 2

    def doubled(length: int, needed: int) -> list[int]:
        lengths = [length]
        while lengths[-1] < needed:
            lengths.append(2 * lengths[-1])
        return [min(length, max(context, total)) for length in lengths]

    decode = doubled(smallest, total)
    first = min(prompt + LEAST_HEADROOM, total)
    return CacheLengths(doubled(min(smallest, PREFILL_CACHE), prompt), [length for length in decode if length >= first])


def few_cache_lengths(length: int) -> CacheLengths:
    """Lengths of the KV caches of an engine that takes all requests up to a length. They are further apart, because the
    programs of all of them are compiled (Engine.prepare)."""
    prefill, decode = [min(PREFILL_CACHE, length)], [min(PREFILL_CACHE, length)]
    while prefill[-1] < length:
        prefill.append(min(4 * prefill[-1], length))
    while decode[-1] < length:
        decode.append(min(2 * decode[-1], length))
    return CacheLengths(prefill, decode)


def shortest_cache_lengths(requests: Sequence[Request], context: int) -> CacheLengths:
    """Lengths of KV caches that take less memory than those of `cache_lengths`, but are shared by fewer prompts and
    max_tokens. The batch starts with slots for the prompts and HEADROOM tokens; the last length is not doubled."""
    total = max(len(r.ids) + r.max_tokens for r in requests)
    longest = min(decoding.bucket(total), max(context, total))
    lengths = [decoding.bucket(max(len(r.ids) for r in requests) + HEADROOM)]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    return CacheLengths(sorted({decoding.bucket(len(r.ids)) for r in requests}), [*lengths[:-1], longest])


def check_memory(model: "Model", requests: Sequence[Request], slots: int, rings: bool = True) -> CacheLengths:
    """Checks that the KV caches of a batch fit in device memory, and chooses their lengths.

    Args:
        model: The model.
        requests: All requests.
        slots: Batch size.
        rings: Whether sliding-window layers have ring buffers.

    Returns:
        The lengths that are shared by the most prompts, if they fit, else the shortest ones.

    Raises:
        MemoryError: The shortest lengths do not fit; the message has a batch size that does.
    """
    free, longest = hardware.available_memory(model.device), max(len(r.ids) + r.max_tokens for r in requests)

    def needed(slots: int, lengths: CacheLengths) -> int:
        return kv_memory(model, slots, lengths, rings) + temporary_bytes(model, slots, longest)

    lengths = cache_lengths(requests, slots, model.config.context)
    if free is None or needed(slots, lengths) <= free:
        return lengths
    shortest = shortest_cache_lengths(requests, model.config.context)
    hint = "use a shorter prompt or fewer max_tokens (--max-tokens)"
    if batch := next((n for n in range(slots - 1, 0, -1) if needed(n, shortest) <= free), None):
        hint = f"use batch_size={batch} (--batch-size {batch}), or " + hint
    hardware.require(needed(slots, shortest), model.device, f"{slots} sequences of {longest:,} tokens", hint)
    return shortest


def plan_lengths(model: "Model", slots: int, length: int | None, rings: bool) -> CacheLengths:
    """The lengths of the KV caches of an engine that does not know its requests.

    Args:
        model: The model.
        slots: Number of rows.
        length: Maximum number of tokens of a request and its answer. None: the context length, halved until it fits.
        rings: Whether sliding-window layers have ring buffers.

    Raises:
        MemoryError: They do not fit.
        ValueError: The length is less than 1 or exceeds the context length.
    """
    context = model.config.context
    if length is not None and not 1 <= length <= context:
        raise ValueError(f"length={length:,}: must be 1 to {context:,}, the context length of {model.source}")
    free = hardware.available_memory(model.device)
    most = length or context
    while True:
        lengths = few_cache_lengths(most)
        needed = kv_memory(model, slots, lengths, rings) + temporary_bytes(model, slots, most)
        if free is None or needed <= free:
            break
        if length is not None or most < PREFILL_CACHE:
            hint = "use fewer slots, a shorter length or a smaller model"
            hardware.require(needed, model.device, f"{slots} sequences of {most:,} tokens", hint)
        most //= 2
    if model.is_multiprocess:  # that of the process with the least memory
        lengths = few_cache_lengths(min(int(each) for each in distributed.gather(str(most))))
    return lengths


def kv_memory(model: "Model", slots: int, lengths: CacheLengths, rings: bool = True) -> int:
    """Bytes per device of the KV caches at the peak, when three of them exist: that of new prompts, and while the cache
    of the batch grows to its longest length, the previous one."""
    shards, _ = memories(model)
    rows, prompts = (-(-n // shards) for n in (slots, roofline.prefill_rows(min(slots, MAX_JOINING), shards)))

    def size(length: int, chunk: int) -> int:
        return cache_bytes(model, length, chunk if rings else length)

    batch = sum(size(length, 1) for length in lengths.decode[-2:])
    return rows * batch + prompts * size(lengths.prefill[-1], hardware.CHUNK[model.device.platform])


def cache_bytes(model: "Model", length: int, chunk: int) -> int:
    """Bytes per device of a KV cache of one row and this length, written in chunks of `chunk` tokens."""
    cfg = model.config
    make = partial(kv_cache.init, 1, length, cfg.windows, cfg.K, cfg.H, model.cache_dtype, chunk)
    return params.nbytes(jax.eval_shape(make)) // memories(model)[1]


def temporary_bytes(model: "Model", slots: int, length: int) -> int:
    """Bytes per device of the temporary arrays of prefill and decode, whichever has more; an estimate."""
    platform, shape = model.device.platform, {} if model.mesh is None else dict(model.mesh.shape)
    data = 1 if platform == "cpu" else shape.get(mesh.DATA, 1)
    tensor = 1 if platform == "cpu" else math.prod(shape.values()) // data
    sizes, kv_dtype = {"data": data, "model": tensor}, model.cache_dtype
    of = roofline.layout(model.family.PARAMS, model.config, sizes, model.dtype.itemsize, kv_dtype=kv_dtype)
    programs = (("decode", slots), ("prefill", roofline.prefill_rows(slots, data)))
    return max(roofline.temporaries(of, platform, rows, length, name) for name, rows in programs)


def memories(model: "Model") -> tuple[int, int]:
    """The number of device memories that rows and kv heads are divided over. Virtual CPU devices share one memory."""
    over = None if model.device.platform == "cpu" else model.mesh
    return (1, 1) if over is None else (over.shape[mesh.DATA], mesh.num_shards("K", (model.config.K,), over))


def kv_bytes(model: "Model", length: int) -> int:
    """Bytes of the KV cache that a decoding step reads for a sequence of `length` tokens."""
    cfg = model.config
    slots = sum(length if window is None else min(length, window) for window in cfg.windows)
    return 2 * slots * cfg.K * quantized_kv.head_bytes(model.cache_dtype, cfg.H)

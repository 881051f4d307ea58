"""Continuous batching: requests share the rows of one batch, and the row of a finished request is reused for the next.

The host dispatches a program before it fetches the tokens of the previous one, so the device does not wait for the
host, except after a prefill, whose tokens are fetched at once. The end of a request is therefore detected one program
late, and the tokens generated in between are dropped.

Programs are compiled for the lengths of the KV caches and of the chunks of a prompt. Both take few values, which do not
depend on the prompt and on max_tokens unless these are long (cache_lengths, decoding.chunks), so that another prompt
compiles nothing. The KV cache doubles when a row reaches its end: most answers are shorter than max_tokens, and on
accelerators the cost of a decoding step grows with the length of the cache.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import hardware, mesh
from jaxlm.inference import decoding, sampling
from jaxlm.inference.decoding import CompiledSteps
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.nn import kv_cache as caches

if TYPE_CHECKING:
    from jaxlm.model import Model


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


@dataclass
class Request:
    """One prompt with its sampling parameters. The engine sets `finished`; a caller can set it to end the request."""

    ids: list[int]
    options: SamplingParams  # resolved: every field has a value
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    key: Any = None  # typed PRNG key
    finished: str | None = None  # "stop" or "length"
    generated: int = 0  # tokens so far
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0  # time of the first token


class Logprobs(NamedTuple):
    """Log-probabilities (in nats) under the raw logits: of the token, and of the most likely tokens (id, value)."""

    chosen: float
    top: list[tuple[int, float]]


class Token(NamedTuple):
    """A generated token of request number `index`."""

    index: int
    id: int
    logprobs: Logprobs | None


@dataclass
class _Row:
    request: int
    pos: int  # position of the last token that was dispatched
    left: int  # number of tokens that remain to be dispatched


def run(
    steps: CompiledSteps, requests: Sequence[Request], slots: int, lengths: CacheLengths | None = None
) -> Iterator[Token]:
    """Decodes all requests. Free rows take the next waiting request and others in its length bucket (16, 24, 32, 48, …
    tokens: decoding.bucket), which `admit` prefills together, padded to the same chunks.

    Args:
        steps: The compiled functions of the model.
        requests: The requests.
        slots: Number of rows: how many requests are decoded together (batch size).
        lengths: Lengths of the KV caches, cache_lengths by default.

    Yields:
        The tokens of all requests as they are generated, including stop tokens.

    Raises:
        ValueError: The logits are NaN or Inf.
    """
    model = steps.model
    slots = mesh.round_up_batch(min(slots, len(requests)), model.mesh)
    waiting = deque(range(len(requests)))
    rows: list[_Row | None] = [None] * slots
    in_flight: deque[tuple[decoding.StepOutput, list[tuple[int, int]]]] = deque()
    lengths = lengths or cache_lengths(requests, slots, model.config.context)
    state, k = empty_state(model, requests, slots, lengths.decode[0])
    n = hardware.STEPS[model.device.platform]
    while True:
        rows = _drop_finished(rows, requests)
        free = [i for i, row in enumerate(rows) if row is None]
        if waiting and free:
            batch = _same_bucket(waiting, requests, len(free))
            joining = [requests[i] for i in batch]
            where, part, output = admit(steps, joining, free[: len(batch)], state, k, lengths.prefill)
            for row, request in zip(free, batch):
                rows[row] = _Row(request, len(requests[request].ids), requests[request].max_tokens - 1)
            in_flight.append((output, list(enumerate(batch))))
            while in_flight:  # yield the first token immediately, not after the next program
                yield from fetch_tokens(requests, *in_flight.popleft())
            decode = (
                [partial(steps.step, k, n, decoding.shapes(state))] if any(row and row.left for row in rows) else []
            )
            steps.expect(*decode, *small_prefills(steps, part.kv))
            state = steps.insert(state, where, part)
            rows = _drop_finished(rows, requests)
        busy = [(i, row) for i, row in enumerate(rows) if row is not None and row.left > 0]
        if busy:
            last = max(row.pos + min(n, row.left) for _, row in busy)  # later tokens of the program are dropped
            if last > state.kv.length:
                longer = next(length for length in lengths.decode if length >= last)
                state = state._replace(kv=resize_cache(steps, state.kv, longer, 1))
            state, output = steps.step(k, n, state)
            in_flight.append((output, [(i, row.request) for i, row in busy]))
            for _, row in busy:
                row.pos, row.left = row.pos + n, row.left - n
        if len(in_flight) > 1 or (in_flight and not busy):
            yield from fetch_tokens(requests, *in_flight.popleft())
        elif not in_flight and not waiting:
            return


def _same_bucket(waiting: deque[int], requests: Sequence[Request], most: int) -> list[int]:
    """Removes from `waiting`, and returns, the next request and others in its length bucket. A batch is padded to its
    longest prompt."""
    size = decoding.bucket(len(requests[waiting[0]].ids))
    batch = [i for i in waiting if decoding.bucket(len(requests[i].ids)) == size][:most]
    for i in batch:
        waiting.remove(i)
    return batch


def _drop_finished(rows: list[_Row | None], requests: Sequence[Request]) -> list[_Row | None]:
    """The rows, with None for finished requests."""
    return [row if row is not None and not requests[row.request].finished else None for row in rows]


def fetch_tokens(
    requests: Sequence[Request], output: decoding.StepOutput, where: list[tuple[int, int]]
) -> Iterator[Token]:
    """Copies tokens to the host and yields them. Tokens after the end of a request are dropped.

    Args:
        requests: All requests.
        output: The output of a program.
        where: Pairs of a row and the index of its request.

    Raises:
        ValueError: The logits are NaN or Inf.
    """
    tokens, logprobs = jax.device_get(output)
    for n in range(tokens.shape[0]):
        for row, index in where:
            request = requests[index]
            if request.finished:
                continue
            token = int(tokens[n, row])
            if token == decoding.NOT_FINITE:
                raise ValueError(
                    "the logits are not finite (NaN or Inf): the weights are not finite, or their dtype overflows. Try "
                    "dtype='float32' (--dtype float32)"
                )
            request.generated += 1
            request.first = request.first or time.perf_counter()
            if token in request.stop_ids:
                request.finished = "stop"
            elif request.generated >= request.max_tokens:
                request.finished = "length"
            yield Token(index, token, None if logprobs is None else _logprobs(*(a[n, row] for a in logprobs)))


def _logprobs(chosen: np.ndarray, ids: np.ndarray, values: np.ndarray) -> Logprobs:
    return Logprobs(float(chosen), [(int(i), float(v)) for i, v in zip(ids, values)])


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


def shortest_cache_lengths(requests: Sequence[Request], context: int) -> CacheLengths:
    """Lengths of KV caches that take less memory than those of `cache_lengths`, but are shared by fewer prompts and
    max_tokens. The batch starts with slots for the prompts and HEADROOM tokens; the last length is not doubled."""
    total = max(len(r.ids) + r.max_tokens for r in requests)
    longest = min(decoding.bucket(total), max(context, total))
    lengths = [decoding.bucket(max(len(r.ids) for r in requests) + HEADROOM)]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    return CacheLengths(sorted({decoding.bucket(len(r.ids)) for r in requests}), [*lengths[:-1], longest])


def resize_cache(steps: CompiledSteps, kv: caches.KVCache, length: int, chunk: int) -> caches.KVCache:
    """Copies a KV cache into a new one of this length."""
    rows = next(iter(kv.positions.values())).shape[0]
    return steps.resize_cache(steps.model.init_kv(rows, length, chunk=chunk), kv)


def empty_state(
    model: "Model", requests: Sequence[Request], slots: int, length: int
) -> tuple[decoding.State, int | None]:
    """A state of empty rows with a KV cache of this length, and the number of top log-probabilities to return."""
    logprobs = [r.options.logprobs for r in requests if r.options.logprobs is not None]
    kv = model.init_kv(slots, length, chunk=1)
    empty = [Request([], DEFAULT_PARAMS, 1, key=requests[0].key)] * slots
    return new_rows(model, empty, kv, optional(requests)), max(logprobs) if logprobs else None


DEFAULT_PARAMS = SamplingParams().resolve({})


class Optionals(NamedTuple):
    """Which optional arrays the state of a batch has, because at least one request needs them."""

    counts: bool
    bias: bool


def optional(requests: Sequence[Request]) -> Optionals:
    return Optionals(any(r.options.penalized for r in requests), any(r.options.logit_bias for r in requests))


def new_rows(model: "Model", requests: Sequence[Request], kv: Any, shared: Optionals) -> decoding.State:
    """The state of these requests before their first token."""
    V = model.config.V
    counts = bias = None
    if shared.counts:
        counts = sampling.count_prompts([r.ids for r in requests], V)
    if shared.bias:
        rows = sampling.bias_of([r.options.logit_bias for r in requests], V)
        bias = jax.device_put(np.zeros((len(requests), V), np.float32) if rows is None else rows)
    state = decoding.State(
        kv=None,
        token=jax.device_put(np.zeros(len(requests), np.int32)),
        pos=jax.device_put(np.array([len(r.ids) - 1 for r in requests], np.int32)),
        keys=jnp.stack([r.key for r in requests]),
        sampling=sampling.Sampling.of([r.options for r in requests]),
        counts=counts,
        bias=bias,
    )
    return decoding.constrain_state(
        state, lambda a, letters: mesh.place(a, letters, model.mesh or model.device)
    )._replace(kv=kv)


def admit(
    steps: CompiledSteps,
    requests: list[Request],
    rows: list[int],
    state: decoding.State,
    k: int | None,
    lengths: list[int],
) -> Any:
    """Prefills requests as one batch and samples their first tokens.

    Args:
        steps: The compiled functions of the model.
        requests: The requests.
        rows: The row of the state for each request.
        state: The state of the batch.
        k: Number of top log-probabilities.
        lengths: CacheLengths.prefill.

    Returns:
        Rows of the state, the new rows to insert there, and the first tokens.
    """
    model = steps.model
    # Batch sizes are powers of two, so that few programs are compiled. Padding rows repeat the last request; `insert`
    # drops them.
    b = mesh.round_up_batch(1 << (len(requests) - 1).bit_length(), model.mesh)
    padded = requests + [requests[-1]] * (b - len(requests))
    target = rows + [state.pos.shape[0]] * (b - len(requests))
    length = next(length for length in lengths if length >= max(len(r.ids) for r in requests))
    kv = model.init_kv(b, length, chunk=decoding.chunk_sizes(model.device.platform, b)[0])
    last = no_hidden_state(model, b)
    # The KV cache is not an argument of `sample_token`, which is compiled once for all prompt lengths.
    part = new_rows(model, padded, None, Optionals(state.counts is not None, state.bias is not None))
    where = mesh.place(np.array(target, np.int32), "", model.mesh or model.device)
    then = partial(steps.sample_token, k, *decoding.shapes((part, last)))
    kv, last = extend(steps, kv, last, [r.ids for r in padded], 0, then)
    part, output = steps.sample_token(k, part, last)
    return where, part._replace(kv=kv), output


def no_hidden_state(model: "Model", rows: int) -> jax.Array:
    """The last hidden states [B,D] of rows without tokens, for `extend`."""
    return mesh.place(np.zeros((rows, model.config.D), model.dtype), "BD", model.mesh or model.device)


def extend(
    steps: CompiledSteps,
    kv: Any,
    last: jax.Array,
    ids: list[list[int]],
    start: int,
    then: Callable[[], Any],
) -> tuple[Any, jax.Array]:
    """Chunked prefill.

    Args:
        steps: The compiled model.
        kv: The KV cache, which is donated.
        last: Hidden states [B,D] of the tokens before, which are donated.
        ids: Token ids of each row.
        start: Position of the first token.
        then: The program that follows, as for `CompiledSteps.expect`.

    Returns:
        The KV cache with these tokens, and the last hidden states [B,D].
    """
    model = steps.model
    full, *small = (min(kv.chunk, size) for size in decoding.chunk_sizes(model.device.platform, len(ids)))
    pieces = decoding.chunks(ids, start, [full, *small])
    steps.expect(*prefills(steps, kv, [tokens.shape[1] for tokens, _ in pieces]), then)
    for tokens, pos in pieces:
        kv, last = steps.prefill(kv, last, *(mesh.place(a, "BT", model.mesh or model.device) for a in (tokens, pos)))
    return kv, last


def prefills(steps: CompiledSteps, kv: caches.KVCache, sizes: Sequence[int]) -> list[Callable[[], Any]]:
    """The prefill programs of these chunk sizes on a single device, for `CompiledSteps.expect`."""
    if steps.model.mesh is not None:
        return []
    rows, where = next(iter(kv.positions.values())).shape[0], kv.layers[0]["k"].sharding
    cache = decoding.shapes(kv)
    hidden: Any = jax.ShapeDtypeStruct((rows, steps.model.config.D), steps.model.dtype, sharding=where)
    tokens: list[Any] = [jax.ShapeDtypeStruct((rows, T), np.int32, sharding=where) for T in dict.fromkeys(sizes)]
    return [partial(steps.prefill, cache, hidden, each, each) for each in tokens]


def small_prefills(steps: CompiledSteps, kv: caches.KVCache) -> list[Callable[[], Any]]:
    """The prefill programs that the next prompt may need, if it is not long."""
    rows = next(iter(kv.positions.values())).shape[0]
    _, *small = decoding.chunk_sizes(steps.model.device.platform, rows)
    return prefills(steps, kv, [min(kv.chunk, size) for size in small])

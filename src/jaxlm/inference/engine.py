"""The host's side of decoding: requests share a batch of rows, and tokens come out in the order in which they are made.

A row that ends makes room for the next request. Programs are dispatched one ahead of the tokens that are read, so the
device never waits for the host: a row that has ended is noticed one program late, and what it made since is dropped.
The cache has room for the prompts and ROOM tokens at first, and doubles when a row has come to its end: few answers are
as long as they may be, and a step costs what the cache is long.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


HEADROOM = 512  # tokens behind the longest prompt for which a cache has slots from the start


@dataclass
class Request:
    """One prompt and what is asked for it; `finished` is set by the engine, or by the reader to end it early."""

    ids: list[int]
    options: SamplingParams  # resolved: every number is there
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    key: Any = None  # typed PRNG key
    finished: str | None = None  # "stop" or "length"
    made: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0  # when the first token was there


class Logprobs(NamedTuple):
    """Natural log-probability of a token under the raw logits, and the likeliest tokens with theirs."""

    chosen: float
    top: list[tuple[int, float]]


class Token(NamedTuple):
    """One token of request number `index`."""

    index: int
    id: int
    logprobs: Logprobs | None


@dataclass
class _Row:
    request: int
    pos: int  # of the newest token that was dispatched
    left: int  # tokens that may still be dispatched


def run(steps: CompiledSteps, requests: Sequence[Request], slots: int) -> Iterator[Token]:
    """Decodes all requests, at most `slots` at once, and yields their tokens. Stop tokens are yielded too."""
    model = steps.model
    slots = mesh.round_up_batch(min(slots, len(requests)), model.mesh)
    waiting = deque(range(len(requests)))
    rows: list[_Row | None] = [None] * slots
    in_flight: deque[tuple[decoding.StepOutput, list[tuple[int, int]]]] = deque()
    lengths = cache_lengths(requests)
    state, k = empty_state(model, requests, slots, lengths[0])
    n = hardware.STEPS[model.device.platform]
    while True:
        rows = _drop_finished(rows, requests)
        free = [i for i, row in enumerate(rows) if row is None]
        if waiting and free:
            batch = _same_bucket(waiting, requests, len(free))
            state, made = admit(steps, [requests[i] for i in batch], free[: len(batch)], state, k)
            for row, request in zip(free, batch):
                rows[row] = _Row(request, len(requests[request].ids), requests[request].max_tokens - 1)
            in_flight.append((made, list(enumerate(batch))))
            while in_flight:  # a first token is shown at once, not after the next program is compiled or done
                yield from fetch_tokens(requests, *in_flight.popleft())
            rows = _drop_finished(rows, requests)
        busy = [(i, row) for i, row in enumerate(rows) if row is not None and row.left > 0]
        if busy:
            last = max(row.pos + min(n, row.left) for _, row in busy)  # what is past the last wanted token drops
            if last > state.kv.length:
                longer = next(length for length in lengths if length >= last)
                state = state._replace(kv=resize_cache(steps, state.kv, longer, 1))
            state, made = steps.step(k, n, state)
            in_flight.append((made, [(i, row.request) for i, row in busy]))
            for _, row in busy:
                row.pos, row.left = row.pos + n, row.left - n
        if len(in_flight) > 1 or (in_flight and not busy):
            yield from fetch_tokens(requests, *in_flight.popleft())
        elif not in_flight and not waiting:
            return


def _same_bucket(waiting: deque[int], requests: Sequence[Request], most: int) -> list[int]:
    """Takes the next request, and others whose prompts share its length bucket: a batch is padded to its longest."""
    size = decoding.bucket(len(requests[waiting[0]].ids))
    batch = [i for i in waiting if decoding.bucket(len(requests[i].ids)) == size][:most]
    for i in batch:
        waiting.remove(i)
    return batch


def _drop_finished(rows: list[_Row | None], requests: Sequence[Request]) -> list[_Row | None]:
    """The rows, those whose request has ended made free."""
    return [row if row is not None and not requests[row.request].finished else None for row in rows]


def fetch_tokens(
    requests: Sequence[Request], made: decoding.StepOutput, where: list[tuple[int, int]]
) -> Iterator[Token]:
    """Brings tokens to the host; `where` pairs a row with its request. What a request made after its end is dropped."""
    tokens, logprobs = jax.device_get(made)
    for n in range(tokens.shape[0]):
        for row, index in where:
            request = requests[index]
            if request.finished:
                continue
            token = int(tokens[n, row])
            if token == decoding.NOT_FINITE:
                raise ValueError(
                    "the model's logits are not finite: its weights hold NaN or infinity, or overflow in their type "
                    "(try dtype='float32', --dtype float32)"
                )
            request.made += 1
            request.first = request.first or time.perf_counter()
            if token in request.stop_ids:
                request.finished = "stop"
            elif request.made >= request.max_tokens:
                request.finished = "length"
            yield Token(index, token, None if logprobs is None else _logprobs(*(a[n, row] for a in logprobs)))


def _logprobs(chosen: np.ndarray, ids: np.ndarray, values: np.ndarray) -> Logprobs:
    return Logprobs(float(chosen), [(int(i), float(v)) for i, v in zip(ids, values)])


def cache_lengths(requests: Sequence[Request]) -> list[int]:
    """The buckets that the cache may have, one after the other: twice as long each time, the last for all tokens."""
    most = decoding.bucket(max(len(r.ids) + r.max_tokens for r in requests))
    lengths = [decoding.bucket(max(len(r.ids) for r in requests) + HEADROOM)]
    while 2 * lengths[-1] <= most:
        lengths.append(2 * lengths[-1])
    return [*lengths[:-1], most]


def resize_cache(steps: CompiledSteps, kv: caches.KVCache, length: int, chunk: int) -> caches.KVCache:
    """A cache of this length with the contents of a shorter one."""
    rows = next(iter(kv.positions.values())).shape[0]
    return steps.resize_cache(steps.model.init_kv(rows, length, chunk=chunk), kv)


def empty_state(
    model: "Model", requests: Sequence[Request], slots: int, length: int
) -> tuple[decoding.State, int | None]:
    """A state in which no row is used, with a cache of this length; and how many likeliest tokens to report."""
    asked = [r.options.logprobs for r in requests if r.options.logprobs is not None]
    kv = model.init_kv(slots, length, chunk=1)
    blank = [Request([], DEFAULT_PARAMS, 1, key=requests[0].key)] * slots
    return new_rows(model, blank, kv, optional(requests)), max(asked) if asked else None


DEFAULT_PARAMS = SamplingParams().resolve({})


class Optionals(NamedTuple):
    """Which optional arrays the rows of a batch carry: those that any of its requests needs."""

    counts: bool
    bias: bool


def optional(requests: Sequence[Request]) -> Optionals:
    return Optionals(any(r.options.penalized for r in requests), any(r.options.logit_bias for r in requests))


def new_rows(model: "Model", requests: Sequence[Request], kv: Any, shared: Optionals) -> decoding.State:
    """The rows of these requests before their first token."""
    V = model.config.V
    counts = bias = None
    if shared.counts:
        width = decoding.bucket(max(len(r.ids) for r in requests))
        (tokens, pos), *_ = decoding.chunks([r.ids for r in requests], 0, width, width)
        counts = sampling.count(jnp.asarray(tokens), jnp.asarray(pos), V)
    if shared.bias:
        rows = sampling.bias_of([r.options.logit_bias for r in requests], V)
        bias = jnp.zeros((len(requests), V), jnp.float32) if rows is None else jnp.asarray(rows)
    state = decoding.State(
        kv=None,
        token=jnp.zeros(len(requests), jnp.int32),
        pos=jnp.asarray([len(r.ids) - 1 for r in requests], jnp.int32),
        keys=jnp.stack([r.key for r in requests]),
        sampling=sampling.Sampling.of([r.options for r in requests]),
        counts=counts,
        bias=bias,
    )
    return decoding.constrain_state(state, lambda a, letters: mesh.place(a, letters, model.mesh))._replace(kv=kv)


def admit(steps: CompiledSteps, requests: list[Request], rows: list[int], state: decoding.State, k: int | None) -> Any:
    """Prefills requests as one batch, makes their first tokens and puts them into `rows` of the state."""
    model = steps.model
    # Batches come in powers of two; the rows that fill one up repeat the last request and are dropped by `insert`.
    b = mesh.round_up_batch(1 << (len(requests) - 1).bit_length(), model.mesh)
    padded = requests + [requests[-1]] * (b - len(requests))
    target = rows + [state.pos.shape[0]] * (b - len(requests))
    width = max(len(r.ids) for r in requests)
    chunk = max(16, hardware.CHUNK[model.device.platform] // b)  # tokens of all rows together
    kv = model.init_kv(b, decoding.bucket(width), chunk=chunk)
    shared = Optionals(state.counts is not None, state.bias is not None)
    kv, last = extend(steps, kv, [r.ids for r in padded], 0)
    # Without the cache in it the first program does not depend on the prompts' length.
    part = new_rows(model, padded, None, shared)
    part, made = steps.sample_token(k, part, last)
    part = part._replace(kv=kv)
    where = mesh.place(np.array(target, np.int32), "", model.mesh)
    return steps.insert(state, where, part), made


def extend(steps: CompiledSteps, kv: Any, ids: list[list[int]], start: int) -> tuple[Any, jax.Array]:
    """Prefills token ids of each row at positions from `start` on -> the cache and the last hidden states [B,D]."""
    model = steps.model
    last = mesh.place(np.zeros((len(ids), model.config.D), model.dtype), "BD", model.mesh)
    for tokens, pos in decoding.chunks(ids, start, max(map(len, ids)), kv.chunk):
        kv, last = steps.prefill(kv, last, *(mesh.place(a, "BT", model.mesh) for a in (tokens, pos)))
    return kv, last

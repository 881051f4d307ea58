"""Which request runs when: rows, prefill between decode steps, and what happens to each token. For a single thread.

Each step prefills one chunk of the prompts that join, if any, and then decodes a few tokens of all rows. A running
answer therefore waits for one chunk at most, and a long prompt gets every other program. Requests join in the order in
which they were submitted; others with as many tokens to prefill join with the first one (decoding.bucket).

The host dispatches a program before it fetches the tokens of the previous one, so the device does not wait for the
host, except after a prefill, whose tokens are fetched at once, and where a constraint needs the previous token. The end
of a request is therefore detected one program late, and the tokens generated in between are dropped.

Programs are compiled for the lengths of the KV caches and of the chunks of a prompt. Both take few values, which do not
depend on the prompt and on max_tokens unless these are long (memory.cache_lengths, decoding.chunks), so that another
prompt compiles nothing. The KV cache doubles when a row reaches its end: most answers are shorter than max_tokens, and
on accelerators the cost of a decoding step grows with the length of the cache.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlm.devices import hardware, mesh
from jaxlm.inference import decoding, prefix_cache, structured
from jaxlm.inference.compilation import CompiledSteps, shapes
from jaxlm.inference.completion import CompletionChunk, Detokenization
from jaxlm.inference.memory import MAX_JOINING, CacheLengths
from jaxlm.inference.prefill import Prefill, empty_rows, logprobs_of, same_width, small_prefills
from jaxlm.inference.prefix_cache import NO_PREFIX, Prefix, Slot
from jaxlm.inference.requests import MAX_LOGPROBS, Request
from jaxlm.nn import kv_cache as caches

if TYPE_CHECKING:
    from jaxlm.model import Model

LOOK_AHEAD = 64  # waiting requests that may join with the first one
NOT_FINITE = (
    "the logits are not finite (NaN or Inf): the weights are not finite, or their dtype overflows. Try "
    "dtype='float32' (--dtype float32)"
)


class Scheduler:
    """The rows of a batch and the requests that wait for one.

    Attributes:
        steps: The compiled functions of the model.
        rows: The rows.
        max_joining: Number of prompts that are prefilled together, at most.
        waiting: Requests that wait for a row.
        answers: The text of each request that has not ended.
        chunks: New text, and the ends of requests. The caller takes it.
        hits, prompt_tokens: Of all requests so far, the number of prompt tokens that were in the prefix cache, and the
            number of all prompt tokens.
    """

    def __init__(self, steps: CompiledSteps, slots: int, lengths: CacheLengths, prefix_cache: bool):
        """No memory is allocated.

        Args:
            steps: The compiled functions of the model.
            slots: Number of rows.
            lengths: Lengths of the KV caches.
            prefix_cache: Whether new requests reuse the keys and values of earlier ones. Sliding-window layers then
                store all positions.
        """
        self.steps: CompiledSteps = steps
        self.model: Model = steps.model
        self.slots: int = slots
        self.lengths: CacheLengths = lengths
        self.prefix_cache: bool = prefix_cache
        self.rings: bool = not prefix_cache or not any(self.model.config.windows)
        self.max_joining: int = mesh.round_up_batch(min(slots, MAX_JOINING), self.model.mesh)
        self.waiting: deque[Request] = deque()
        self.answers: dict[Request, Detokenization] = {}
        self.chunks: list[CompletionChunk] = []
        self.hits: int = 0
        self.prompt_tokens: int = 0
        self._clock: int = 0
        self.reset()

    def reset(self) -> None:
        """Drops all device arrays and cached prefixes."""
        self.rows: list[Slot] = [Slot() for _ in range(self.slots)]
        self.joining: Prefill | None = None
        self._in_flight: deque[tuple[decoding.StepOutput, list[tuple[int, Request]]]] = deque()
        self.state: decoding.State | None = None
        self._released: set[int] = set()  # rows without a request that still decode
        self._not_finite: set[int] = set()  # rows whose keys or values may be NaN

    def add(self, request: Request) -> None:
        """Adds a request."""
        self.waiting.append(request)
        self.answers[request] = Detokenization(self.steps, request)

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended, or that have not left their row."""
        return bool(self.answers or self.joining is not None)

    def advance(self) -> None:
        """Runs one chunk of a prefill and one decode program, as far as there are requests. If a program fails, the
        requests that have a row end with its error, because the arrays that it took are gone. With several processes
        it is also raised, because they may differ then."""
        with self._recovering(reraise=self.model.is_multiprocess):
            for request in [request for request in self.answers if request.cancelled or request.finished]:
                request.finished = request.finished or "cancelled"  # or a constraint failed
                self._end(request)
            if self.joining is None:
                self._admit()
            if self.joining is not None and self._prefill(self.joining):
                return  # the first tokens are returned before other programs are dispatched, or compiled
            busy = self._decode()
            if len(self._in_flight) > 1 or (self._in_flight and not busy):
                self._fetch_tokens()

    @contextmanager
    def _recovering(self, reraise: bool = False) -> Iterator[None]:
        """Ends the requests that have a row, and drops all device arrays, if a program fails or is interrupted.

        Args:
            reraise: Whether an error is raised as well. An interrupt always is.
        """
        try:
            yield
        except BaseException as error:
            reason = error if isinstance(error, Exception) else RuntimeError(f"interrupted: {type(error).__name__}")
            requests = [slot.request for slot in self.rows if slot.request is not None]
            self.reset()
            for request in requests:
                if request in self.answers:
                    if isinstance(error, CancelledError):  # the engine is closed while a program is compiled
                        request.finished = "cancelled"
                    else:
                        request.fail(reason)
                    self._end(request)
            if reraise or not isinstance(error, Exception):
                raise

    # Prefill

    def _admit(self) -> None:
        """Chooses the requests that join next: the first one, and others with as many tokens to prefill."""
        free = sum(slot.request is None for slot in self.rows)
        if not self.waiting or not free:
            return
        group: dict[Request, Prefix] = {}
        for request in list(self.waiting)[: max(LOOK_AHEAD, self.slots)]:
            reuse = self.prefix_cache and not request.prompt_logprobs
            prefix = prefix_cache.longest_prefix(self.rows, request) if reuse else NO_PREFIX
            request.cached = prefix.length
            if group and not same_width(next(iter(group)), request):
                continue
            if reuse and prefix_cache.should_wait(request, group):
                continue
            group[request] = prefix
            if len(group) == min(free, self.max_joining):
                break
        for request, prefix in group.items():
            self.waiting.remove(request)
            self.rows[prefix_cache.choose_row(self.rows, prefix)].request = request
            if prefix.length:
                self._use(prefix.row)
            self.hits, self.prompt_tokens = self.hits + prefix.length, self.prompt_tokens + len(request.ids)
        full = any(slot.request.needs_full_state for slot in self.rows if slot.request is not None)
        take = partial(self._take_prefixes, group) if any(prefix.length for prefix in group.values()) else None
        self.joining = Prefill(self.steps, [*group], self.lengths.prefill, full, self.rings, take)

    def _take_prefixes(self, prefixes: dict[Request, Prefix], kv: caches.KVCache, requests: list[Request]) -> Any:
        """Copies prefixes into the empty KV cache of these requests."""
        assert self.state is not None
        rows, keep = (np.array([prefixes[r][i] for r in requests], np.int32) for i in (0, 1))
        return self.steps.take(kv, self.state.kv, *(self.place(a, "") for a in (rows, keep)))

    def store_prefix(self, ids: np.ndarray, adapter: int, kv: caches.KVCache) -> None:
        """Puts a prefix, which is in the first row of a KV cache, into the free row that was used the longest ago."""
        row = prefix_cache.choose_row(self.rows, NO_PREFIX)
        with self._recovering(reraise=True):
            state = self._fitting(len(ids), self.state is not None and self.state.counts is not None)
            padding = len(next(iter(kv.positions.values()))) - 1
            part = empty_rows(self.model, 1 + padding, state.counts is not None)._replace(kv=kv)
            rows = self.place(np.array([row] + [self.slots] * padding, np.int32), "")
            self.state = self.steps.insert(state, rows, part)
        self.rows[row].ids, self.rows[row].adapter = ids, adapter
        self._use(row)

    def _prefill(self, joining: Prefill) -> bool:
        """Prefills one chunk. After the last one, samples the first tokens, and in the next step inserts the rows.

        Returns:
            Whether the first tokens have come.
        """
        if joining.pieces and not all(request.finished for request in joining.requests):
            joining.run_chunk()
            if joining.pieces:
                return False
            output = joining.sample(*self._masks(joining.padded))
            self._in_flight.append((output, list(enumerate(joining.requests))))
            while self._in_flight:
                self._fetch_tokens()
            return True
        self._insert(joining)
        self.joining = None  # afterwards, so that there is work until the rows are free
        return False

    def _insert(self, joining: Prefill) -> None:
        """Inserts requests into their rows, also those that ended with their first token if prefixes are kept."""
        row_of = {slot.request: row for row, slot in enumerate(self.rows)}
        kept = (None, "stop", "length") if self.prefix_cache else (None,)
        inserted = [request for request in joining.requests if request.finished in kept]
        for request in joining.requests:
            if request not in inserted:
                self.rows[row_of[request]].request = None
        if not inserted:
            return
        # A prompt may fill its row if nothing follows it (max_tokens 0).
        length = max(len(request.ids) + (request.finished is None) for request in inserted)
        state = self._fitting(length, joining.full)
        n = hardware.STEPS[self.model.device.platform]
        rows = joining.rows([row_of[r] if r in inserted else self.slots for r in joining.requests], self.slots)
        decode = [partial(self.steps.step, joining.k, n, shapes(state))] if self.answers else []
        later = [partial(self.steps.take, *shapes((joining.kv, state.kv, rows, rows)))] if self.prefix_cache else []
        self.steps.expect(*decode, *small_prefills(self.steps, joining.kv), *later)
        self.state = self.steps.insert(state, rows, joining.part._replace(kv=joining.kv))
        for request in inserted:
            slot = self.rows[row_of[request]]
            slot.ids, slot.adapter, slot.running = request.array, request.adapter, True
            slot.pos, slot.left = len(request.ids), request.max_tokens - 1
            self._released.discard(row_of[request])
            if request.finished:
                self._leave(request)

    # Decoding

    def _decode(self) -> bool:
        """Dispatches a decode program. Returns whether a row needs one."""
        busy = [(row, slot.request) for row, slot in enumerate(self.rows) if slot.request is not None and slot.is_busy]
        if not busy:
            return False
        requests = [request for _, request in busy]
        constrained = any(request.constraint is not None for request in requests)
        n = 1 if constrained else hardware.STEPS[self.model.device.platform]
        slots = [self.rows[row] for row, _ in busy]
        last = max(slot.pos + min(n, slot.left) for slot in slots)  # later tokens of the program are dropped
        full = any(request.needs_full_state for request in requests)
        state, k = self._fitting(last, full), top_logprobs(full)
        if self._released:
            rows = np.isin(np.arange(self.slots), [*self._released])
            state = self.steps.release(state, self.place(rows, "B"))
            self._released.clear()
        if constrained:
            state, x = self.steps.forward_step(state)
            while self._in_flight:  # the device computes meanwhile
                self._fetch_tokens()
            masks = self._masks([slot.request for slot in self.rows])
            state, output = self.steps.sample_token(k, state, x, *masks)
        else:
            state, output = self.steps.step(k, n, state)
        self.state = state
        running = [(row, slot.request) for row, slot in enumerate(self.rows) if slot.request and slot.running]
        self._in_flight.append((output, running))  # also those whose last tokens are in flight
        for slot in slots:
            slot.pos, slot.left = slot.pos + n, slot.left - n
        return True

    def _masks(self, requests: Sequence[Request | None]) -> list[jax.Array]:
        """The tokens that are allowed next in each row, [B,ceil(V/32)] uint32, in a list; empty if all are."""
        V, masks = self.model.config.V, dict[Request | None, np.ndarray]()  # a request may have several rows of padding
        for request in requests:
            if request is None or request.constraint is None or request.finished or request in masks:
                continue
            masks[request] = structured.all_bits(V)
            with self._failing(request):
                [masks[request]] = structured.batch_masks([request.constraint], V)
                if not masks[request].any():
                    raise ValueError("no token is allowed next: the grammar cannot be completed with this vocabulary")
        rows = [masks.get(request, structured.all_bits(V)) for request in requests]
        return [self.place(np.stack(rows), "B")] if masks else []

    def _fitting(self, length: int, full: bool) -> decoding.State:
        """Takes the state of the batch, with a KV cache of this length at least, and the arrays for penalties, logit
        bias and log-probabilities if they are needed."""
        state, self.state = self.state, None  # the arrays will be donated
        if state is None:
            return self.empty_state(next(n for n in self.lengths.decode if n >= length), full)
        if full != (state.counts is not None):
            empty = empty_rows(self.model, self.slots, full)
            state = state._replace(counts=empty.counts, bias=empty.bias)
        for row in self._not_finite:
            state = state._replace(kv=self.steps.clear(state.kv, self.place(np.int32(row), "")))
        self._not_finite.clear()
        while state.kv.length < length:  # one length after the other, so that few programs are compiled
            longer = self.empty_cache(next(n for n in self.lengths.decode if n > state.kv.length))
            state = state._replace(kv=self.steps.resize_cache(longer, state.kv))
        return state

    def empty_state(self, length: int, full: bool) -> decoding.State:
        """The state of a batch without requests, with a KV cache of this length."""
        return empty_rows(self.model, self.slots, full)._replace(kv=self.empty_cache(length))

    def empty_cache(self, length: int) -> caches.KVCache:
        return self.model.init_kv(self.slots, length, chunk=1 if self.rings else None)

    def place(self, x: np.ndarray | np.int32, letters: str) -> jax.Array:
        return mesh.place(x, letters, self.model.mesh or self.model.device)

    # Tokens

    def _fetch_tokens(self) -> None:
        """Copies the tokens of the oldest program to the host."""
        output, where = self._in_flight.popleft()
        tokens, logprobs = jax.device_get(output)
        for n in range(tokens.shape[0]):
            for row, request in where:
                token = int(tokens[n, row])
                if not request.finished:
                    scores = None if logprobs is None else tuple(a[n, row] for a in logprobs)
                    self._add_token(request, token, scores)
                elif token == decoding.NOT_FINITE and request.tokens:  # after the end of an answer
                    self.rows[row].ids = prefix_cache.NO_TOKENS
                    self._not_finite.add(row)

    def _add_token(self, request: Request, token: int, scores: tuple[np.ndarray, ...] | None) -> None:
        """Adds a token to an answer, and decides whether the answer ends."""
        if token == decoding.NOT_FINITE:
            request.fail(decoding.NotFiniteError(NOT_FINITE))
            return self._end(request)
        if not request.max_tokens:
            request.finished = "length"
            return self._end(request)
        request.tokens.append(token)
        request.first = request.first or time.perf_counter()
        with self._failing(request):
            if token in request.stop_ids:
                request.finished = "stop"
            elif request.constraint is not None:
                request.constraint.accept(token)
                request.finished = "stop" if request.constraint.finished else None
            if request.stop_when is not None and request.stop_when(request.tokens):
                request.finished = "stop"
        if request.error is not None:
            return self._end(request)
        if len(request.tokens) >= request.max_tokens:
            request.finished = request.finished or "length"
        k = request.options.logprobs
        chunk = self.answers[request].add(token, None if k is None or scores is None else logprobs_of(scores, k))
        if chunk is not None:
            self._emit(chunk)
        if request.finished:
            del self.answers[request]
            self._leave(request)

    @contextmanager
    def _failing(self, request: Request) -> Iterator[None]:
        """An error of a function of the user ends the request."""
        try:
            yield
        except Exception as error:
            request.fail(error)

    def _end(self, request: Request) -> None:
        """Ends a request without another token."""
        self._emit(self.answers.pop(request).end())
        if request in self.waiting:
            self.waiting.remove(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Frees the row of a request. A request that joins keeps its row until it would be inserted."""
        for row, slot in enumerate(self.rows):
            if slot.request is request and slot.running:
                # The last token is not in the KV cache.
                slot.ids = np.array([*request.ids, *request.tokens[:-1]], np.int32)
                if request.error is not None:
                    slot.ids = prefix_cache.NO_TOKENS
                    self._not_finite.add(row)
                slot.request, slot.running = None, False
                self._released.add(row)
                self._use(row)

    def _use(self, row: int) -> None:
        """Notes that a row was used now."""
        self._clock += 1
        self.rows[row].used = self._clock

    def _emit(self, chunk: CompletionChunk) -> None:
        (chunk.request.emit or self.chunks.append)(chunk)


def top_logprobs(full: bool) -> int | None:
    """Number of top log-probabilities that programs return."""
    return MAX_LOGPROBS if full else None

"""Chunked prefill of the requests that join a batch, in a KV cache of their own."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import mesh
from jaxlm.inference import decoding, sampling
from jaxlm.inference.compilation import CompiledSteps, shapes
from jaxlm.inference.decoding import State, StepOutput
from jaxlm.inference.requests import MAX_LOGPROBS, Logprobs, Request
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.nn import kv_cache as caches

if TYPE_CHECKING:
    from jaxlm.model import Model

DEFAULT_PARAMS = SamplingParams().resolve({})


class Prefill:
    """Requests whose prompts are prefilled together, one chunk per call of `run_chunk`.

    Attributes:
        steps: The compiled functions of the model.
        requests: The requests.
        pieces: Tokens and positions [B,T] of the chunks that are left.
        kv: The KV cache of the prompts, which has `padded` rows.
        last: Hidden states [B,D] of the tokens before.
        part: The state of the rows that will be inserted, without a KV cache.
        padded: The requests, and copies of the last one: the number of rows is a power of two, so that few programs are
            compiled.
    """

    def __init__(
        self,
        steps: CompiledSteps,
        requests: list[Request],
        lengths: list[int],
        full: bool,
        rings: bool = True,
        take: Callable[[Any, list[Request]], Any] | None = None,
    ):
        """Allocates the KV cache.

        Args:
            steps: The compiled functions of the model.
            requests: The requests. The first `cached` tokens of each are in the KV cache that `take` returns.
            lengths: CacheLengths.prefill.
            full: Whether the state of the batch has penalties, a logit bias and log-probabilities.
            rings: Whether sliding-window layers have ring buffers.
            take: Copies cached prefixes into an empty KV cache, given the requests of its rows.
        """
        model = steps.model
        self.steps: CompiledSteps = steps
        self.model: Model = model
        self.requests: list[Request] = requests
        self.full: bool = full
        rows = mesh.round_up_batch(1 << (len(requests) - 1).bit_length(), model.mesh)
        self.padded: list[Request] = requests + [requests[-1]] * (rows - len(requests))
        length = next(length for length in lengths if length >= max(len(r.ids) for r in requests))
        sizes = decoding.chunk_sizes(model.device.platform, rows)
        self.kv: caches.KVCache = model.init_kv(rows, length, chunk=sizes[0] if rings else None)
        if take is not None:
            self.kv = take(self.kv, self.padded)
        self.last: jax.Array = no_hidden_state(model, rows)
        self.part: State = new_rows(model, self.padded, full)
        starts = [r.cached for r in self.padded]
        rest = [r.ids[start:] for r, start in zip(self.padded, starts)]
        self.pieces: deque[tuple[np.ndarray, np.ndarray]] = deque(
            decoding.chunks(rest, starts, [min(self.kv.chunk, size) for size in sizes])
        )
        self._scores: list[tuple[np.ndarray, Any]] = []  # positions of a chunk, and its log-probabilities
        # The KV cache is not an argument of `sample_token`, which is compiled once for all prompt lengths.
        then = partial(steps.sample_token, self.k, *shapes((self.part, self.last)))
        steps.expect(*prefills(steps, self.kv, [tokens.shape[1] for tokens, _ in self.pieces]), then)

    @property
    def k(self) -> int | None:
        """Number of top log-probabilities that programs return."""
        return MAX_LOGPROBS if self.full else None

    def run_chunk(self) -> None:
        """Prefills the next chunk."""
        tokens, pos = self.pieces.popleft()
        where = self.model.mesh or self.model.device
        arrays = [mesh.place(a, "BT", where) for a in (tokens, pos)]
        if not any(r.prompt_logprobs for r in self.requests):
            self.kv, self.last = self.steps.prefill(self.kv, self.last, arrays[0], arrays[1], self.part.adapter)
            return
        targets = np.zeros(tokens.shape, np.int32)
        for row, request in enumerate(self.padded):
            following = np.append(request.ids[1:], 0).astype(np.int32)
            targets[row] = np.where(pos[row] < 0, 0, following[pos[row]])
        arrays.append(mesh.place(targets, "BT", where))
        arrays.append(self.part.adapter)
        self.kv, self.last, scores = self.steps.prefill_logprobs(MAX_LOGPROBS, self.kv, self.last, *arrays)
        self._scores.append((pos, scores))

    def sample(self, *mask: jax.Array) -> StepOutput:
        """Samples the first tokens. mask: the tokens that are allowed, as in decoding.sample_token."""
        self.part, output = self.steps.sample_token(self.k, self.part, self.last, *mask)
        for pos, scores in self._scores:
            arrays = jax.device_get(scores)
            for row, request in enumerate(self.requests):
                if request.prompt_logprobs:
                    _add_scores(request, pos[row], *(a[:, row] for a in arrays))
        return output

    def rows(self, targets: list[int], dropped: int) -> jax.Array:
        """The row of the batch for each row of `part`; `dropped`, which is past the end, for the padding rows."""
        rows = np.array(targets + [dropped] * (len(self.padded) - len(targets)), np.int32)
        return mesh.place(rows, "", self.model.mesh or self.model.device)


def _add_scores(request: Request, pos: np.ndarray, chosen: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    """Adds the log-probabilities of one chunk to those of the prompt."""
    scores = request.prompt_scores = request.prompt_scores or [None]
    k = request.options.logprobs or 0
    for n in np.flatnonzero((pos >= 0) & (pos < len(request.ids) - 1)):
        scores.append(logprobs_of((chosen[n], ids[n], values[n]), k))


def logprobs_of(scores: tuple[np.ndarray, ...], k: int) -> Logprobs:
    """Log-probabilities from the arrays of a program (decoding.StepOutput), with the k most likely tokens."""
    chosen, ids, values = scores
    return Logprobs(float(chosen), [(int(i), float(v)) for i, v in zip(ids[:k], values[:k])])


def prefills(steps: CompiledSteps, kv: caches.KVCache, sizes: Sequence[int]) -> list[Callable[[], Any]]:
    """The prefill programs of these chunk sizes on a single device, for `CompiledSteps.expect`."""
    if steps.model.mesh is not None:
        return []
    positions, cache = next(iter(kv.positions.values())), shapes(kv)
    rows, where = positions.shape[0], positions.sharding
    hidden: Any = jax.ShapeDtypeStruct((rows, steps.model.config.D), steps.model.dtype, sharding=where)
    tokens: list[Any] = [jax.ShapeDtypeStruct((rows, T), np.int32, sharding=where) for T in dict.fromkeys(sizes)]
    adapter: Any = jax.ShapeDtypeStruct((rows,), np.int32, sharding=where)
    return [partial(steps.prefill, cache, hidden, each, each, adapter) for each in tokens]


def small_prefills(steps: CompiledSteps, kv: caches.KVCache) -> list[Callable[[], Any]]:
    """The prefill programs that the next prompt may need, if it is not long."""
    rows = next(iter(kv.positions.values())).shape[0]
    _, *small = decoding.chunk_sizes(steps.model.device.platform, rows)
    return prefills(steps, kv, [min(kv.chunk, size) for size in small])


def no_hidden_state(model: "Model", rows: int) -> jax.Array:
    """The last hidden states [B,D] of rows without tokens."""
    return mesh.place(np.zeros((rows, model.config.D), model.dtype), "BD", model.mesh or model.device)


def new_rows(model: "Model", requests: Sequence[Request], full: bool) -> State:
    """The state of these requests before their first token, without a KV cache. full: with penalties and logit bias."""
    V, where = model.config.V, model.mesh or model.device
    counts = bias = None
    if full:
        counts = sampling.count_prompts([r.ids for r in requests], V)
        rows = sampling.bias_of([r.options.logit_bias for r in requests], V)
        bias = jax.device_put(np.zeros((len(requests), V), np.float32) if rows is None else rows)
    state = State(
        kv=None,
        token=jax.device_put(np.zeros(len(requests), np.int32)),
        pos=jax.device_put(np.array([len(r.ids) - 1 for r in requests], np.int32)),
        keys=jnp.stack([r.key for r in requests]),
        sampling=sampling.Sampling.of([r.options for r in requests]),
        counts=counts,
        bias=bias,
        adapter=jax.device_put(np.array([r.adapter for r in requests], np.int32)),
    )
    return decoding.constrain_state(state, lambda a, letters: mesh.place(a, letters, where))


def empty_rows(model: "Model", slots: int, full: bool) -> State:
    """The state of rows without requests, without a KV cache."""
    empty = Request([], DEFAULT_PARAMS, 1, None, key=sampling.request_key(0, []))
    return new_rows(model, [empty] * slots, full)


def same_width(first: Request, request: Request) -> bool:
    """Whether two requests have as many tokens to prefill, rounded, and return the same."""
    widths = {decoding.bucket(len(r.ids) - r.cached) for r in (first, request)}
    return len(widths) == 1 and first.prompt_logprobs == request.prompt_logprobs

"""Prefill, insert and decode: the pure functions of generation. compilation.py compiles them.

A batch of B rows is a `State`. `prefill` runs prompts through the model and fills a separate KV cache. `insert` copies
these rows into the state of a batch. `step` generates the next token of every row. Rows are independent: each has its
own sampling parameters, PRNG key and position, so its text does not depend on the other rows.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxlm.devices import hardware, mesh
from jaxlm.inference import cache_rows, sampling, structured
from jaxlm.inference.sampling import Counts, LogitsProcessor, Sampling
from jaxlm.nn import kv_cache as caches
from jaxlm.nn import multi_lora


class State(NamedTuple):
    """The decoding state of a batch of B rows. A row without a request has position -1, as padding does."""

    kv: Any  # KVCache; None for rows that are not yet in a batch
    token: Int[Array, " B"]  # the last sampled token, not yet in the KV cache
    pos: Int[Array, " B"]  # its position
    keys: Key[Array, " B"]  # typed PRNG keys, one per sequence
    sampling: Sampling
    counts: Counts | None  # None if no row has a penalty or a logit bias
    bias: Float[Array, "B V"] | None  # None if no row has a penalty or a logit bias
    adapter: Int[Array, " B"]  # index of the adapter; multi_lora.BASE for none


class StepOutput(NamedTuple):
    """The output of a program for the host.

    Attributes:
        tokens: [n,B] int32.
        logprobs: None, or the log-probability of each token [n,B], the most likely ids [n,B,k] and their
            log-probabilities [n,B,k].
    """

    tokens: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


def constrain_state(state: State, put: Callable[[jax.Array, str], jax.Array]) -> State:
    """Applies `put(array, letters)` to every array of a state. The letters shard rows over the mesh axis `data`, and
    the vocabulary over `model`."""
    rest = jax.tree.map(lambda a: put(a, "BV"[: a.ndim]), state._replace(kv=None))
    return rest if state.kv is None else rest._replace(kv=caches.map_arrays(state.kv, put))


class NotFiniteError(ValueError):
    """Logits or hidden states are NaN or Inf: the weights are not finite, or their dtype overflows."""


NOT_FINITE = -1  # the token of a row whose logits are NaN or Inf


def bucket(n: int, least: int = 16) -> int:
    """Rounds a length up to one of 16, 24, 32, 48, 64, 96, …, for which programs are compiled."""
    power = least
    while power < n:
        power *= 2
    return power * 3 // 4 if power > least and n <= power * 3 // 4 else power


def prefill(
    family: Any,
    cfg: Any,
    weights: Any,
    kv: caches.KVCache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    pos: Int[Array, "B T"],
    adapter: Int[Array, " B"] | None = None,
) -> tuple[caches.KVCache, Float[Array, "B D"]]:
    """Prefills one chunk of the prompts.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        weights: The weights.
        kv: The KV cache.
        last: Hidden states [B,D] from the previous chunk.
        tokens: [B,T] int32.
        pos: [B,T] int32, -1 for padding.
        adapter: The adapter of each row, as in State.

    Returns:
        The KV cache with the chunk, and the hidden state [B,D] of the last token of each row. A row without a token in
        this chunk keeps its `last`.
    """
    weights = multi_lora.for_rows(weights, adapter)
    x, kv = family.forward(cfg, tokens, weights, kv, pos)
    newest = jnp.argmax(pos, axis=1)
    x = jnp.take_along_axis(x, newest[:, None, None], axis=1)[:, 0]
    kv = caches.map_arrays(kv, mesh.constrain)
    return kv, mesh.constrain(jnp.where((pos >= 0).any(axis=1)[:, None], x, last), "BD")


def prefill_logprobs(
    family: Any,
    cfg: Any,
    k: int,
    weights: Any,
    kv: caches.KVCache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    pos: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    adapter: Int[Array, " B"] | None = None,
) -> tuple[caches.KVCache, Float[Array, "B D"], Any]:
    """`prefill`, and the log-probability of the token after each one.

    Args:
        k: Number of top log-probabilities.
        targets: The token after each one [B,T] int32.
        family, cfg, weights, kv, last, tokens, pos, adapter: As for `prefill`.

    Returns:
        The results of `prefill`, and as in StepOutput.logprobs, arrays [T,B], [T,B,k] and [T,B,k].
    """
    weights = multi_lora.for_rows(weights, adapter)
    x, kv = family.forward(cfg, tokens, weights, kv, pos)
    newest = jnp.argmax(pos, axis=1)
    found = jnp.take_along_axis(x, newest[:, None, None], axis=1)[:, 0]

    def score(part: tuple[jax.Array, jax.Array]) -> Any:  # the logits of one token per row at a time
        logits = family.logits(cfg, part[0][:, None], weights)[:, 0]
        return sampling.logprobs(logits, part[1], k)

    scores = jax.lax.map(score, (x.swapaxes(0, 1), targets.swapaxes(0, 1)))
    kv = caches.map_arrays(kv, mesh.constrain)
    last = mesh.constrain(jnp.where((pos >= 0).any(axis=1)[:, None], found, last), "BD")
    return kv, last, jax.tree.map(lambda a: mesh.constrain(a, ""), scores)


def sample_token(
    family: Any,
    cfg: Any,
    k: int | None,
    processors: tuple[LogitsProcessor, ...],
    weights: Any,
    state: State,
    x: Float[Array, "B D"],
    mask: UInt32[Array, "B w"] | None = None,
) -> tuple[State, StepOutput]:
    """Samples the next token of each row.

    Args:
        family: The module of the architecture.
        cfg: The model's Config.
        k: Number of top log-probabilities.
        processors: Functions of the logits.
        weights: The weights.
        state: The state of the batch.
        x: Hidden states [B,D] of the last tokens.
        mask: The tokens that are allowed, as packed bits (structured.apply_mask). None: all.
    """
    logits = family.logits(cfg, x[:, None], multi_lora.for_rows(weights, state.adapter))[:, 0]
    pos = jnp.where(state.pos < 0, -1, state.pos + 1)
    keys = sampling.step_keys(state.keys, pos)
    more = processors if mask is None else (*processors, partial(structured.apply_mask, bits=mask))
    token = sampling.sample(logits, state.sampling, keys, state.counts, state.bias, more)
    token = jnp.where(jnp.isfinite(jnp.max(jnp.abs(logits), axis=1)), token, NOT_FINITE)
    counts = None if state.counts is None else sampling.update(state.counts, token)
    chosen = None if k is None else sampling.logprobs(logits, token, k)
    # Replicated, because every process fetches all tokens.
    output = jax.tree.map(lambda a: mesh.constrain(a[None], ""), StepOutput(token, chosen))
    return constrain_state(state._replace(token=token, pos=pos, counts=counts), mesh.constrain), output


def forward_step(family: Any, cfg: Any, weights: Any, state: State) -> tuple[State, Float[Array, "B D"]]:
    """The first half of a decoding step: the hidden states [B,D] of the last tokens. `sample_token` is the second."""
    weights = multi_lora.for_rows(weights, state.adapter)
    x, kv = family.forward(cfg, state.token[:, None], weights, state.kv, state.pos[:, None])
    return constrain_state(state._replace(kv=kv), mesh.constrain), mesh.constrain(x[:, 0], "BD")


def step(
    family: Any,
    cfg: Any,
    k: int | None,
    processors: tuple[LogitsProcessor, ...],
    steps: int,
    weights: Any,
    state: State,
) -> tuple[State, StepOutput]:
    """Decodes `steps` tokens of every row. The other arguments are those of `sample_token`."""

    def one(state: State, _: Any) -> tuple[State, StepOutput]:
        of_rows = multi_lora.for_rows(weights, state.adapter)
        x, kv = family.forward(cfg, state.token[:, None], of_rows, state.kv, state.pos[:, None])
        return sample_token(family, cfg, k, processors, weights, state._replace(kv=kv), x[:, 0])

    if steps == 1:
        return one(state, None)
    state, output = jax.lax.scan(one, state, length=steps)
    return state, jax.tree.map(lambda a: a[:, 0], output)


def release(pos: Int[Array, " B"], finished: Bool[Array, " B"]) -> Int[Array, " B"]:
    """Positions [B] of a state, -1 for finished rows [B] bool. Such a row does not write to the KV cache any more."""
    return mesh.constrain(jnp.where(finished, -1, pos), "B")


def insert(state: State, rows: Int[Array, " b"], part: State) -> State:
    """Inserts the rows of `part` (batch b) into `rows` [b] of a state. Row indices past the end are dropped."""
    kv = cache_rows.insert(state.kv, part.kv, rows)
    put = partial(jax.tree.map, lambda old, new: old.at[rows].set(new, mode="drop"))
    state = State(kv, *(put(old, new) for old, new in zip(state[1:], part[1:], strict=True)))
    return constrain_state(state, mesh.constrain)


def chunk_sizes(platform: str, rows: int) -> list[int]:
    """Tokens per row of the prefill chunks, the largest first. The sizes in `hardware` are those of all rows."""
    full = max(16, hardware.CHUNK[platform] // rows)
    return sorted({full, *(min(full, max(16, size // rows)) for size in hardware.SMALL_CHUNKS[platform])}, reverse=True)


def chunk_widths(width: int, sizes: Sequence[int], rows: int) -> list[int]:
    """Sizes of the chunks, the largest first, that compute `width` tokens of each row: full ones that are padded by
    less than the smallest size, and the cheapest combination of the others. A full chunk is not among these: a short
    prompt does not wait for its program. A chunk costs its tokens, padding included, and hardware.CHUNK_COST."""
    full, small = sizes[0], sizes[1:] or sizes

    @lru_cache(None)
    def cheapest(width: int) -> tuple[int, list[int]]:
        if width <= 0:
            return 0, []
        rests = [(size, *cheapest(width - size)) for size in small]
        return min((size * rows + hardware.CHUNK_COST + cost, [size, *rest]) for size, cost, rest in rests)

    count = (width + small[-1] - 1) // full
    return [full] * count + sorted(cheapest(width - count * full)[1], reverse=True)


def chunks(
    ids: Sequence[Sequence[int]], starts: Sequence[int], sizes: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits prompts into padded chunks (`chunk_widths`).

    Args:
        ids: Token ids of each row.
        starts: Position of the first token of each row.
        sizes: Tokens per row of the chunks, the largest first.

    Returns:
        For each chunk, tokens and positions [B,T] int32, with position -1 for padding.
    """
    pieces, begin = [], 0
    for T in chunk_widths(max(map(len, ids)), sizes, len(ids)):
        tokens, pos = np.zeros((len(ids), T), np.int32), np.full((len(ids), T), -1, np.int32)
        for row, (prompt, start) in enumerate(zip(ids, starts, strict=True)):
            part = prompt[begin : begin + T]
            tokens[row, : len(part)] = part
            pos[row, : len(part)] = start + begin + np.arange(len(part))
        pieces.append((tokens, pos))
        begin += T
    return pieces

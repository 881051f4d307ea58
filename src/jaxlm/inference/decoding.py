"""Prefill, insert and step: the pure functions of generation, and the programs compiled from them.

A batch of B rows is a `State`. `prefill` runs prompts through the model into a cache of their own, `insert` puts the
rows that it made into a state, `step` makes the next token of every row. Rows are independent: each has its sampling
parameters, its key and its place in its own sequence, so a row's text does not depend on what shares its batch.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import hardware, mesh
from jaxlm.inference import sampling
from jaxlm.inference.sampling import Counts, Sampling
from jaxlm.nn import kv_cache as caches


class State(NamedTuple):
    """What decoding carries from step to step."""

    kv: Any  # caches.Cache; None while rows are made or picked apart from it
    token: jax.Array  # [B] int32: the newest token, not in the cache yet
    pos: jax.Array  # [B] int32: its position
    keys: jax.Array  # [B] typed keys, one a sequence
    sampling: Sampling
    counts: Counts | None  # None where no row has a penalty
    bias: jax.Array | None  # [B,V] float32, None where no row has one


class StepOutput(NamedTuple):
    """What a program hands to the host: tokens [n,B] int32, and when asked for the log-probability of each [n,B], the
    likeliest ids [n,B,k] and their log-probabilities [n,B,k]."""

    tokens: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


def constrain_state(state: State, put: Callable[[jax.Array, str], jax.Array]) -> State:
    """`put(array, letters)` over every array of a state: rows over the mesh's `data`, vocabulary over `model`."""
    rest = jax.tree.map(lambda a: put(a, "BV"[: a.ndim]), state._replace(kv=None))
    return rest if state.kv is None else rest._replace(kv=caches.map_arrays(state.kv, put))


NOT_FINITE = -1  # the token of a row whose logits are NaN or infinite


def bucket(n: int, least: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that holds n: the lengths for which programs are compiled."""
    power = least
    while power < n:
        power *= 2
    return power * 3 // 4 if power > least and n <= power * 3 // 4 else power


def prefill(
    family: Any, cfg: Any, weights: Any, kv: caches.KVCache, last: jax.Array, tokens: jax.Array, pos: jax.Array
):
    """One chunk of prompts: tokens, pos [B,T] int32 (-1: padding) -> the cache with the chunk in it, and the hidden
    states [B,D] of each row's newest token; rows without a token here keep theirs in `last`."""
    x, kv = family.forward(cfg, tokens, weights, kv, pos)
    newest = jnp.argmax(pos, axis=1)
    x = jnp.take_along_axis(x, newest[:, None, None], axis=1)[:, 0]
    kv = caches.map_arrays(kv, mesh.constrain)
    return kv, mesh.constrain(jnp.where((pos >= 0).any(axis=1)[:, None], x, last), "BD")


def sample_token(
    family: Any, cfg: Any, k: int | None, weights: Any, state: State, x: jax.Array
) -> tuple[State, StepOutput]:
    """The next token of each row from its newest hidden state x [B,D]; k: how many likeliest tokens to report."""
    logits = family.logits(cfg, x[:, None], weights)[:, 0]
    pos = state.pos + 1
    keys = sampling.step_keys(state.keys, pos)
    token = sampling.sample(logits, state.sampling, keys, state.counts, state.bias)
    token = jnp.where(jnp.isfinite(jnp.max(jnp.abs(logits), axis=1)), token, NOT_FINITE)
    counts = None if state.counts is None else sampling.update(state.counts, token)
    chosen = None if k is None else sampling.logprobs(logits, token, k)
    made = jax.tree.map(
        lambda a: mesh.constrain(a[None], ""), StepOutput(token, chosen)
    )  # every process reads all of it
    return constrain_state(state._replace(token=token, pos=pos, counts=counts), mesh.constrain), made


def step(family: Any, cfg: Any, k: int | None, steps: int, weights: Any, state: State) -> tuple[State, StepOutput]:
    """`steps` tokens of every row."""

    def one(state: State, _: Any) -> tuple[State, StepOutput]:
        x, kv = family.forward(cfg, state.token[:, None], weights, state.kv, state.pos[:, None])
        return sample_token(family, cfg, k, weights, state._replace(kv=kv), x[:, 0])

    if steps == 1:
        return one(state, None)
    state, made = jax.lax.scan(one, state, length=steps)
    return state, jax.tree.map(lambda a: a[:, 0], made)


def insert(state: State, rows: jax.Array, part: State) -> State:
    """Puts the rows of `part` (batch b) into rows [b] of a state; a row number past the end is dropped."""
    kv = caches.insert(state.kv, part.kv, rows)
    put = partial(jax.tree.map, lambda old, new: old.at[rows].set(new, mode="drop"))
    state = State(kv, *(put(old, new) for old, new in zip(state[1:], part[1:], strict=True)))
    return constrain_state(state, mesh.constrain)


@cache
def compiled_for(family: Any, cfg: Any) -> dict[Any, Any]:
    """The programs of one architecture, shared by all models of its shape."""
    return {}


class CompiledSteps:
    """Compiled programs of one model, by what they were compiled for. `notify(name)` is called before a compilation
    and `notify(name, seconds)` after."""

    def __init__(self, family: Any, cfg: Any):
        self.family, self.cfg = family, cfg
        self.compiled = compiled_for(family, cfg)
        self.seconds = 0.0
        self.notify: Callable[..., None] = lambda name, seconds=None: None

    def prefill(self, *args: Any) -> Callable[..., Any]:
        return self._get("prefill", partial(prefill, self.family, self.cfg), (), (1, 2), args)

    def pick(self, k: int | None, *args: Any) -> Callable[..., Any]:
        return self._get("first token", partial(sample_token, self.family, self.cfg, k), (k,), (1,), args)

    def step(self, k: int | None, steps: int, *args: Any) -> Callable[..., Any]:
        return self._get("decode", partial(step, self.family, self.cfg, k, steps), (k, steps), (1,), args)

    def insert(self, *args: Any) -> Callable[..., Any]:
        return self._get("insert", insert, (), (0,), args)

    def grow(self, *args: Any) -> Callable[..., Any]:
        return self._get("larger cache", caches.resize_cache, (), (0,), args)

    def _get(self, name: str, function: Any, static: tuple[Any, ...], donate: tuple[int, ...], args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        key = (name, static, tree, frozenset(a.sharding for a in leaves), tuple((a.shape, a.dtype) for a in leaves))
        if key not in self.compiled:
            self.notify(name)
            start = time.perf_counter()
            options = hardware.COMPILER_OPTIONS.get(next(iter(leaves[0].sharding.device_set)).platform)
            program = jax.jit(function, donate_argnums=donate, compiler_options=options)
            with mesh.use_mesh_of(args):
                self.compiled[key] = program.lower(*args).compile()
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.notify(name, seconds)
        return self.compiled[key]


def chunks(ids: list[list[int]], start: int, width: int, chunk: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts as padded (tokens, pos) pieces [B,T] of at most `chunk` tokens; `width` is the length of the longest.

    Only the last piece is shorter, and its length a bucket.
    """
    pieces = []
    for begin in range(0, width, chunk):
        T = min(chunk, bucket(width - begin))
        tokens, pos = np.zeros((len(ids), T), np.int32), np.full((len(ids), T), -1, np.int32)
        for row, prompt in enumerate(ids):
            part = prompt[begin : begin + T]
            tokens[row, : len(part)] = part
            pos[row, : len(part)] = start + begin + np.arange(len(part))
        pieces.append((tokens, pos))
    return pieces

"""Prefill, insert and decode: the pure functions of generation, and the programs compiled from them.

A batch of B rows is a `State`. `prefill` runs prompts through the model and fills a separate KV cache. `insert` copies
these rows into the state of a batch. `step` generates the next token of every row. Rows are independent: each has its
own sampling parameters, PRNG key and position, so its text does not depend on the other rows.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.devices import hardware, mesh
from jaxlm.inference import cache_rows, sampling
from jaxlm.inference.sampling import Counts, Sampling
from jaxlm.nn import kv_cache as caches

if TYPE_CHECKING:
    from jaxlm.model import Model


class State(NamedTuple):
    """The decoding state of a batch of B rows."""

    kv: Any  # KVCache; None for rows that are not yet in a batch
    token: Int[Array, " B"]  # the last sampled token, not yet in the KV cache
    pos: Int[Array, " B"]  # its position
    keys: Key[Array, " B"]  # typed PRNG keys, one per sequence
    sampling: Sampling
    counts: Counts | None  # None if no row has a penalty
    bias: Float[Array, "B V"] | None  # None if no row has a logit bias


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

    Returns:
        The KV cache with the chunk, and the hidden state [B,D] of the last token of each row. A row without a token in
        this chunk keeps its `last`.
    """
    x, kv = family.forward(cfg, tokens, weights, kv, pos)
    newest = jnp.argmax(pos, axis=1)
    x = jnp.take_along_axis(x, newest[:, None, None], axis=1)[:, 0]
    kv = caches.map_arrays(kv, mesh.constrain)
    return kv, mesh.constrain(jnp.where((pos >= 0).any(axis=1)[:, None], x, last), "BD")


def sample_token(
    family: Any, cfg: Any, k: int | None, weights: Any, state: State, x: Float[Array, "B D"]
) -> tuple[State, StepOutput]:
    """Samples the next token of each row from its last hidden state x [B,D]. k: number of top log-probabilities."""
    logits = family.logits(cfg, x[:, None], weights)[:, 0]
    pos = state.pos + 1
    keys = sampling.step_keys(state.keys, pos)
    token = sampling.sample(logits, state.sampling, keys, state.counts, state.bias)
    token = jnp.where(jnp.isfinite(jnp.max(jnp.abs(logits), axis=1)), token, NOT_FINITE)
    counts = None if state.counts is None else sampling.update(state.counts, token)
    chosen = None if k is None else sampling.logprobs(logits, token, k)
    # Replicated, because every process fetches all tokens.
    output = jax.tree.map(lambda a: mesh.constrain(a[None], ""), StepOutput(token, chosen))
    return constrain_state(state._replace(token=token, pos=pos, counts=counts), mesh.constrain), output


def step(family: Any, cfg: Any, k: int | None, steps: int, weights: Any, state: State) -> tuple[State, StepOutput]:
    """Decodes `steps` tokens of every row."""

    def one(state: State, _: Any) -> tuple[State, StepOutput]:
        x, kv = family.forward(cfg, state.token[:, None], weights, state.kv, state.pos[:, None])
        return sample_token(family, cfg, k, weights, state._replace(kv=kv), x[:, 0])

    if steps == 1:
        return one(state, None)
    state, output = jax.lax.scan(one, state, length=steps)
    return state, jax.tree.map(lambda a: a[:, 0], output)


def insert(state: State, rows: Int[Array, " b"], part: State) -> State:
    """Inserts the rows of `part` (batch b) into `rows` [b] of a state. Row indices past the end are dropped."""
    kv = cache_rows.insert(state.kv, part.kv, rows)
    put = partial(jax.tree.map, lambda old, new: old.at[rows].set(new, mode="drop"))
    state = State(kv, *(put(old, new) for old, new in zip(state[1:], part[1:], strict=True)))
    return constrain_state(state, mesh.constrain)


MAX_EXECUTABLES = 256  # per architecture; the oldest is evicted
# Callback: called with the name of a program before it is compiled, and with its name and the seconds afterwards.
on_compile: ContextVar[Callable[..., None]] = ContextVar("on_compile", default=lambda name, seconds=None: None)


@lru_cache(maxsize=16)
def executables(family: Any, cfg: Any) -> dict[Any, Any]:
    """Cache of the compiled programs of one architecture, shared by all models with this config: key -> executable."""
    return {}


PATIENCE = 0.3  # seconds in which a program that is on disk is there; others are traced after them
WORKERS = min(4, os.cpu_count() or 1)  # programs that are compiled at the same time


class CompiledSteps:
    """Prefill, sampling and decoding of one model as compiled programs.

    A program is compiled ahead of time for each new combination of shapes, types and shardings of its arguments. The
    KV cache and the state among the arguments are donated.

    Python traces a program, then XLA compiles it without the GIL. While the caller waits for a program on CPU, those
    that it will need next are traced, and compiled beside it (`expect`).

    Attributes:
        model: The model.
        seconds: Time spent compiling so far, in seconds.
    """

    def __init__(self, model: "Model"):
        self.model: Model = model
        self.seconds: float = 0.0
        self._executables = executables(model.family, model.config)
        # Several programs are compiled at the same time for a single CPU only. On a mesh, the shardings of a program's
        # results are known only after it is compiled. For GPU, XLA times kernels while it compiles, which other work on
        # the device would disturb.
        self._beside: bool = model.mesh is None and model.device.platform == "cpu"
        self._ahead: bool = False  # compile programs without running them
        self._expected: list[Callable[[], Any]] = []
        self._compiling: dict[Any, Future[Any]] = {}
        self._workers: ThreadPoolExecutor | None = None
        self._weights = signature(model.weights)  # computed once, because there are hundreds of arrays

    def expect(self, *calls: Callable[[], Any]) -> None:
        """Names the programs that are needed next, in this order. They are compiled if a program is waited for.

        Args:
            calls: Calls of methods such as `step`, with `shapes` in place of the arrays.
        """
        self._expected = list(calls) if self._beside else []

    def cancel(self) -> None:
        """Drops the programs of `expect` that are not being compiled yet. Those that are will be kept."""
        self._expected = []
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)
        self._workers, self._compiling = None, {}

    def prefill(self, kv: Any, last: jax.Array, tokens: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array]:
        return self._run("prefill", self._bound(prefill), (), (1, 2), True, kv, last, tokens, pos)

    def sample_token(self, k: int | None, state: State, x: jax.Array) -> tuple[State, StepOutput]:
        return self._run("first token", self._bound(sample_token, k), (k,), (1,), True, state, x)

    def step(self, k: int | None, steps: int, state: State) -> tuple[State, StepOutput]:
        return self._run("decode", self._bound(step, k, steps), (k, steps), (1,), True, state)

    def insert(self, state: State, rows: jax.Array, part: State) -> State:
        return self._run("insert", insert, (), (0,), False, state, rows, part)

    def resize_cache(self, cache: Any, part: Any) -> Any:
        return self._run("larger KV cache", cache_rows.resize_cache, (), (0,), False, cache, part)

    def _bound(self, function: Any, *static: Any) -> Any:
        return partial(function, self.model.family, self.model.config, *static)

    def _run(self, name: str, function: Any, static: Any, donate: Any, weighted: bool, *args: Any) -> Any:
        key = (name, static, self._weights if weighted else None, signature(args))
        args = (self.model.weights, *args) if weighted else args
        executable = self._executables.get(key)
        if self._ahead:
            return None if executable else self._start(key, function, donate, args)
        return (executable or self._compile(key, function, donate, args))(*args)

    def _compile(self, key: Any, function: Any, donate: tuple[int, ...], args: Any) -> Any:
        """Waits for a program."""
        notify, start = on_compile.get(), time.perf_counter()
        notify(key[0])
        compiling = self._start(key, function, donate, args)
        while self._expected and not wait([compiling], timeout=PATIENCE).done:
            self._ahead = True
            try:
                with suppress(Exception):  # if the program is needed, it is traced again and raises then
                    self._expected.pop(0)()
            finally:
                self._ahead = False
        executable = compiling.result()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        notify(key[0], seconds)
        return executable

    def _start(self, key: Any, function: Any, donate: tuple[int, ...], args: Any) -> "Future[Any]":
        """Traces a program, and compiles it: if others may be compiled beside it, in another thread."""

        def compiled() -> Any:
            with mesh.use_mesh_of(args):
                executable = lowered.compile()
            while len(self._executables) >= MAX_EXECUTABLES:
                with suppress(RuntimeError):  # another thread has changed it
                    self._executables.pop(next(iter(self._executables)), None)
            self._executables[key] = executable
            return executable

        if key not in self._compiling:
            lowered = lower_program(function, donate, args)
            if self._beside:
                self._workers = self._workers or ThreadPoolExecutor(WORKERS, "jaxlm-compile")
                self._compiling[key] = self._workers.submit(compiled)
            else:
                done: Future[Any] = Future()
                done.set_result(compiled())
                self._compiling[key] = done
        return self._compiling[key]


def shapes(tree: Any) -> Any:
    """Shape, dtype and sharding of each array of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def lower_program(function: Any, donate: tuple[int, ...], args: Any) -> Any:
    """Traces `function` for these arguments (arrays, or jax.ShapeDtypeStruct with shardings)."""
    platform = next(iter(jax.tree.leaves(args)[0].sharding.device_set)).platform
    program = jax.jit(function, donate_argnums=donate, compiler_options=hardware.COMPILER_OPTIONS.get(platform))
    with mesh.use_mesh_of(args):
        return program.lower(*args)


def compile_program(function: Any, donate: tuple[int, ...], args: Any) -> Any:
    """Compiles `function` for these arguments without running it."""
    with mesh.use_mesh_of(args):
        return lower_program(function, donate, args).compile()


def signature(tree: Any) -> Any:
    """The key of a compiled program: the structure of its arguments, and shape, dtype and sharding of each array. A KV
    cache is represented by its first layer, which determines the others."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, caches.KVCache))
    return structure, tuple(_signature(leaf) for leaf in leaves)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, caches.KVCache):
        first = leaf.layers[0]["k"]
        # A cache that a program returns has sorted keys, a new one may not.
        sizes = tuple(sorted(leaf.positions)), leaf.length, leaf.chunk
        return *sizes, first.shape, first.dtype, first.sharding
    return leaf.shape, leaf.dtype, leaf.sharding


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


def chunks(ids: list[list[int]], start: int, sizes: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits prompts into padded chunks (`chunk_widths`).

    Args:
        ids: Token ids of each row.
        start: Position of the first token.
        sizes: Tokens per row of the chunks, the largest first.

    Returns:
        For each chunk, tokens and positions [B,T] int32, with position -1 for padding.
    """
    pieces, begin = [], 0
    for T in chunk_widths(max(map(len, ids)), sizes, len(ids)):
        tokens, pos = np.zeros((len(ids), T), np.int32), np.full((len(ids), T), -1, np.int32)
        for row, prompt in enumerate(ids):
            part = prompt[begin : begin + T]
            tokens[row, : len(part)] = part
            pos[row, : len(part)] = start + begin + np.arange(len(part))
        pieces.append((tokens, pos))
        begin += T
    return pieces

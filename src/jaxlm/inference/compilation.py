"""Compiles the functions of decoding.py ahead of time, for each new combination of shapes, and keeps the programs."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.devices import hardware, mesh
from jaxlm.inference import cache_rows, decoding
from jaxlm.inference.decoding import State, StepOutput
from jaxlm.inference.sampling import LogitsProcessor
from jaxlm.nn import kv_cache as caches

if TYPE_CHECKING:
    from jaxlm.model import Model

MAX_EXECUTABLES = 1024  # in the process; those least recently used are evicted
# XLA maps each kernel of a CPU program separately: up to 1,700 mappings for a model with 30 layers. Linux limits those
# of a process, usually to 65,530. XLA, and Python itself, crash when they get no more.
MAX_MAPPINGS = 0.7  # as a fraction of the limit
MAPS, MAX_MAP_COUNT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
# Callback: called with the name of a program before it is compiled, and with its name and the seconds afterwards.
on_compile: ContextVar[Callable[..., None]] = ContextVar("on_compile", default=lambda name, seconds=None: None)


PATIENCE = 0.3  # seconds in which a program that is on disk is there; others are traced after them
WORKERS = min(4, os.cpu_count() or 1)  # programs that are compiled at the same time
_running: set[Future[Any]] = set()  # programs that are compiled now, or will be


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    """The threads that compile, for the whole process."""
    return ThreadPoolExecutor(WORKERS, "jaxlm-compile")


_programs: dict[Any, "_Program"] = {}  # (architecture, key) -> program
_lock = threading.Lock()  # of changes to _programs
_clock = itertools.count()


@dataclass
class _Program:
    """A compiled program, and the time of its last use: a number that increases."""

    executable: Any
    used: int


def executables(family: Any, cfg: Any) -> dict[Any, Any]:
    """The compiled programs of one architecture, which all models with this config share: key -> executable."""
    with _lock:
        programs = [*_programs.items()]
    return {key: program.executable for (owner, key), program in programs if owner == (family, cfg)}


def clear_executables() -> None:
    """Drops all compiled programs of this process."""
    with _lock:
        _programs.clear()


def _find(key: Any) -> Any:
    """A compiled program, or None. It hashes the key once: keys are large, and this runs at every step."""
    program = _programs.get(key)
    if program is None:
        return None
    program.used = next(_clock)
    return program.executable


def _keep(key: Any, executable: Any) -> None:
    """Keeps a compiled program. Evicts those least recently used if there are too many, or too many mappings."""
    with _lock:
        _programs[key] = _Program(executable, next(_clock))
        surplus = len(_programs) - MAX_EXECUTABLES
        if mappings() > MAX_MAPPINGS:
            surplus = max(surplus, len(_programs) // 4)
        if surplus > 0:
            for old in sorted(_programs, key=lambda key: _programs[key].used)[:surplus]:
                del _programs[old]


def mappings() -> float:
    """Memory mappings of this process, as a fraction of those that Linux allows; 0 on other systems."""
    with suppress(OSError):
        return MAPS.read_bytes().count(b"\n") / int(MAX_MAP_COUNT.read_text())
    return 0.0


def wait_for_background() -> None:
    """Waits until no program is compiled any more."""
    wait([*_running])


class CompiledSteps:
    """Prefill, sampling and decoding of one model as compiled programs.

    A program is compiled ahead of time for each new combination of shapes, types and shardings of its arguments. The
    KV cache and the state among the arguments are donated.

    Python traces a program, then XLA compiles it without the GIL. While the caller waits for a program on CPU, those
    that it will need next are traced, and compiled beside it (`expect`).

    Attributes:
        model: The model.
        processors: Functions of the logits [B,V], which are part of the programs.
        seconds: Time spent compiling so far, in seconds.
        compiled: Number of programs compiled so far.
    """

    def __init__(self, model: "Model", processors: tuple[LogitsProcessor, ...] = ()):
        self.model: Model = model
        self.processors: tuple[LogitsProcessor, ...] = processors
        self.compiled: int = 0
        self.seconds: float = 0.0
        self._architecture = (model.family, model.config)
        # Several programs are compiled at the same time for a single CPU only. On a mesh, the shardings of a program's
        # results are known only after it is compiled. For GPU, XLA times kernels while it compiles, which other work on
        # the device would disturb.
        self._beside: bool = model.mesh is None and model.device.platform == "cpu"
        self._ahead: bool = False  # compile programs without running them
        self._expected: list[Callable[[], Any]] = []
        self._compiling: dict[Any, Future[Any]] = {}
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
        for future in [*self._compiling.values()]:
            future.cancel()
        self._compiling = {}

    def prefill(
        self, kv: Any, last: jax.Array, tokens: jax.Array, pos: jax.Array, adapter: jax.Array | None = None
    ) -> tuple[Any, jax.Array]:
        return self._run("prefill", self._bound(decoding.prefill), (), (1, 2), True, kv, last, tokens, pos, adapter)

    def prefill_logprobs(
        self,
        k: int,
        kv: Any,
        last: jax.Array,
        tokens: jax.Array,
        pos: jax.Array,
        targets: jax.Array,
        adapter: jax.Array,
    ) -> tuple[Any, jax.Array, Any]:
        function, args = self._bound(decoding.prefill_logprobs, k), (kv, last, tokens, pos, targets, adapter)
        return self._run("prefill with logprobs", function, (k,), (1, 2), True, *args)

    def sample_token(self, k: int | None, state: State, x: jax.Array, *mask: jax.Array) -> tuple[State, StepOutput]:
        """mask: None or one, the tokens that are allowed."""
        static = (k, self.processors)
        return self._run(
            "first token", self._bound(decoding.sample_token, *static), static, (1,), True, state, x, *mask
        )

    def forward_step(self, state: State) -> tuple[State, jax.Array]:
        return self._run("decode", self._bound(decoding.forward_step), ("forward",), (1,), True, state)

    def step(self, k: int | None, steps: int, state: State) -> tuple[State, StepOutput]:
        static = (k, self.processors, steps)
        return self._run("decode", self._bound(decoding.step, *static), static, (1,), True, state)

    def release(self, state: State, finished: jax.Array) -> State:
        pos = self._run("release", decoding.release, (), (0,), False, state.pos, finished)
        return state._replace(pos=pos)

    def insert(self, state: State, rows: jax.Array, part: State) -> State:
        return self._run("insert", decoding.insert, (), (0,), False, state, rows, part)

    def take(self, part: Any, cache: Any, rows: jax.Array, keep: jax.Array) -> Any:
        return self._run("cached prefix", cache_rows.take, (), (0,), False, part, cache, rows, keep)

    def clear(self, cache: Any, row: jax.Array) -> Any:
        return self._run("clear", cache_rows.clear, (), (0,), False, cache, row)

    def resize_cache(self, cache: Any, part: Any) -> Any:
        return self._run("larger KV cache", cache_rows.resize_cache, (), (0,), False, cache, part)

    def _bound(self, function: Any, *static: Any) -> Any:
        return partial(function, self.model.family, self.model.config, *static)

    def _run(self, name: str, function: Any, static: Any, donate: Any, weighted: bool, *args: Any) -> Any:
        key = (name, static, self._weights if weighted else None, signature(args))
        args = (self.model.weights, *args) if weighted else args
        executable = _find((self._architecture, key))
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
        self.compiled += 1
        notify(key[0], seconds)
        return executable

    def _start(self, key: Any, function: Any, donate: tuple[int, ...], args: Any) -> "Future[Any]":
        """Traces a program, and compiles it: if others may be compiled beside it, in another thread."""

        def compiled() -> Any:
            with mesh.use_mesh_of(args):
                executable = lowered.compile()
            _keep((self._architecture, key), executable)
            return executable

        if (compiling := self._compiling.get(key)) is not None:
            return compiling
        lowered, future = lower_program(function, donate, args), Future()
        if self._beside:
            self._compiling[key] = future = _workers().submit(compiled)
            _running.add(future)
            future.add_done_callback(_running.discard)
            future.add_done_callback(lambda _: self._compiling.pop(key, None))
        else:
            future.set_result(compiled())
        return future


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


def kept_program(model: "Model", name: str, function: Any, *args: Any) -> Any:
    """The program of a function of the weights and these arguments, which is kept beside those of `CompiledSteps`. It
    can be called from any thread.

    Args:
        model: The model.
        name: Name of the program.
        function: Called with the weights and `args`.
        args: Arrays.
    """
    key = (model.family, model.config), (name, signature(model.weights), signature(args))
    executable = _find(key)
    if executable is None:
        executable = compile_program(function, (), (model.weights, *args))
        _keep(key, executable)
    return executable


def signature(tree: Any) -> Any:
    """The key of a compiled program: the structure of its arguments, and shape, dtype and sharding of each array. A KV
    cache is represented by its first layer, which determines the others."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, caches.KVCache))
    return structure, tuple(_signature(leaf) for leaf in leaves)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, caches.KVCache):
        first = [(a.shape, a.dtype, a.sharding) for a in jax.tree.leaves(leaf.layers[0]["k"])]
        # A cache that a program returns has sorted keys, a new one may not.
        sizes = tuple(sorted(leaf.positions)), leaf.length, leaf.chunk
        return *sizes, *first
    return leaf.shape, leaf.dtype, leaf.sharding

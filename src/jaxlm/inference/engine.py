"""The engine: requests come and go at any time, from any thread, and are decoded together (scheduler.py)."""

import asyncio
import atexit
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, Unpack
from weakref import WeakSet

from jaxlm.adapters import combine
from jaxlm.devices import hardware, mesh
from jaxlm.inference import memory, saved_prefixes, warmup
from jaxlm.inference.compilation import CompiledSteps
from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.memory import CacheLengths
from jaxlm.inference.prompts import TooLongError
from jaxlm.inference.requests import Request, RequestOptions, requests_for, require_untraced
from jaxlm.inference.sampling import LogitsProcessor
from jaxlm.inference.scheduler import Scheduler
from jaxlm.inference.streams import Stream, checked
from jaxlm.model import Model, require_model


class Engine:
    """Decodes many requests together. All methods can be called from any thread.

        engine = jaxlm.Engine(model, slots=8)
        first = engine.submit("Once upon a time", max_tokens=50)
        second = engine.submit([{"role": "user", "content": "Why is the sky blue?"}], temperature=0.7, seed=1)
        while engine.is_busy:
            for chunk in engine.step():
                print(chunk.request is first, chunk)

    `stream` and `astream` run the steps in a thread of the engine instead.

    Attributes:
        model: The model.
        slots: Number of rows: how many requests are decoded together (batch size).
        length: Maximum number of tokens of a prompt and its answer.
        adapters: The models with adapters, by name.
        steps: The compiled functions of the model.
        scheduler: The rows and the requests. `scheduler.hits` of `scheduler.prompt_tokens` tokens were in the prefix
            cache.
    """

    def __init__(
        self,
        model: Model,
        slots: int | None = None,
        *,
        length: int | None = None,
        prefix_cache: bool = True,
        logits_processors: Sequence[LogitsProcessor] = (),
        adapters: Mapping[str, Model] | None = None,
        lengths: CacheLengths | None = None,
    ):
        """Plans the memory of the KV caches. They are allocated when they are needed.

        Args:
            model: The model.
            slots: Number of rows. The default depends on the platform.
            length: Maximum number of tokens of a prompt and its answer. Default: the context length, or as much of it
                as fits in memory.
            prefix_cache: Whether new requests reuse the keys and values of earlier ones. Sliding-window layers then
                store all positions.
            logits_processors: Functions of the logits [B,V] float32 of all requests, which are compiled into the
                programs.
            adapters: Models that `load_adapter` made of `model`, by name. A request chooses one (adapter=NAME); those
                of one batch may choose different ones. All of them take part in each step: their ranks add up.
            lengths: Lengths of the KV caches, in place of `length`.

        Raises:
            MemoryError: The KV caches do not fit.
            ValueError: slots or length is out of range, or an adapter does not belong to the model.
        """
        require_model(model, "Engine")
        require_untraced(model, "Engine")
        if slots is not None and slots < 1:
            raise ValueError(f"slots={slots}: must be 1 or more")
        self.model: Model = model
        rings = not prefix_cache or not any(model.config.windows)
        self.slots: int = mesh.round_up_batch(slots or hardware.BATCH[model.device.platform], model.mesh)
        lengths = lengths or memory.plan_lengths(model, self.slots, length, rings)
        self.length: int = lengths.decode[-1]
        self.adapters: dict[str, Model] = dict(adapters or {})
        combined = combine(model, [*self.adapters.values()])
        self.steps: CompiledSteps = CompiledSteps(combined, tuple(logits_processors))
        self.scheduler: Scheduler = Scheduler(self.steps, self.slots, lengths, prefix_cache)
        self._inbox: deque[Request] = deque()
        self._cancelled: list[Request] = []
        self._stepping, self._changed = threading.RLock(), threading.RLock()
        self._waiting: int = 0  # threads that wait to run between steps
        self._driver: threading.Thread | None = None
        self._closed: bool = False

    def __repr__(self) -> str:
        has_slot = sum(slot.request is not None for slot in self.scheduler.rows)
        waiting = len(self.scheduler.waiting) + len(self._inbox)
        return f"Engine({self.slots} slots of {self.length:,} tokens, {has_slot} in use, {waiting} requests waiting)"

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "an Engine cannot be pickled or copied, because it has threads and compiled programs: create another one "
            "from its model"
        )

    # Requests

    def submit(self, prompt: Any, *, adapter: str | None = None, **options: Unpack[RequestOptions]) -> Request:
        """Adds a request. It begins in a later `step`, which the caller, or a running `stream`, calls.

        Args:
            prompt: A text, a list of messages or a list of token ids.
            adapter: Name of the adapter that computes the answer. Default: none.
            **options: See RequestOptions.

        Raises:
            ValueError: The prompt or an option is invalid, or prompt and max_tokens are too long.
            RuntimeError: The engine is closed.
        """
        [request] = self.requests([prompt], options, adapter=adapter)
        self.add(request)
        return request

    def requests(
        self, prompts: Sequence[Any], options: Mapping[str, Any], n: int = 1, adapter: str | None = None
    ) -> list[Request]:
        """Prepares n requests for each prompt, for `add` and `follow`.

        Raises:
            ValueError: A prompt or an option is invalid, or a prompt is too long.
        """
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"unknown adapter {adapter!r}: this engine has {', '.join(self.adapters) or 'none'}")
        requests = requests_for(self.model if adapter is None else self.adapters[adapter], prompts, options, n)
        if adapter is not None:
            for request in requests:
                request.adapter = [*self.adapters].index(adapter)
        if options.get("max_tokens") is None:  # the default is what fits
            for request in requests:
                if len(request.ids) >= self.length:
                    raise TooLongError(
                        f"the prompt has {len(request.ids):,} tokens, and the length of this engine is "
                        f"{self.length:,}: shorten the prompt, or use a longer length"
                    )
                request.max_tokens = max(1, min(request.max_tokens, self.length - len(request.ids)))
        return requests

    def add(self, *requests: Request) -> None:
        """Adds requests that are already prepared.

        Raises:
            ValueError: A request is too long.
            RuntimeError: The engine is closed.
        """
        for request in requests:
            if len(request.ids) + request.max_tokens > self.length:
                raise TooLongError(
                    f"{len(request.ids):,} prompt tokens and max_tokens={request.max_tokens:,} exceed the length of "
                    f"this engine, {self.length:,}: shorten the prompt, reduce max_tokens, or use a longer length"
                )
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed: create another one")
            self._inbox.extend(requests)

    def cancel(self, request: Request) -> None:
        """Ends a request. Its last chunk, with finish_reason "cancelled", comes from a later `step`."""
        with self._changed:
            if not request.finished:
                self._cancelled.append(request)

    def prepare(
        self, *, full: bool = True, constraints: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Compiles all programs, so that no request waits for a compiler. This takes minutes for large models.

        Args:
            full: Also the programs for penalties, logit biases and log-probabilities (not those of the prompt).
            constraints: Also the programs for schemas, regular expressions and grammars.
            progress: Called with the number of groups of programs that are done, and with that of all. The default
                shows a bar if stderr is a terminal.

        Raises:
            RuntimeError: The engine has requests.
        """
        with self.between_steps():
            if self.is_busy:
                raise RuntimeError("prepare needs an engine without requests: call it first")
            warmup.run_all(self.scheduler, full, constraints, progress)

    def save_prefix_cache(self, path: str | Path) -> int:
        """Saves the keys and values of finished requests in a safetensors file, such as those of a long system message.

        Returns:
            The number of tokens.

        Raises:
            ValueError: The engine has no prefix cache.
            OSError: The file cannot be written.
        """
        with self._idle_prefix_cache():
            return saved_prefixes.save(self.scheduler, Path(path))

    def load_prefix_cache(self, path: str | Path) -> int:
        """Loads what `save_prefix_cache` saved, into free rows. If there are fewer, the prefixes used last are loaded.

        Returns:
            The number of tokens.

        Raises:
            ValueError: The file is damaged, is not a prefix cache, or was saved with another model. Or the engine has
                no prefix cache.
            OSError: The file cannot be read.
        """
        with self._idle_prefix_cache():
            return saved_prefixes.load(self.scheduler, Path(path))

    @contextmanager
    def _idle_prefix_cache(self) -> Iterator[None]:
        """No step runs meanwhile."""
        if not self.scheduler.prefix_cache:
            raise ValueError("this engine has no prefix cache: create it with prefix_cache=True")
        if self.model.is_multiprocess:
            raise ValueError("a prefix cache of several processes cannot be saved or loaded")
        with self.between_steps():
            yield

    def close(self) -> None:
        """Ends all requests and frees the memory of the KV cache."""
        with self._changed:
            self._closed = True
            driver = self._driver
        self.steps.cancel()
        with self.between_steps():
            for request in [*self._inbox, *self.scheduler.answers]:
                self.cancel(request)
            self._advance()
            self.scheduler.reset()
        if driver is not None and driver is not threading.current_thread():
            driver.join()

    def drop(self) -> None:
        """Frees the memory of the KV cache without a step, of an engine whose steps only the caller runs. Requests get
        no last chunk. A finalizer may call it, which must not call JAX: on Python 3.11 the process could crash."""
        self._closed = True
        self.steps.cancel()
        self.scheduler.reset()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether there are requests that have not ended, or chunks that no `step` has returned."""
        return bool(self._inbox or self.scheduler.chunks or self.scheduler.has_work)

    # Clients

    def step(self) -> list[CompletionChunk]:
        """Runs one chunk of a prefill and one decode program, as far as there are requests.

        Returns:
            New text, and the ends of requests. The last chunk of each request has a finish_reason.
        """
        with self.between_steps():
            self._advance()
            chunks, self.scheduler.chunks = self.scheduler.chunks, []
        return chunks

    def _advance(self) -> None:
        """Runs a step, after what has changed since the last one."""
        added, cancelled = self.changes()
        for request in added:
            self.scheduler.add(request)
            self._inbox.popleft()  # afterwards, so that the engine is busy throughout
        for request in cancelled:
            request.cancelled = request.cancelled or not request.finished
        self.scheduler.advance()

    def changes(self) -> tuple[list[Request], list[Request]]:
        """Requests that were added since the last step, which stay in the inbox, and cancelled ones."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            return [*self._inbox], cancelled

    def stream(self, prompt: Any, *, adapter: str | None = None, **options: Unpack[RequestOptions]) -> Stream:
        """Yields the chunks of one request. Closing or dropping the iterator cancels the request.

        Args:
            prompt: As for `submit`.
            adapter: As for `submit`.
            **options: As for `submit`.

        Raises:
            ValueError: The prompt or an option is invalid. The error of the request, if it has one, is raised too.
        """
        chunks: SimpleQueue[CompletionChunk] = SimpleQueue()
        [request] = self.requests([prompt], options, adapter=adapter)
        request.emit = chunks.put
        self.add(request)
        self._start()
        return Stream(self, request, chunks)

    async def astream(
        self, prompt: Any, *, adapter: str | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[CompletionChunk]:
        """`stream` for asyncio."""
        [request] = await asyncio.to_thread(self.requests, [prompt], options, adapter=adapter)
        async for chunk in self.follow([request]):
            yield chunk

    async def follow(self, requests: Sequence[Request]) -> AsyncGenerator[CompletionChunk, None]:
        """Adds requests that are already prepared and yields their chunks, for asyncio. Closing the iterator cancels
        the requests.

        Raises:
            ValueError: A request is too long. The first error of a request is raised too.
            RuntimeError: The engine is closed.
        """
        chunks: asyncio.Queue[CompletionChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(chunk: CompletionChunk) -> None:
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # the loop is closed: nobody reads the chunks
                self.cancel(chunk.request)

        for request in requests:
            request.emit = put
        self.add(*requests)
        self._start()
        left = len(requests)
        try:
            while left:
                chunk = checked(await chunks.get())
                left -= chunk.finish_reason is not None
                yield chunk
        finally:
            for request in requests:
                self.cancel(request)

    def _start(self) -> None:
        """Starts the thread that runs the steps, unless it runs."""
        with self._changed:
            if (self._driver is None or not self._driver.is_alive()) and not self._closed:
                run = copy_context().run  # with the callback for compilations of the caller
                self._driver = threading.Thread(target=run, args=(self._drive,), name="jaxlm-engine", daemon=True)
                _running.add(self)
                _close_at_exit()
                self._driver.start()

    def _drive(self) -> None:
        """Runs steps until there are no more requests."""
        while True:
            with self._changed:
                if self._closed or not (self._inbox or self.scheduler.has_work):
                    self._driver = None
                    return
            with self._stepping:
                self._advance()
            while self._waiting:  # locks are not fair: another thread could wait for long
                time.sleep(0.001)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A context in which no step of another thread runs. Other programs of the model run in it, because two threads
        that start programs with collectives on one mesh could wait for each other."""
        with self._changed:
            self._waiting += 1
        try:
            self._stepping.acquire()
        finally:
            with self._changed:
                self._waiting -= 1
        try:
            yield
        finally:
            self._stepping.release()


_running: WeakSet[Engine] = WeakSet()  # engines that had a thread


@cache
def _close_at_exit() -> None:
    """Closes engines before the process exits. It would abort if a thread ran a program of XLA then."""
    atexit.register(lambda: [engine.close() for engine in [*_running]])

"""One engine over several processes (multi-host): process 0 takes the requests, and all processes run the same steps.

Process 0 has a Leader, the others call `follow`. Before each step, the leader sends what has changed since the last
one: new requests and cancelled ones. What a scheduler does depends on nothing else, so all processes then run the same
programs. Without requests, the leader sends an empty message now and then, which also shows that it is alive.
"""

import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from jaxlm.devices import distributed
from jaxlm.inference.engine import Engine
from jaxlm.inference.requests import Request
from jaxlm.inference.structured import compile_grammar, schema_text

IDLE = 2.0  # seconds between messages while there are no requests
CLOSED = b""  # the last message
# Fields of a request that are sent. A constraint is sent as the text of its grammar, and a key as its data.
SENT = ("ids", "options", "max_tokens", "stop_ids", "index", "sample", "prompt_logprobs", "echo", "adapter",
        "skip_special_tokens")  # fmt: skip


class Leader(Engine):
    """The engine of process 0. Use `stream`, `astream` or `follow`: its own thread runs the steps.

    Attributes:
        failure: The error that ended the steps, such as that of another process that died; None while they run.
        on_failure: Called then, from the thread of the engine.
    """

    def __init__(self, *args: Any, **options: Any):
        """Takes the arguments of Engine. All processes must create theirs with the same ones."""
        super().__init__(*args, **options)
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._grammars: WeakKeyDictionary[Request, dict[str, Any]] = WeakKeyDictionary()
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._count = itertools.count()
        self._arrived = threading.Event()  # a request, or the end

    def start(self) -> None:
        """Begins the steps, after `prepare`. The other processes call `follow` then."""
        self._start()

    def requests(
        self, prompts: Sequence[Any], options: Mapping[str, Any], n: int = 1, adapter: str | None = None
    ) -> list[Request]:
        """As in Engine.

        Raises:
            ValueError: Also for `constraint` and `stop_when`, because functions cannot be sent.
        """
        if functions := [name for name in ("constraint", "stop_when") if options.get(name) is not None]:
            raise ValueError(f"{functions[0]} is a function, which several processes cannot share: use a grammar")
        # Without a seed, all processes would have to draw one together.
        seed = int.from_bytes(os.urandom(4), "little") if options.get("seed") is None else options["seed"]
        requests = super().requests(prompts, {**options, "seed": seed}, n, adapter)
        grammar = {name: options[name] for name in ("regex", "grammar") if options.get(name) is not None}
        if options.get("schema") is not None:
            grammar["schema"] = schema_text(options["schema"])
        self._grammars.update(dict.fromkeys(requests, grammar))
        return requests

    def add(self, *requests: Request) -> None:
        super().add(*requests)
        self._arrived.set()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._arrived.set()
        try:
            super().close()
            distributed.broadcast_bytes(CLOSED)
        except Exception as error:  # another process has died meanwhile
            self.failure = self.failure or error

    def _drive(self) -> None:
        """Runs steps until the end."""
        try:
            while not self._closed:
                if not self.is_busy:
                    self._arrived.wait(IDLE)
                self._arrived.clear()
                with self._stepping:
                    if not self._closed:
                        self._advance()
                while self._waiting:
                    time.sleep(0.001)
        except Exception as error:
            self._fail(error)

    def changes(self) -> tuple[list[Request], list[Request]]:
        """Sends the changes to the other processes."""
        added, cancelled = super().changes()
        self._numbers.update({request: next(self._count) for request in added})
        sent = [(self._numbers[request], _values(request), self._grammars[request]) for request in added]
        ended = [self._numbers[request] for request in cancelled if request in self._numbers]
        distributed.broadcast_bytes(pickle.dumps((sent, ended)))
        return added, cancelled

    def _fail(self, error: Exception) -> None:
        """Ends all requests after an error. The processes may differ from now on, so there are no more steps."""
        with self._changed:
            self._closed, self.failure = True, error
            while self._inbox:
                self.scheduler.add(self._inbox.popleft())
        for request, answer in [*self.scheduler.answers.items()]:
            request.fail(RuntimeError(f"the engine is closed: {error}"))
            del self.scheduler.answers[request]
            if request.emit is not None:
                request.emit(answer.end())
        self.on_failure()


def follow(engine: Engine) -> None:
    """Runs the steps of the leader until it closes its engine.

    Args:
        engine: An engine with the arguments of the leader's.
    """
    requests: dict[int, Request] = {}
    while message := distributed.broadcast_bytes(CLOSED):
        added, cancelled = pickle.loads(message)  # of the same program, in another process
        for number, values, grammar in added:
            requests[number] = _received(engine, values, grammar)
            engine.scheduler.add(requests[number])
        for number in cancelled:
            if number in requests:
                requests[number].cancelled = True
        engine.scheduler.advance()
        engine.scheduler.chunks.clear()
        requests = {number: request for number, request in requests.items() if not request.finished}
    engine.close()


def _values(request: Request) -> dict[str, Any]:
    """The fields of a request that are sent."""
    return {name: getattr(request, name) for name in SENT} | {"key": np.asarray(jax.random.key_data(request.key))}


def _received(engine: Engine, values: Mapping[str, Any], grammar: Mapping[str, Any]) -> Request:
    """A request from the fields that were sent."""
    model = [engine.model, *engine.adapters.values()][values["adapter"] + 1]
    constraint = None
    if grammar:
        assert model.tokenizer is not None  # else the leader would have refused it
        ends = sorted(values["stop_ids"])
        constraint = compile_grammar(model.tokenizer, model.config.V, stop_ids=ends, **grammar).start()
    key = jax.random.wrap_key_data(values["key"])
    return Request(**{**values, "key": key}, tokenizer=model.tokenizer, constraint=constraint)

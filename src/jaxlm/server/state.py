"""The state of the server, and its errors: a body becomes requests of the engine."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.decoding import NotFiniteError
from jaxlm.inference.embeddings import Embedder
from jaxlm.inference.engine import Engine
from jaxlm.inference.prompts import TooLongError
from jaxlm.inference.requests import Request
from jaxlm.model import Model
from jaxlm.server import responses
from jaxlm.server.metrics import Metrics

_log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
MAX_GRAMMAR = 64 << 10  # characters of a schema, regular expression or grammar
BODY_SECONDS = 60.0  # until the body of a request has arrived


class Refused(Exception):
    """An error of the protocol."""

    def __init__(
        self, status: int, text: str, kind: str = "invalid_request_error", code: str | None = None, **headers: str
    ):
        super().__init__(text)
        self.status, self.kind, self.code = status, kind, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        return JSONResponse(responses.error(str(self), self.kind, self.code), self.status, self.headers)


@dataclass
class Served:
    """A model of the server: the one that it was started with, or one of its adapters.

    Attributes:
        name: Its name in the protocol.
        model: The model. Models with adapters share the weights of the base, but may have another tokenizer.
        adapter: Name of the adapter; None for the base.
        embedder: Computes embeddings between the steps of the engine.
    """

    name: str
    model: Model
    adapter: str | None
    embedder: Embedder


@dataclass
class Server:
    """The state of the application.

    Attributes:
        model: The base model.
        engine: Its engine.
        name: Name of the base model in the protocol. Each adapter of the engine is a model under its own name.
        keys: API keys; empty if none is needed.
        max_waiting: Requests that may wait for a slot.
        max_body: Bytes of a request at most.
        hosts: Values of the Host header that are answered, besides IP addresses; None for all.
        origins: Origins of web pages that may use the server (CORS); "*" for all.
        request_timeout: Seconds that an answer may take; None for no limit.
        active: Requests that have not ended.
        refusals: Times of the requests that were refused in the last second.
        models: The models by name.
        embedding: Held by the request whose embeddings are computed.
    """

    model: Model
    engine: Engine
    name: str
    keys: Sequence[str] = ()
    max_waiting: int = 256
    max_body: int = 8 << 20
    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()
    request_timeout: float | None = None
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    refusals: deque[float] = field(default_factory=deque)
    models: dict[str, Served] = field(init=False)
    embedding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        if self.name in self.engine.adapters:
            raise ValueError(f"an adapter and the base model have the name {self.name}: choose another one")
        named = {self.name: self.model, **self.engine.adapters}
        self.models = {
            name: Served(name, model, None if name == self.name else name, Embedder(model, self.engine.between_steps))
            for name, model in named.items()
        }

    async def read(self, http: HttpRequest, kind: type[Body]) -> Body:
        """The body of a request."""
        data = await self._data(http)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise Refused(400, "the body must be a JSON object")
        try:
            body = kind.model_validate(found)
        except (ValidationError, RecursionError) as error:
            raise Refused(400, _explained(error)) from None
        return body

    async def _data(self, http: HttpRequest) -> bytes:
        """The body as it is. The connection ends where the rest of it is not read."""
        too_large = Refused(
            413, f"the body has more than {self.max_body:,} bytes: send a shorter prompt", Connection="close"
        )
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    data += chunk
                    if len(data) > self.max_body:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body took more than {BODY_SECONDS:g} s", Connection="close") from None
        except ClientDisconnect:
            raise Refused(499, "the client has closed the connection") from None
        return bytes(data)

    def served(self, name: str | None) -> Served:
        """The model with this name; None: the base model.

        Raises:
            Refused: There is none.
        """
        if name is not None and name not in self.models:
            known = ", ".join(repr(each) for each in self.models)
            raise Refused(
                404, f"the model {name!r} does not exist: this server has {known}", "not_found_error", "model_not_found"
            )
        return self.models[name or self.name]

    def requests(self, served: Served, prompts: list[Any], options: dict[str, Any], n: int) -> list[Request]:
        """The requests of the engine: n for each prompt. Runs in a thread, because tokenizing takes time."""
        texts = {name: options.get(name) for name in ("schema", "regex", "grammar")}
        for name, text in texts.items():
            # A schema of 144 KB takes 5 s to compile, which other requests may wait for.
            if text is not None and len(text if isinstance(text, str) else json.dumps(text)) > MAX_GRAMMAR:
                raise ValueError(f"the {name} has more than {MAX_GRAMMAR:,} characters: use a smaller one")
        found = self.engine.requests(prompts, options, n, served.adapter)
        if "max_tokens" not in options:  # as much as fits, as in the protocol
            for request in found:
                request.max_tokens = max(1, self.engine.length - len(request.ids))
        return found

    async def run(self, requests: list[Request]) -> AsyncGenerator[CompletionChunk, None]:
        """The chunks of requests. The engine drops the requests when the caller stops reading."""
        with self.admitted(len(requests)):
            chunks = self.engine.follow(requests)
            end = None if self.request_timeout is None else asyncio.get_running_loop().time() + self.request_timeout
            try:
                while True:
                    async with asyncio.timeout_at(end):
                        chunk = await anext(chunks)
                    yield chunk
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise self.too_late() from None
            finally:
                await chunks.aclose()
                self.metrics.count(requests)

    def too_late(self, way_out: str = "reduce max_tokens") -> Refused:
        """The answer to a request that took too long. The openai client does not repeat the request."""
        text = f"the answer took more than {self.request_timeout:g} s: {way_out}, or start the server with --prepare"
        return Refused(504, text, "timeout_error", X_Should_Retry="false")

    def check_load(self, count: int = 1) -> None:
        """Refuses requests. Also called before a body is read, so that a refusal takes little time.

        Raises:
            Refused: Too many requests are active.
        """
        most = self.engine.slots + self.max_waiting
        if count > most:
            raise Refused(
                400, f"{count:,} answers are too many: this server takes {most:,} at a time (prompts times n)"
            )
        if self.active + count > most:
            wait = str(self._retry_after(most))
            raise Refused(429, "too many requests wait: try again later", "rate_limit_error", Retry_After=wait)

    def _retry_after(self, most: int) -> int:
        """Seconds after which a refused client may try again: longer when many are refused, because refusals take time
        from answers. At ten times the load, about 2.5 * `most` requests are then refused in a second."""
        now = time.monotonic()
        self.refusals.append(now)
        while self.refusals[0] < now - 1:
            self.refusals.popleft()
        return min(30, 1 + len(self.refusals) // most)

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Counts requests as active while they are answered.

        Raises:
            Refused: Too many requests are active.
        """
        self.check_load(count)
        self.active += count
        try:
            yield
        finally:
            self.active -= count


def as_refused(error: Exception) -> Refused:
    """The answer to an error. A ValueError is that of the caller, except for NaN."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TooLongError):
        return Refused(400, str(error), code="context_length_exceeded")
    if isinstance(error, ValueError) and not isinstance(error, NotFiniteError):
        return Refused(400, str(error))
    if isinstance(error, RuntimeError) and "engine is closed" in str(error):
        return Refused(503, "the server is shutting down", "server_error", Retry_After="5")
    _log.error("a request failed", exc_info=error)
    return Refused(500, f"the request failed: {type(error).__name__}", "server_error")


def _explained(error: Exception) -> str:
    """The first problems of a body, with the names of the fields."""
    if not isinstance(error, ValidationError):
        return "the body is nested too deeply"
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    places = ((".".join(str(part) for part in p["loc"]), p["msg"].removeprefix("Value error, ")) for p in problems[:3])
    return "; ".join(f"{place}: {message}" if place else message for place, message in places)

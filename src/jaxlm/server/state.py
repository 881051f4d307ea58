"""The state of the server, and its errors: a body becomes requests of the engine."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.inference.completion import CompletionChunk
from jaxlm.inference.embeddings import Embedder
from jaxlm.inference.engine import Engine
from jaxlm.inference.requests import Request, requests_for
from jaxlm.model import Model
from jaxlm.server import responses
from jaxlm.server.metrics import Metrics

_log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)


class Refused(Exception):
    """An error of the protocol."""

    def __init__(self, status: int, text: str, kind: str = "invalid_request_error", **headers: str):
        super().__init__(text)
        self.status, self.kind, self.headers = status, kind, {k.replace("_", "-"): v for k, v in headers.items()}

    def response(self) -> Response:
        return JSONResponse(responses.error(str(self), self.kind), self.status, self.headers)


@dataclass
class Server:
    """The state of the application.

    Attributes:
        model: The model.
        engine: Its engine.
        name: Name of the model in the protocol.
        keys: API keys; empty if none is needed.
        max_waiting: Requests that may wait for a slot.
        max_body: Bytes of a request at most.
        request_timeout: Seconds that an answer may take; None for no limit.
        active: Requests that have not ended.
        embedder: Computes embeddings between the steps of the engine.
        embedding: Held by the request whose embeddings are computed.
    """

    model: Model
    engine: Engine
    name: str
    keys: Sequence[str] = ()
    max_waiting: int = 256
    max_body: int = 8 << 20
    request_timeout: float | None = None
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    embedder: Embedder = field(init=False)
    embedding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.embedder = Embedder(self.model, self.engine.between_steps)

    async def read(self, http: HttpRequest, kind: type[Body]) -> Body:
        """The body of a request."""
        data = bytearray()
        async for chunk in http.stream():
            data += chunk
            if len(data) > self.max_body:
                raise Refused(413, f"the body has more than {self.max_body:,} bytes")
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
        name = getattr(body, "model", None)
        if name not in (None, self.name):
            raise Refused(404, f"the model {name!r} does not exist: this server has {self.name!r}", "not_found_error")
        return body

    def requests(self, prompts: list[Any], options: dict[str, Any], n: int) -> list[Request]:
        """The requests of the engine: n for each prompt. Runs in a thread, because tokenizing takes time."""
        found = requests_for(self.model, prompts, options, n)
        if "max_tokens" not in options:  # as much as fits, as in the protocol
            for request in found:
                request.max_tokens = max(1, self.engine.length - len(request.ids))
        return found

    async def run(self, requests: list[Request]) -> AsyncGenerator[CompletionChunk, None]:
        """The chunks of requests. The engine drops the requests when the caller stops reading."""
        with self.admitted(len(requests)):
            try:
                async for chunk in self.engine.follow(requests):
                    yield chunk
            finally:
                self.metrics.count(requests)

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Counts requests as active while they are answered.

        Raises:
            Refused: Too many requests are active.
        """
        if self.active + count > self.engine.slots + self.max_waiting:
            raise Refused(429, "too many requests wait: try again later", "rate_limit_error", Retry_After="1")
        self.active += count
        try:
            yield
        finally:
            self.active -= count


def as_refused(error: Exception) -> Refused:
    """The answer to an error. ValueError and TypeError are those of the caller."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValueError | TypeError):
        return Refused(400, str(error))
    if isinstance(error, RuntimeError) and "engine is closed" in str(error):
        return Refused(503, "the server is shutting down", "server_error", Retry_After="5")
    _log.error("a request failed", exc_info=error)
    return Refused(500, f"the request failed: {type(error).__name__}", "server_error")


def _explained(error: Exception) -> str:
    """The first problems of a body, with the names of the fields."""
    if not isinstance(error, ValidationError):
        return "the body is nested too deeply"
    problems = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(str(part) for part in p['loc'])}: {p['msg']}" for p in problems[:3])

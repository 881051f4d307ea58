"""Connections: slow clients are disconnected, and their number is bounded.

uvicorn parses HTTP with h11, which bounds the size of the headers. It waits for headers, for the rest of a body that
nobody reads, and for a client that does not read its answer, as long as they take. So each connection has two timers.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import uvicorn
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxlm.server.state import Refused

Result = TypeVar("Result")
HEADER_BYTES = 32 << 10  # of a request line and its headers
IDLE_SECONDS = 15.0  # until the headers of a request have arrived; also between two requests
WRITE_SECONDS = 60.0  # until a client reads on, when its answer waits in full buffers
WRITE_RATE = 1 << 10  # bytes per second that it then reads at least
SHUTDOWN_SECONDS = 30  # until running answers are cut off
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def http_server(app: ASGIApp, max_connections: int, **settings: Any) -> uvicorn.Server:
    """A server of an application.

    Args:
        app: The application. `Timed` is one of its middlewares.
        max_connections: Connections at a time. Further ones get status 503 and are closed.
        settings: Other settings of uvicorn.
    """
    connections: set[Connection] = set()

    class Bounded(Connection):
        def __init__(self, **given: Any):
            super().__init__(connections, max_connections, **given)

    config = uvicorn.Config(
        app,
        http=Bounded,
        ws="none",
        lifespan="on",
        log_config=None,  # uvicorn's own would close all handlers of this process, and some close their stream
        log_level="critical",
        access_log=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=int(IDLE_SECONDS),  # uvicorn has a timer of its own between two requests
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        **settings,
    )
    return uvicorn.Server(config)


class Connection(H11Protocol):
    """A connection with timers."""

    def __init__(self, connections: "set[Connection]", most: int, app_state: dict[str, Any], **given: Any):
        super().__init__(app_state={**app_state, "connection": self}, **given)
        self._all, self._most = connections, most
        self._socket: Any = None
        self._idle: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._requests: int = 0  # that have begun and not ended

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._socket = transport
        self._all.add(self)
        if len(self._all) > self._most:
            transport.write(FULL)
            transport.close()
        self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._idle = _stopped(self._idle)
        self._stalled = _stopped(self._stalled)
        super().connection_lost(exc)

    def wait(self) -> None:
        """Starts to wait for the headers of a request."""
        _stopped(self._idle)
        self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._expire)

    def _expire(self) -> None:
        if self._stalled is None:
            self._socket.abort()
        else:  # the client still reads the last answer
            self.wait()

    def begin(self) -> None:
        """The headers of a request have arrived."""
        self._requests += 1
        self._idle = _stopped(self._idle)

    def end(self) -> None:
        """The answer to a request has ended. The next request may have begun before: a stream is cleaned up after its
        last byte was sent."""
        self._requests -= 1
        if not self._requests:
            self.wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def _watch(self) -> None:
        """Looks after WRITE_SECONDS how much the client has read. Large answers take longer than that."""
        _stopped(self._stalled)
        size = self._socket.get_write_buffer_size()
        self._stalled = asyncio.get_running_loop().call_later(WRITE_SECONDS, self._check, size)

    def _check(self, before: int) -> None:
        if before - self._socket.get_write_buffer_size() < WRITE_RATE * WRITE_SECONDS:
            self._socket.abort()
        else:
            self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _stopped(self._stalled)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Timed:
    """Tells a connection when a request begins and when its answer ends."""

    def __init__(self, app: ASGIApp):
        self.app: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = cast(Connection | None, scope.get("state", {}).get("connection"))
        if connection is None or scope["type"] != "http":
            return await self.app(scope, receive, send)
        connection.begin()
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            pass  # by uvicorn, after SHUTDOWN_SECONDS: it would log a traceback
        finally:
            connection.end()


async def answered(http: HttpRequest, answer: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, which is cancelled when the client closes the connection.

    Raises:
        Refused: The client is gone.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    result, watching = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((result, watching), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise Refused(499, "the client has closed the connection")
        return result.result()
    finally:
        result.cancel()
        watching.cancel()

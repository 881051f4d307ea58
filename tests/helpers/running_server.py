"""A server on loopback, in a thread of the test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from jaxlm.server.app import create_app
from jaxlm.server.state import Server


@contextmanager
def running(server: Server, **settings: Any) -> Iterator[str]:
    """The address of a server, which ends with the context."""
    config = uvicorn.Config(create_app(server), port=0, log_level="error", lifespan="on", **settings)
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    http.should_exit = True
    thread.join()


def settle(server: Server, seconds: float = 10) -> None:
    """Waits until all slots are free."""
    end = time.monotonic() + seconds
    while (server.active or server.engine.is_busy) and time.monotonic() < end:
        time.sleep(0.01)
    assert server.active == 0
    assert not server.engine.is_busy
    assert all(slot.request is None for slot in server.engine.scheduler.rows)

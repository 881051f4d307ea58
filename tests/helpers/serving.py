"""A server on loopback, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxlm.inference.requests import Request
from jaxlm.server.app import create_app
from jaxlm.server.connections import http_server
from jaxlm.server.state import Server


@contextmanager
def serving(server: Server, **settings: Any) -> Iterator[str]:
    """Serves while the block runs. Yields the address, http://127.0.0.1:PORT.

    Args:
        server: The state of the application.
        **settings: Arguments of http_server.
    """
    http = http_server(create_app(server), **{"max_connections": 1000, **settings})
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that tests can fill the buffers
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not http.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join()


@contextmanager
def slow_steps(server: Server) -> Iterator[set[Request]]:
    """Steps of the engine take 20 ms more. Yields the requests that are added, as they come."""
    engine, seen = server.engine, set[Request]()
    step, add = engine.steps.step, engine.add

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return step(*args)

    def recorded(*requests: Request) -> None:
        seen.update(requests)
        add(*requests)

    engine.steps.step, engine.add = slow, recorded
    try:
        yield seen
    finally:
        engine.steps.step, engine.add = step, add


def wait_until_idle(server: Server) -> None:
    """Waits until no request has a slot, 10 seconds at most."""
    rows = server.engine.scheduler.rows
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not server.active and not server.engine.is_busy and all(slot.request is None for slot in rows):
            return
        time.sleep(0.01)
    raise AssertionError(f"{server.active} requests are active, {server.engine}")

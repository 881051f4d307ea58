"""A server on loopback, in a thread of the test."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxlm.server.app import create_app
from jaxlm.server.connections import http_server
from jaxlm.server.state import Server


@contextmanager
def running(server: Server, **settings: Any) -> Iterator[str]:
    """The address of a server, which ends with the context."""
    http = http_server(create_app(server), **{"max_connections": 1000, **settings})
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that tests can fill the buffers
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        while not http.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
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

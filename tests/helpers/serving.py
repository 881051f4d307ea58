"""A server on loopback, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from jaxlm.inference.requests import Request
from jaxlm.server.app import create_app
from jaxlm.server.state import Server


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serves while the block runs. Yields the address, http://127.0.0.1:PORT."""
    running = uvicorn.Server(uvicorn.Config(create_app(server), port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


@contextmanager
def slow_steps(server: Server) -> Iterator[set[Request]]:
    """Steps of the engine take 20 ms more. Yields the requests that have had a slot, as they come."""
    steps, seen = server.engine.steps, set[Request]()
    step = steps.step

    def slow(*args: Any) -> Any:
        seen.update(slot.request for slot in server.engine.scheduler.rows if slot.request is not None)
        time.sleep(0.02)
        return step(*args)

    steps.step = slow
    try:
        yield seen
    finally:
        steps.step = step


def wait_until_idle(server: Server) -> None:
    """Waits until no request has a slot, 10 seconds at most."""
    rows = server.engine.scheduler.rows
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not server.active and not server.engine.is_busy and all(slot.request is None for slot in rows):
            return
        time.sleep(0.01)
    raise AssertionError(f"{server.active} requests are active, {server.engine}")

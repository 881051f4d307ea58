"""An ASGI application on the loopback address, in a thread, and a Ctrl-C while the load generator uses it."""

import _thread
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from jaxlm.bench.serve_load import Sender


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Yields the base URL of the application, which listens on a free port. It ends with the context."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts the main thread, as Ctrl-C does, when so many requests of a load have ended."""
    start = Sender.__init__

    class Ended(list):
        def append(self, item: Any) -> None:
            super().append(item)
            if len(self) == count:
                _thread.interrupt_main()

    def begin(self: Sender, *args: Any) -> None:
        start(self, *args)
        self.ended = Ended()

    monkeypatch.setattr(Sender, "__init__", begin)

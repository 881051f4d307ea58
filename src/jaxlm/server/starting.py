"""Answers while a model is loaded and its programs are compiled, before the application runs."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jaxlm.server import responses

MAX_BODY = 8 << 20  # bytes that are read of a request, so that its client reads the answer
SECONDS = 5.0  # that a client has for its request


class _Handler(BaseHTTPRequestHandler):
    """Refuses every request."""

    timeout = SECONDS
    protocol_version = "HTTP/1.1"

    def refuse(self) -> None:
        length = self.headers.get("Content-Length", "")
        self.rfile.read(min(int(length), MAX_BODY) if length.isdecimal() else 0)
        body = json.dumps(responses.error("the model is being loaded: try again later", "server_error")).encode()
        self.send_response(503)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                            ("Retry-After", "5"), ("Connection", "close")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_OPTIONS = do_PUT = do_DELETE = do_PATCH = refuse

    def log_message(self, format: str, *args: object) -> None:
        """Writes no log."""


class _Refusing(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error."""


@contextmanager
def refusing(listening: socket.socket) -> Iterator[None]:
    """Answers all requests on a listening socket with status 503 until the block ends. The socket stays open."""
    http = _Refusing(listening.getsockname()[:2], _Handler, bind_and_activate=False)
    http.socket.close()
    http.socket = listening
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), name="jaxlm-starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        thread.join()

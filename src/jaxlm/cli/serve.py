"""`jaxlm serve`: an OpenAI-compatible server."""

import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxlm.checkpoint.errors import explain_errors, explain_missing_package
from jaxlm.cli.common import STORIES, ModelFlags
from jaxlm.cli.terminal import note

MOST_FILES = 8192  # open files
OTHER_FILES = 128  # that are no connections


@dataclass(frozen=True)
class Serve(ModelFlags):
    """Serve a model over HTTP with the protocol of OpenAI. Needs pip install 'jaxlm[server]'.

    The server prints its address when it is ready. Ctrl-C or SIGTERM ends it: it takes no new requests and finishes the
    others. docs/serving.md has the endpoints, and examples with the openai client.
    """

    memory_hint: ClassVar[str] = "--dtype bfloat16, fewer --slots, a shorter --max-length or a smaller model"

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback addresses are reachable from the network."""
    port: int = 8000
    """Port to listen on. 0 takes a free one."""
    served_model_name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the model in requests. Default: as given by --model."""
    api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with the accepted API keys, one per line. Only its owner may read it."""
    slots: int | None = None
    """Number of requests that are decoded together. The default depends on the platform."""
    max_length: int | None = None
    """Maximum number of tokens of a prompt and its answer. Default: the context length, or what fits in memory."""
    max_waiting: int = 256
    """Number of requests that may wait. Further ones are refused with status 429."""
    request_timeout: Annotated[float | None, tyro.conf.arg(metavar="SECONDS")] = None
    """Time that an answer may take, with its time in the queue. A later one ends with status 504, or, in a stream, with
    an error event. Default: no limit."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN")] = ()
    """Origin of web pages that may use the server, such as https://example.org; * for all. Can be repeated. Default: no
    page of another origin may."""
    prepare: bool = False
    """Compile all programs at the start, so that no request waits for the compiler. Without it, they are compiled when
    they are needed."""

    def run(self) -> int:
        if not self.is_single_process:
            raise ValueError("serve runs in a single process")
        keys = read_keys(self.api_key_file) if self.api_key_file else []
        with explain_missing_package("jaxlm serve", "jaxlm[server]"):
            from jaxlm.server.app import create_app
            from jaxlm.server.connections import http_server
            from jaxlm.server.state import Server
        listening = listen(self.host, self.port)
        if not ip_address(listening.getsockname()[0]).is_loopback and not keys:
            note("Everyone who reaches this address can use the server: it has no --api-key-file.")
        with listening:
            model = self.load()
            from jaxlm.inference.engine import Engine

            engine = Engine(model, self.slots, length=self.max_length)
            name = self.served_model_name or str(self.model or self.adapter or STORIES.name)
            server = Server(
                model,
                engine,
                name,
                keys,
                self.max_waiting,
                origins=self.allow_origin,
                request_timeout=self.request_timeout,
            )
            if self.prepare:
                engine.prepare()
            note(f"Serving {name} on http://{address(listening)}/v1 ({engine.slots} slots of {engine.length:,} tokens)")
            note(f"Chat in the browser: http://{address(listening)}/")
            http = http_server(create_app(server), raise_file_limit() - OTHER_FILES)
            with ending_at_signals(http):
                http.run(sockets=[listening])
        if http.force_exit:  # a second Ctrl-C
            raise KeyboardInterrupt
        return 0


@contextmanager
def ending_at_signals(http: Any) -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C end a server with status 0. uvicorn handles them, raises them again when the server has
    ended, and so they come here."""

    def end(*ignored: Any) -> None:
        http.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_file_limit() -> int:
    """Raises the limit of open files, which connections are, as far as MOST_FILES. Returns the limit."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit for sockets
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is loaded: a port that is in use is an error at once."""
    if not 0 <= port <= 65535:  # getaddrinfo takes the rest of a division
        raise ValueError(f"--port {port}: ports are 0 to 65535")
    with explain_errors(f"cannot listen on {host}:{port}", "choose another --host or --port", OSError):
        [family, kind, protocol, _, where] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(1024)
        except BaseException:
            listening.close()
            raise
        return listening


def address(listening: socket.socket) -> str:
    """host:port"""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_keys(path: Path) -> list[str]:
    """The API keys of a file.

    Raises:
        ValueError: Others than its owner may read it, or it has no key.
    """
    with explain_errors(f"--api-key-file {path} cannot be read", "", (OSError, UnicodeDecodeError)):
        mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").split()
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"others can read {path}: chmod 600 {path}")
    if not lines:
        raise ValueError(f"{path} has no API key: write one per line")
    return lines

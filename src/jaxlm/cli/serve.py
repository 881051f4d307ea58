"""`jaxlm serve`: an OpenAI-compatible server."""

import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from jaxlm.checkpoint.errors import explain_errors, explain_missing_package
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import terminal
from jaxlm.cli.common import STORIES, GenerationFlags
from jaxlm.cli.terminal import is_quiet, note

if TYPE_CHECKING:
    from jaxlm.inference.engine import Engine
    from jaxlm.server.state import Server

MOST_FILES = 8192  # open files
OTHER_FILES = 128  # that are no connections


@dataclass(frozen=True)
class Serve(GenerationFlags):
    """Serve a model over HTTP with the protocol of OpenAI. Needs pip install 'jaxlm[server]'.

    The server prints its address when it is ready. Ctrl-C or SIGTERM ends it: it takes no new requests and finishes the
    others. docs/serving.md has the endpoints, and examples with the openai client.
    """

    memory_hint: ClassVar[str] = (
        "--quantize int8 (or int4), --dtype bfloat16, fewer --slots, a shorter --max-length or a smaller model"
    )

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback addresses are reachable from the network."""
    port: int = 8000
    """Port to listen on. 0 takes a free one."""
    # Of another type than in GenerationFlags: an adapter is a model of its own here.
    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=ADAPTER")] = ()  # pyright: ignore
    """LoRA adapter (of PEFT or mlx-lm) of the model, served under this name beside the model. Can be repeated. A batch
    may use several."""
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
    allow_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST")] = ()
    """Host name under which clients may ask, as behind a proxy that keeps the name. Can be repeated. Without API keys,
    a server on a loopback address answers for localhost and IP addresses only."""
    prepare: bool = False
    """Compile all programs at the start, so that no request waits for the compiler. Without it, they are compiled when
    they are needed."""

    def source(self, name: str | None = None) -> ModelSource:
        """The base model: `name`, else --model, else the base of the first adapter."""
        name = name or self.model
        if name is not None:
            return replace(super().source(name), adapter=None)
        from jaxlm.loading.resolving import base_of

        first = next(iter(named_adapters(self.adapter).values()))
        base = base_of(ModelSource(first, token=self.token, offline=self.offline, allow_fields=self.allow_field))
        return replace(super().source(str(base.name)), adapter=None, revision=self.revision or base.revision)

    def run(self) -> int:
        keys = read_keys(self.api_key_file) if self.api_key_file else []
        with explain_missing_package("jaxlm serve", "jaxlm[server]"):
            from jaxlm.server.starting import refusing
            from jaxlm.server.state import Server
        self._check()
        with ExitStack() as opened:
            listening = self._listen(opened)
            is_local = listening is not None and ip_address(listening.getsockname()[0]).is_loopback
            if listening and not is_local and not keys:
                note("Everyone who reaches this address can use the server: it has no --api-key-file.")
            with nullcontext() if listening is None else refusing(listening):
                engine = self._load_engine()
                if self.prepare:
                    prepare(engine)
            if listening is None:
                follow(engine)
                return 0
            is_default = self.model is None and not self.adapter
            name = self.served_model_name or (STORIES.name if is_default else engine.model.source)
            server = Server(
                engine.model,
                engine,
                name,
                keys,
                self.max_waiting,
                hosts=None if keys or not is_local else ("localhost", *self.allow_host),
                origins=self.allow_origin,
                request_timeout=self.request_timeout,
            )
            if not self.prepare:
                note("The first requests wait for the compiler. --prepare compiles all programs before.")
            serve(server, listening)
        return 0

    def _check(self) -> None:
        """Raises ValueError for flags that are out of range, before the model is loaded."""
        if (name := self.served_model_name or self.model) in named_adapters(self.adapter):
            raise ValueError(f"--adapter {name}: the model has this name: choose another one, or --served-model-name")
        for flag, least in (("max_waiting", 0), ("slots", 1), ("max_length", 1)):
            if (value := getattr(self, flag)) is not None and value < least:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be {least} or more")
        if self.request_timeout is not None and not 0 < self.request_timeout < float("inf"):
            raise ValueError(f"--request-timeout {self.request_timeout:g}: must be above 0; omit it for no limit")

    def _listen(self, opened: ExitStack) -> socket.socket | None:
        """The socket of process 0; None in other processes."""
        if self.is_single_process:
            return opened.enter_context(listen(self.host, self.port))
        self.begin()
        from jaxlm.devices import distributed

        sockets: list[socket.socket] = []
        distributed.run_on_coordinator(lambda: sockets.append(opened.enter_context(listen(self.host, self.port))))
        return next(iter(sockets), None)

    def _load_engine(self) -> "Engine":
        """Loads the model and its adapters."""
        model = self.load()
        from jaxlm.devices import distributed
        from jaxlm.inference.compilation import on_compile
        from jaxlm.inference.engine import Engine
        from jaxlm.inference.lockstep import Leader
        from jaxlm.loading import load_adapter

        on_compile.set(log_compilation)
        adapters = {}
        for name, folder in named_adapters(self.adapter).items():
            fields = {"token": self.token, "offline": self.offline, "allow_fields": self.allow_field}
            adapters[name] = load_adapter(model, folder, dtype=self.dtype, **fields)
            for text in adapters[name].checkpoint.notes:
                note(f"{name}: {text}.")
        kind = Leader if model.is_multiprocess and distributed.is_coordinator() else Engine
        return kind(model, self.slots, length=self.max_length, adapters=adapters)


def log_compilation(name: str, seconds: float | None = None) -> None:
    """Writes a line before a program is compiled. It is complete, because other lines may be written meanwhile."""
    if seconds is None:
        note(f"compiling {name} …")


def prepare(engine: "Engine") -> None:
    """Compiles all programs, with a bar on a terminal, and with a line for each program elsewhere."""
    from jaxlm.inference.compilation import on_compile

    if not terminal.shows_progress():
        engine.prepare(progress=lambda done, of: None)
        return
    shown = on_compile.set(lambda name, seconds=None: None)
    engine.prepare()
    on_compile.reset(shown)


def serve(server: "Server", listening: socket.socket) -> None:
    """Serves until a signal, or until another process has died."""
    from jaxlm.inference.lockstep import Leader
    from jaxlm.server.app import create_app
    from jaxlm.server.connections import http_server

    http, engine = http_server(create_app(server), raise_file_limit() - OTHER_FILES), server.engine
    if isinstance(engine, Leader):
        engine.on_failure = lambda: setattr(http, "should_exit", True)
        engine.start()
    size = f"{engine.slots} slots of {engine.length:,} tokens"
    note(f"Serving {', '.join(server.models)} on http://{address(listening)}/v1 ({size})")
    tokenizer = engine.model.tokenizer
    if tokenizer is not None and tokenizer.has_template:
        note(f"Chat in the browser: http://{address(listening)}/")
    else:
        note("This model has no chat template: it continues prompts (/v1/completions). To chat, take one that has: "
             "-m Qwen/Qwen3-0.6B")  # fmt: skip
    if is_quiet():  # the address is the result of the command then
        print(f"http://{address(listening)}/v1", flush=True)
    say_at_signals(http, server)
    with ending_at_signals(http):
        http.run(sockets=[listening])
    if isinstance(engine, Leader) and engine.failure is not None:
        raise engine.failure
    if http.force_exit:  # a second Ctrl-C
        raise KeyboardInterrupt


def follow(engine: "Engine") -> None:
    """Runs the steps of process 0. Signals are ignored: process 0 gets them too, and finishes its answers first."""
    from jaxlm.inference import lockstep

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    lockstep.follow(engine)


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Names and folders (or hub ids) of adapters given as NAME=ADAPTER, or as ADAPTER, which is its own name then."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, adapter = text.partition("=")
        if not equals or Path(text).exists():
            name, adapter = text, text
        if not name or not adapter:
            raise ValueError(f"--adapter {text}: write NAME=ADAPTER")
        if name in found:
            raise ValueError(f"--adapter {name} is given twice: choose different names")
        found[name] = adapter
    return found


def say_at_signals(http: Any, server: "Server") -> None:
    """Says at the first signal that the server ends."""
    handle = http.handle_exit

    def told(number: int, frame: Any) -> None:
        if not http.should_exit:
            running = f"finishing {server.active} answers. " if server.active else ""
            note(f"\nEnding: {running}Ctrl-C ends at once.")
        handle(number, frame)

    http.handle_exit = told


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

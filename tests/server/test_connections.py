"""Slow clients, time limits, CORS and the bound of connections, with raw sockets."""

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.serving import serving, wait_until_idle
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny
from starlette.testclient import TestClient

import jaxlm
from jaxlm.model import Model
from jaxlm.server import connections, state
from jaxlm.server.app import create_app
from jaxlm.server.state import Server

BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer_of(TEMPLATE))


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[tuple[Server, str]]:
    with quick_compilation():
        server = Server(model, jaxlm.Engine(model, 2, prefix_cache=False), "tiny", max_body=100_000)
        with serving(server, max_connections=20) as url:
            yield server, url


@contextmanager
def connected(url: str, data: bytes = b"", timeout: float = 10) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(timeout)
        client.connect(("127.0.0.1", urlsplit(url).port))
        client.sendall(data)
        yield client


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    try:
        while data := client.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def request(body: Any, path: str = "/v1/completions", more: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n{more}\r\n"
    return head.encode() + data


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    """All limits are this many seconds."""
    for module, name in ((connections, "IDLE_SECONDS"), (connections, "WRITE_SECONDS"), (state, "BODY_SECONDS")):
        monkeypatch.setattr(module, name, 0.4)
    return 0.4


def trickle(client: socket.socket, data: bytes, seconds: float) -> bool:
    """Sends a byte at a time. Returns whether the server closed the connection."""
    end = time.monotonic() + seconds
    client.settimeout(0.02)
    for n in range(len(data)):
        try:
            client.sendall(data[n : n + 1])
            if client.recv(65536) == b"":
                return True
        except TimeoutError:
            pass
        except OSError:
            return True
        if time.monotonic() > end:
            return False
    return False


def test_slow_headers_end_the_connection(served: tuple[Server, str], short: float) -> None:
    server, url = served
    with connected(url) as client:  # not a byte
        assert all_of(client) == b""
    head = b"POST /v1/completions HTTP/1.1\r\n" + b"X-Slow: 1\r\n" * 100
    with connected(url) as client:
        assert trickle(client, head, 10 * short)
    with connected(url, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") as client:  # a second request
        assert b"200 OK" in client.recv(65536)
        assert trickle(client, head, 10 * short)
    assert server.active == 0


def test_slow_bodies_end_the_request(served: tuple[Server, str], short: float) -> None:
    server, url = served
    data = request(BODY)
    with connected(url, data[:-5]) as client:
        found = all_of(client)
    assert found.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in found.lower()
    assert server.active == 0


def test_connections_of_answers_are_kept(served: tuple[Server, str], short: float, monkeypatch) -> None:
    """An answer may take longer than the time for headers, and its connection takes another request."""
    server, url = served
    step = server.engine.steps.step
    monkeypatch.setattr(server.engine.steps, "step", lambda *args: time.sleep(0.05) or step(*args))
    with httpx.Client(base_url=url, timeout=60) as http:
        start = time.monotonic()
        first = http.post("/v1/completions", json={**BODY, "max_tokens": 40})
        assert first.status_code == 200
        assert time.monotonic() - start > short
        assert http.get("/health").status_code == 200


def test_a_connection_is_kept_between_two_requests(served: tuple[Server, str]) -> None:
    """uvicorn has a timer of its own, of 5 s by default."""
    http = connections.http_server(create_app(served[0]), 1)
    assert http.config.timeout_keep_alive == connections.IDLE_SECONDS


def test_a_request_that_follows_a_stream_at_once_is_not_cut_off(
    served: tuple[Server, str], short: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins before the stream is cleaned up, whose end must not start the timer of idle connections."""
    server, url = served
    step = server.engine.steps.step
    monkeypatch.setattr(server.engine.steps, "step", lambda *args: time.sleep(0.05) or step(*args))
    stream, slow = {**BODY, "max_tokens": 2, "stream": True}, {**BODY, "max_tokens": 60}
    with connected(url, request(stream) + request(slow, more="Connection: close\r\n")) as client:
        begin = time.monotonic()
        found = all_of(client)
    assert time.monotonic() - begin > 2 * short
    assert found.count(b"HTTP/1.1 200") == 2
    assert b'"completion_tokens":60' in found


def test_large_headers_are_refused(served: tuple[Server, str]) -> None:
    with connected(served[1], b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000) as client:
        assert all_of(client).startswith(b"HTTP/1.1 400")


def test_large_bodies_are_refused(served: tuple[Server, str]) -> None:
    """By Content-Length before the body is sent, and by the bytes of a body in chunks."""
    _, url = served
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    for length in (b"100001", b"9" * 18):
        with connected(url, head + b"Content-Length: " + length + b"\r\n\r\n") as client:
            assert all_of(client).startswith(b"HTTP/1.1 413")
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with connected(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + 6 * chunk) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        client.sendall(chunk)
        assert all_of(client).startswith(b"HTTP/1.1 413")


def test_a_client_that_does_not_read_is_disconnected(served: tuple[Server, str], short: float) -> None:
    """Its stream does not stall others, and no more than the buffers is kept for it."""
    server, url = served
    stream = {**BODY, "stream": True, "logprobs": 20}
    with connected(url, request(stream)) as slow:
        with httpx.Client(base_url=url, timeout=60) as http:
            for _ in range(3):
                assert http.post("/v1/completions", json={**BODY, "max_tokens": 20}).status_code == 200
        wait_until_idle(server)  # the engine has finished, and the connection was aborted
        found = all_of(slow)
    assert found.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in found
    with connected(url, request(stream)) as client:  # one that reads gets everything
        found = b""
        while b"[DONE]" not in found:
            found += client.recv(65536)
    assert len(found) > 100_000  # more than all buffers together


def test_a_client_that_reads_slowly_gets_a_large_answer(served: tuple[Server, str], short: float) -> None:
    with connected(served[1], request({**BODY, "logprobs": 20, "n": 2}, more="Connection: close\r\n")) as client:
        begin, found = time.monotonic(), b""
        while data := client.recv(2048):
            found += data
            time.sleep(0.01)
    assert time.monotonic() - begin > 2 * short
    content = found.partition(b"\r\n\r\n")[2]
    assert len(content) > 100_000
    assert json.loads(content)["usage"]["completion_tokens"] == 400


def test_a_client_that_leaves_while_it_waits_gives_up_its_place(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = served
    step = server.engine.steps.step
    monkeypatch.setattr(server.engine.steps, "step", lambda *args: time.sleep(0.1) or step(*args))
    stream = request({**BODY, "stream": True})
    with connected(url, stream) as first, connected(url, stream) as second:
        assert first.recv(10)
        assert second.recv(10)  # both slots are taken
        with connected(url, stream):
            until(lambda: server.active == 3)
        until(lambda: server.active == 2)
        assert sum(row.request is not None for row in server.engine.scheduler.rows) == 2
    wait_until_idle(server)


def test_a_busy_server_refuses_before_the_body_is_sent(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to wait grows with the refusals of the last second."""
    server, url = served
    most = server.engine.slots + server.max_waiting
    monkeypatch.setattr(server, "active", most)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
        with connected(url, head.encode()) as client:
            found = client.recv(65536)
        assert found.startswith(b"HTTP/1.1 429"), path
        assert b"retry-after: 1\r\n" in found.lower()
    server.refusals.extend([time.monotonic()] * 3 * most)
    assert httpx.post(url + "/v1/completions", json=BODY).headers["retry-after"] == "4"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_connections_are_bounded(served: tuple[Server, str]) -> None:
    _, url = served
    with connected(url) as first:
        clients = []
        for _ in range(19):
            clients.append(connected(url))
            clients[-1].__enter__()
        with connected(url, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") as refused:
            found = all_of(refused)
        assert found.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in found
        for client in clients:
            client.__exit__(None, None, None)
        first.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with connected(url, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") as client:
            if client.recv(65536).startswith(b"HTTP/1.1 200"):
                return
    raise AssertionError("connections are not given back")


def test_requests_have_a_time_limit(served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, url = served
    step = server.engine.steps.step
    monkeypatch.setattr(server.engine.steps, "step", lambda *args: time.sleep(0.1) or step(*args))
    monkeypatch.setattr(server, "request_timeout", 0.5)
    embedder = server.served(None).embedder
    run = embedder.run
    monkeypatch.setattr(embedder, "run", lambda *args: time.sleep(1) or run(*args))
    with httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post("/v1/completions", json=BODY)
        assert answer.status_code == 504
        expected = "the answer took more than 0.5 s: reduce max_tokens, or start the server with --prepare"
        assert answer.json()["error"]["message"] == expected
        assert answer.headers["x-should-retry"] == "false"  # the openai client would send it twice again
        lines = http.post("/v1/completions", json={**BODY, "stream": True}).text.strip().split("\n\n")
        assert len(lines) > 1
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"
        answer = http.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 504
        assert "send fewer or shorter inputs" in answer.json()["error"]["message"]
        wait_until_idle(server)
        assert http.post("/v1/completions", json={**BODY, "max_tokens": 1}).status_code == 200


ORIGIN = "https://example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


def test_pages_of_other_origins_are_refused_unless_allowed(model: Model) -> None:
    engine = jaxlm.Engine(model, 1)
    for origins in ((), (ORIGIN,), ("*",)):
        with TestClient(create_app(Server(model, engine, "tiny", ["key"], origins=origins))) as http:
            preflight = http.options("/v1/completions", headers=PREFLIGHT)
            plain = http.get("/v1/models", headers={"Origin": ORIGIN, "Authorization": "Bearer key"})
            refused = http.get("/v1/models", headers={"Origin": ORIGIN})
            other = http.options("/v1/completions", headers={**PREFLIGHT, "Origin": "https://example.com"})
        allowed = [answer.headers.get("access-control-allow-origin") for answer in (preflight, plain, refused)]
        assert (plain.status_code, refused.status_code) == (200, 401)
        if origins:
            assert preflight.status_code == 200
            assert allowed == [origins[0] if origins == ("*",) else ORIGIN] * 3
            assert (other.status_code == 200) == (origins == ("*",))
        else:
            assert preflight.status_code in (401, 405)
            assert not [name for name in (*preflight.headers, *plain.headers) if name.startswith("access-control")]


def test_handlers_of_the_process_stay_open(served: tuple[Server, str]) -> None:
    """uvicorn's logging configuration would close all of them: a program that embeds the server loses its log file."""
    closed: list[bool] = []

    class Handler(logging.Handler):
        def close(self) -> None:
            closed.append(True)
            super().close()

    handler = Handler()
    connections.http_server(create_app(served[0]), 1)
    assert closed == []
    handler.close()
    assert closed == [True]

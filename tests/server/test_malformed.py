"""Malformed requests: no answer has status 500, all slots are free afterwards, and the server still answers."""

import gc
import itertools
import json
import logging
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import jax
import pytest
from helpers.serving import serving, wait_until_idle
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.bench import memory_use
from jaxlm.server.schemas import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from jaxlm.server.state import Server

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "hello"}]
SHORT = {"max_tokens": 2, "seed": 1}
SOUND: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"messages": MESSAGES, **SHORT}),
    "/v1/completions": (CompletionBody, {"prompt": "a", **SHORT}),
    "/v1/embeddings": (EmbeddingBody, {"input": "a"}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
# As JSON, because Python's json cannot write all of them.
VALUES = ["null", "true", "-1", "0", "1", "199", "9" * 400, "1e999", "-1e999", "NaN", "-Infinity", "0.5", '""', '"a"',
          r'"\ud800"', r'"\u0000"', '"' + "a" * 2000 + '"', "[]", "[[]]", "[1]", "[-1]", "[1e999]", "[null]", '[""]',
          r'["\ud800"]', '["a"]', '["a", 1]', "{}", '{"a": 1}', '{"1": 1e999}', '{"1": NaN}', '{"9999999": 1}',
          r'{"\ud800": 1}', '{"type": "json_schema"}',
          '{"type": "json_schema", "json_schema": {"schema": {"type": 3}}}',
          "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000]  # fmt: skip
OTHERS = {
    "/v1/chat/completions": [
        {"messages": messages}
        for messages in (
            [{}],
            [{"role": 3, "content": "a"}],
            [{"role": "user"}],
            [{"role": "nobody", "content": "a"}],
            [{"role": "user", "content": "\ud800"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
            [{"role": "user", "content": "refuse"}],
            [{"role": "user", "content": "a" * 5000}],
        )
    ]
    + [
        {"tools": [TOOL], "tool_choice": "required", "messages": MESSAGES},
        {"chat_template_kwargs": {"messages": [], "tools": 3, "tokenize": True}},
        {"chat_template_kwargs": {"chat_template": "{% for i in range(10 ** 9) %}{% endfor %}"}},
        {"logprobs": True, "top_logprobs": 20, "n": 2},
    ],
    "/v1/completions": [
        {"prompt": [[1], []]},
        {"prompt": [[199]]},
        {"prompt": ["a", ""]},
        {"prompt": ["a"] * 500},
        {"max_tokens": 10**9},
        {"regex": "("},
        {"regex": "(a{1000}){1000}"},
        {"grammar": "start: start"},
        {"stop": ["a"] * 65},
        {"logit_bias": {"x": 1}},
        {"stop_token_ids": [10**30]},
        {"seed": 10**30},
        {"n": 128},
    ],
    "/v1/embeddings": [{"input": [[1], []]}, {"input": ["a"] * 3000}, {"input": "a" * 5000}],
}


@contextmanager
def served_tiny() -> Iterator[tuple[Server, str]]:
    with quick_compilation():
        template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + TEMPLATE
        model = replace(tiny("llama3", max_position_embeddings=64), tokenizer=tokenizer_of(template))
        server = Server(model, jaxlm.Engine(model, 2, prefix_cache=False), "tiny", max_waiting=8)
        with serving(server) as url:
            yield server, url


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    with served_tiny() as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Errors of the server that no answer shows."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors, [(record.getMessage(), record.exc_info) for record in errors]


def bodies() -> list[tuple[str, bytes]]:
    """Each field of each endpoint with each value, and bodies that are wrong in other ways."""
    found = []
    for path, (kind, sound) in SOUND.items():
        for name in [*kind.model_fields, *getattr(kind, "refused", ())]:
            rest = json.dumps({key: value for key, value in sound.items() if key != name})[1:-1]
            for value in VALUES:
                found.append((path, f'{{"{name}": {value}{", " if rest else ""}{rest}}}'.encode()))
        found += [(path, json.dumps(sound | other).encode()) for other in OTHERS.get(path, ())]
    return found


def raw_bodies() -> list[bytes]:
    deep = b"[" * 200_000
    sound = b'{"prompt": "a", "max_tokens": 1}'
    return [b"", b"{", b"[]", b"3", b"null", b'"a"', b"\xff\xfe", b'{"prompt": "\xff"}', deep, b'{"a":' * 100_000,
            sound.decode().encode("utf-16"), b"\xef\xbb\xbf" + sound, sound + b"x", b'{"prompt": "a", "prompt": 3}',
            br'{"prompt": "a", "logit_bias": {"\ud800": 1}}', br'{"model": "\ud800"}',
            b"prompt=a&max_tokens=1", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', b"\x00" * 1000]  # fmt: skip


def post(http: httpx.Client, path: str, body: bytes, kind: str = "application/json") -> None:
    answer = http.post(path, content=body, headers={"Content-Type": kind})
    assert answer.status_code < 500, (path, body[:300], answer.text)
    if answer.status_code >= 400:
        message = answer.json()["error"]["message"]
        assert message, (path, body[:300])
        assert "\n" not in message, (path, body[:300], message)


def still_answers(server: Server, url: str) -> None:
    wait_until_idle(server)
    with httpx.Client(base_url=url, timeout=60) as http:
        for path, (_, sound) in SOUND.items():
            assert http.post(path, json=sound).status_code == 200


def test_wrong_values_of_each_field(served: tuple[Server, str]) -> None:
    server, url = served
    cases = random.Random(0).sample(bodies(), 250)
    with httpx.Client(base_url=url, timeout=60) as http:
        for path, body in cases:
            post(http, path, body)
    still_answers(server, url)


def test_wrong_bodies_and_content_types(served: tuple[Server, str]) -> None:
    server, url = served
    with httpx.Client(base_url=url, timeout=60) as http:
        for body, path in itertools.product(raw_bodies(), ("/v1/completions", "/v1/chat/completions")):
            post(http, path, body)
        for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16", "\\", ""):
            post(http, "/v1/completions", b'{"prompt": "a", "max_tokens": 1}', kind)
    still_answers(server, url)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BROKEN = [
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"GET\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no Host
    b"GET /\xff%ff%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v1/models/%ff%00/../x HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
    CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"2\r\n{}0\r\n\r\n",
    CHUNKED + b"ffffffffffffffff\r\n{}",
    CHUNKED + b"1" * 1000,
]


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.settimeout(20)
        client.connect(("127.0.0.1", urlsplit(url).port))
        yield client


def drop(client: socket.socket, reset: bool) -> None:
    """Closes a connection: in an orderly way, or with a reset."""
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def send_broken(url: str) -> None:
    for data in BROKEN:
        with connected(url) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            try:
                found = client.recv(65536)
            except ConnectionResetError:
                found = b""
            assert not found.startswith(b"HTTP/1.1 5"), (data, found)


def drop_at_every_stage(url: str) -> None:
    for path, more in (
        ("/v1/completions", {}),
        ("/v1/completions", {"stream": True}),
        ("/v1/chat/completions", {"stream": True}),
        ("/v1/embeddings", {}),
    ):
        body = json.dumps({**SOUND[path][1], "max_tokens": 40, "ignore_eos": True, **more}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for reset, end in itertools.product((False, True), (0, 10, len(head), len(head) + 5, len(head) + len(body))):
            with connected(url) as client:
                client.sendall((head + body)[:end])
                drop(client, reset)
        with connected(url) as client:  # before the answer is read, and during the stream
            client.sendall(head + body)
            client.recv(1)
            drop(client, True)


def test_broken_http(served: tuple[Server, str]) -> None:
    send_broken(served[1])
    still_answers(*served)


def test_connections_that_are_dropped(served: tuple[Server, str]) -> None:
    drop_at_every_stage(served[1])
    still_answers(*served)


@pytest.mark.slow
def test_thousands_of_malformed_requests_leave_memory_flat() -> None:
    """Resident memory and arrays of the device after all requests, and after all of them again."""
    cases = bodies()
    with served_tiny() as (server, url), httpx.Client(base_url=url, timeout=120) as http:
        counts, resident, arrays = 0, [], []
        for _ in range(3):
            for path, body in cases:
                post(http, path, body)
            for body in raw_bodies():
                post(http, "/v1/completions", body)
            for _ in range(5):
                send_broken(url)
                drop_at_every_stage(url)
            still_answers(server, url)
            counts += len(cases) + len(raw_bodies()) + 5 * (len(BROKEN) + 44)
            gc.collect()
            resident.append(memory_use.resident() or 0)
            arrays.append(len(jax.live_arrays()))
    assert counts > 2000
    assert arrays[2] <= arrays[1], arrays
    assert resident[2] - resident[1] < 20 << 20, resident

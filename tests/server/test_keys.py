"""API keys: every key is compared in constant time, and what is not a key is refused."""

import hmac
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.tiny_models import tiny
from starlette.testclient import TestClient

import jaxlm
from jaxlm.server.app import create_app
from jaxlm.server.state import Server

KEYS = ["one", "two", "drei-ß"]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    model = tiny("llama3")
    with TestClient(create_app(Server(model, jaxlm.Engine(model, 1, length=64), "tiny", keys=KEYS))) as client:
        yield client


@pytest.mark.parametrize(("header", "status"), [
    (None, 401),
    (b"", 401),
    (b"Bearer", 401),
    (b"Bearer ", 401),
    (b"Bearer three", 401),
    (b"Bearer on", 401),
    (b"Bearer one ", 401),
    (b"Bearer Bearer one", 401),
    (b"Basic one", 401),
    (b"Bearer \xff\xfe", 401),
    (b"one", 401),
    (b"Bearer one", 200),
    (b"bearer two", 200),
    ("Bearer drei-ß".encode(), 200),
])  # fmt: skip
def test_keys(client: TestClient, header: bytes | None, status: int) -> None:
    headers: Any = [] if header is None else [(b"Authorization", header)]
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"] == {
            "message": "the API key is missing or wrong",
            "type": "authentication_error",
            "param": None,
            "code": None,
        }


def test_what_needs_a_key(client: TestClient) -> None:
    assert [client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
    for path in ("/metrics", "/v1/models", "/v1/models/tiny", "/nothing", "/health/"):
        assert client.get(path, follow_redirects=False).status_code == 401, path
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
        assert client.post(path, content=b"x" * (9 << 20)).status_code == 401, path  # the body is not read


def test_all_keys_are_compared(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the time would say which key matches."""
    compared: list[bytes] = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return given == key

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for name in ("one", "three"):
        compared.clear()
        client.get("/v1/models", headers={"Authorization": f"Bearer {name}"})
        assert compared == [key.encode() for key in KEYS]


def test_an_unknown_model_is_named_with_the_one_there_is(client: TestClient) -> None:
    headers = {"Authorization": "Bearer one"}
    for answer in (
        client.get("/v1/models/other", headers=headers),
        client.post("/v1/completions", json={"model": "other", "prompt": "a"}, headers=headers),
        client.post("/v1/embeddings", json={"model": "other", "input": "a"}, headers=headers),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "the model 'other' does not exist: this server has 'tiny'"


def test_other_host_names_are_refused() -> None:
    """A page of another name, which a browser looks up as the address of this machine, may not use the server."""
    model = tiny("llama3", max_position_embeddings=64)
    served = Server(model, jaxlm.Engine(model, 1), "tiny", hosts=["localhost", "My.Host"])
    with TestClient(create_app(served)) as http:
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("my.host:1", 200),
                             ("evil.example", 403), ("localhost.evil.example", 403), ("", 403)):  # fmt: skip
            assert http.get("/v1/models", headers={"Host": host}).status_code == status, host
        answer = http.get("/", headers={"Host": "evil.example"})
        assert "--allow-host evil.example" in answer.json()["error"]["message"]

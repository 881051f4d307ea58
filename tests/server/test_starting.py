"""What a server answers while its model is loaded and its programs are compiled."""

import socket

import httpx
import pytest

from jaxlm.cli import serve as command
from jaxlm.cli.serve import Serve, address, listen
from jaxlm.server.starting import refusing


def test_every_request_is_refused_until_the_block_ends() -> None:
    with listen("127.0.0.1", 0) as listening, httpx.Client(base_url=f"http://{address(listening)}", timeout=10) as http:
        for _ in range(2):  # the socket stays open
            with refusing(listening):
                for path in ("/health", "/ready", "/v1/models"):
                    answer = http.get(path)
                    assert answer.status_code == 503
                    assert answer.headers["Retry-After"] == "5"
                answer = http.post("/v1/completions", json={"prompt": "a" * 100_000})
                assert answer.json()["error"]["message"].startswith("the model is being loaded")
                assert http.head("/health").status_code == 503
                with socket.create_connection(listening.getsockname()) as slow:
                    slow.sendall(b"nonsense\r\n\r\n")  # and others are answered meanwhile
                    assert http.get("/health").status_code == 503


@pytest.mark.parametrize("prepare", [False, True])
def test_health_is_answered_while_the_command_loads_and_compiles(
    prepare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str] = []

    def listening(host: str, port: int) -> socket.socket:
        opened = listen(host, port)
        addresses.append(address(opened))
        return opened

    class Stop(Exception):
        pass

    def asked(*args: object, **named: object) -> None:
        assert httpx.get(f"http://{addresses[0]}/health", timeout=10).status_code == 503
        raise Stop

    class Compiling:
        prepare = staticmethod(asked)

    monkeypatch.setattr(command, "listen", listening)
    monkeypatch.setattr(Serve, "_load_engine", (lambda self: Compiling) if prepare else asked)
    with pytest.raises(Stop):
        Serve(port=0, prepare=prepare).run()

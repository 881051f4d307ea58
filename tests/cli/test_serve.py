"""jaxlm serve: how it ends, its keys, its address and its messages."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxlm.cli.serve import Serve, address, ending_at_signals, listen, raise_file_limit, read_keys

COMMAND = [sys.executable, "-m", "jaxlm", "serve", "--port", "0", "--slots", "2"]
# Long enough that the signal comes before its end.
BODY = {"prompt": "Once upon a time", "max_tokens": 240, "ignore_eos": True, "stream": True}


@contextmanager
def serving(*flags: str) -> Iterator[tuple[Any, str]]:
    """A server of the story model in a process of its own, and its address."""
    process = subprocess.Popen([*COMMAND, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if found := re.search(r"Serving .* on (http://\S+)/v1", line):
                url = found[1]
            if "no chat template" in line:  # the last line
                yield process, url
                break
    finally:
        process.kill()
        process.communicate()


def ended(process: Any) -> tuple[int, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors


def refuses(url: str) -> None:
    """Waits until no more connections are taken."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            httpx.get(url + "/health")
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return
    raise AssertionError("the server takes new requests")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_running_answers_finish(number: signal.Signals) -> None:
    with serving() as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            refuses(url)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        status, printed = ended(process)
        assert status == 0
        lines = [line for line in printed.splitlines() if line]
        lines.remove("Ending: finishing 1 answers. Ctrl-C ends at once.")
        assert "compiling prefill …" in lines
        assert all(re.fullmatch(r"compiling [\w ]+ …", line) for line in lines)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once() -> None:
    with serving() as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json={**BODY, "n": 128}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            refuses(url)
            process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        status, text = ended(process)
    assert status == 130
    assert text.strip().splitlines()[-1] == "interrupted"


def test_a_port_in_use_is_an_error_before_the_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            Serve(model="no/such-model", port=port).run()
    assert "choose another --host or --port" in str(caught.value)
    assert "\n" not in str(caught.value)
    for number in (-1, 70_000):
        with pytest.raises(ValueError, match="ports are 0 to 65535"):
            listen("127.0.0.1", number)
    for host in ("no.such.host.invalid", "256.1.1.1"):
        with pytest.raises(OSError, match="cannot listen on") as caught:
            listen(host, 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [
    {"max_waiting": -1},
    {"slots": 0},
    {"max_length": 0},
    {"request_timeout": 0.0},
    {"request_timeout": float("nan")},
    {"adapter": ("a=b", "a=c")},
])  # fmt: skip
def test_flags_out_of_range_are_errors_before_the_model_is_loaded(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--" + next(iter(flags)).replace("_", "-")):
        Serve(model="no/such-model", port=0, **flags).run()


def test_addresses() -> None:
    with listen("127.0.0.1", 0) as listening:
        assert address(listening) == f"127.0.0.1:{listening.getsockname()[1]}"
    if socket.has_ipv6:
        with listen("::1", 0) as listening:
            assert address(listening) == f"[::1]:{listening.getsockname()[1]}"


@pytest.mark.parametrize(("host", "has_keys", "warned"), [
    ("0.0.0.0", False, True),
    ("0.0.0.0", True, False),
    ("127.0.0.1", False, False),
])  # fmt: skip
def test_a_warning_where_others_can_use_the_server(
    host: str, has_keys: bool, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address is bound and closed again: no model is found."""
    (tmp_path / "keys").touch(0o600)
    (tmp_path / "keys").write_text("secret")
    with pytest.raises(Exception, match="no-such-model"):
        Serve(model=str(tmp_path / "no-such-model"), host=host, port=0,
              api_key_file=tmp_path / "keys" if has_keys else None).run()  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert ([line for line in lines if "Everyone who reaches this address" in line] != []) == warned


def test_keys_are_read_from_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("one\ntwo\n\n  three  \n")
    assert read_keys(path) == ["one", "two", "three"]
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ValueError, match=f"others can read .*keys: chmod 600 {re.escape(str(path))}"):
            read_keys(path)
    path.chmod(0o600)
    for content, message in ((b" \n", "has no API key: write one per line"), (b"\xff\xfe", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_keys(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"--api-key-file .*missing cannot be read") as caught:
        read_keys(tmp_path / "missing")
    assert "\n" not in str(caught.value)


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    http: Any = type("Http", (), {"should_exit": False})()
    with ending_at_signals(http):
        signal.raise_signal(signal.SIGTERM)
        assert http.should_exit
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_limit_of_open_files_is_raised() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[0]), before[1]))
        limit = raise_file_limit()
        assert limit == min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        assert limit >= min(before[0], 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

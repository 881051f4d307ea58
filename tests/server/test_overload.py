"""Ten times as many clients as the server takes: every request is answered or refused, at the same throughput."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.slow
SLOTS, WAITING, SECONDS = 4, 12, 8


@pytest.fixture
def url() -> Iterator[str]:
    """The story model in a process of its own, compiled as users have it."""
    flags = ["--port", "0", "--slots", str(SLOTS), "--max-waiting", str(WAITING), "--prepare"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm", "serve", *flags], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        yield next(found[1] for line in process.stderr if (found := re.search(r"on (http://\S+)/v1", line)))
    finally:
        process.kill()
        process.communicate()


async def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of an answer. httpx would take more time than the server, with so many clients."""
    address, data = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    top, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = top.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), json.loads(content)


async def load(url: str, clients: int) -> tuple[float, Counter[int]]:
    """Tokens per second of clients that send one request after the other, and the statuses of all answers."""
    statuses, tokens, end = Counter[int](), 0, time.monotonic() + SECONDS

    async def ask(n: int) -> None:
        nonlocal tokens
        body = {"prompt": f"Once {n}", "max_tokens": 64, "ignore_eos": True}
        while time.monotonic() < end:
            status, headers, content = await post(url, body)  # an exception would be a lost request
            statuses[status] += 1
            if status == 429:
                await asyncio.sleep(min(int(headers["retry-after"]), max(0, end - time.monotonic())))
            elif time.monotonic() < end:
                tokens += content["usage"]["completion_tokens"]

    await asyncio.gather(*(ask(n) for n in range(clients)))
    return tokens / SECONDS, statuses


def test_overload_costs_no_throughput(url: str) -> None:
    asyncio.run(load(url, 4))
    best, loaded = [], []
    for _ in range(3):  # in turns, because the machine may have other work
        speed, statuses = asyncio.run(load(url, SLOTS + WAITING))
        assert {*statuses} == {200}
        best.append(speed)
        speed, statuses = asyncio.run(load(url, 10 * (SLOTS + WAITING)))
        assert {*statuses} == {200, 429}
        loaded.append(speed)
    assert max(loaded) >= 0.9 * max(best), (best, loaded)

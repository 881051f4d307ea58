"""Ten times as many clients as the server takes: every request is answered or refused, at the same throughput."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
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


async def load(url: str, clients: int) -> tuple[float, Counter[int]]:
    """Tokens per second of clients that send one request after the other, and the statuses of all answers."""
    statuses, tokens, end = Counter[int](), 0, time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:

        async def ask(n: int) -> None:
            nonlocal tokens
            body = {"prompt": f"Once {n}", "max_tokens": 64, "ignore_eos": True}
            while time.monotonic() < end:
                answer = await http.post("/v1/completions", json=body)  # an exception would be a lost request
                statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(int(answer.headers["retry-after"]))
                else:
                    tokens += answer.json()["usage"]["completion_tokens"]

        await asyncio.gather(*(ask(n) for n in range(clients)))
    return tokens / (time.monotonic() - end + SECONDS), statuses


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

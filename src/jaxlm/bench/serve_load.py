"""A load generator for servers with the protocol of OpenAI: several clients, or requests that arrive at a rate.

A closed loop has a number of clients, each of which sends its next request when its last one has ended. An open loop
sends requests at random times (a Poisson process), whether or not earlier ones have ended. Its times count from the
moment at which a request was due, so that waiting is measured (no coordinated omission).

While a load runs, only times and bytes are stored. They are read afterwards, so that the generator takes little of the
CPU, which it may share with the server. It does not import jax.
"""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import numpy as np

REFUSED = (429, 503)  # statuses of a server that is busy
# The same tokens, and equally many, from every server.
OPTIONS: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "stream": True,
                           "stream_options": {"include_usage": True}}  # fmt: skip
CONNECT = 10.0  # seconds


class Prompt(NamedTuple):
    """A request.

    Attributes:
        text: The prompt, as text or token ids.
        max_tokens: Number of tokens to generate.
    """

    text: str | list[int]
    max_tokens: int


class Load(NamedTuple):
    """How requests arrive: from a number of clients (closed loop), or at a rate (open loop). One of them is given.

    Attributes:
        clients: Number of clients.
        rate: Requests per second.
    """

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.clients is None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'s' * (self.clients > 1)}"


@dataclass
class Answer:
    """What was measured of a request. Times are seconds since the load began.

    Attributes:
        number: The index of its prompt.
        begin: When it was sent; in an open loop, when it was due.
        times: Arrivals of new text.
        end: When the answer ended.
        text: The answer.
        prompt_tokens, completion_tokens, cached_tokens: As the server counts them.
        error: Why it failed; empty if it did not.
        is_refused: Whether it failed because the server was busy.
    """

    number: int
    begin: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    is_refused: bool = False

    @property
    def first_token(self) -> float:
        """Seconds until the first text."""
        return self.times[0] - self.begin

    @property
    def intervals(self) -> list[float]:
        """Seconds between two arrivals of text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


@dataclass
class Measured:
    """What was measured of a load, complete or not.

    Attributes:
        answers: The requests that ended, in the order of their ends.
        seconds: From the begin of the load to the last end of an answer.
        client_seconds: CPU seconds of this process, which is the load generator.
        is_complete: Whether the load ended by itself.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    client_seconds: float = 0.0
    is_complete: bool = False


def headers() -> dict[str, str]:
    """The headers of all requests. OPENAI_API_KEY is the API key, as for the openai client."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})


def find_model(url: str) -> str:
    """The name of the first model of a server.

    Args:
        url: The base URL, which ends in /v1.

    Raises:
        ValueError: The server cannot be reached, or does not answer as the protocol says.
    """
    try:
        answer = httpx.get(f"{url}/models", timeout=CONNECT, headers=headers())
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{url}/models cannot be read ({reason}): start the server, or correct the URL") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{url}/models lists no model: give the URL of an OpenAI-compatible server") from None


def run_load(
    url: str, model: str, load: Load, prompts: Sequence[Prompt], seconds: float, measured: Measured, seed: int = 0
) -> None:
    """Runs a load. After `seconds` it sends no more requests. After twice as long it gives up those that have not
    ended, which then have failed.

    Args:
        url: The base URL.
        model: The name of the model.
        load: How requests arrive.
        prompts: The requests, in this order.
        seconds: How long to send requests.
        measured: Receives the result, also when the run is interrupted.
        seed: Of the arrivals of an open loop.
    """
    sender = Sender(f"{url}/completions", model, prompts, 2 * seconds)
    used = time.process_time()
    try:
        asyncio.run(sender.run(load, seconds, seed))
        measured.is_complete = True
    finally:
        measured.client_seconds = time.process_time() - used
        measured.answers = [read_answer(answer, parts) for answer, parts in sender.ended]
        measured.seconds = max((answer.end for answer in measured.answers), default=0.0)


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """The times in seconds at which requests of a Poisson process are due."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


class Sender:
    """Sends the requests of a load.

    Attributes:
        ended: The requests that ended: what is known of each, and the bytes of its answer with their times.
    """

    def __init__(self, url: str, model: str, prompts: Sequence[Prompt], timeout: float):
        self.url, self.timeout = url, timeout
        self.bodies = [
            json.dumps({"model": model, "prompt": prompt.text, "max_tokens": prompt.max_tokens, **OPTIONS}).encode()
            for prompt in prompts
        ]
        self.ended: list[tuple[Answer, list[tuple[float, bytes]]]] = []

    async def run(self, load: Load, seconds: float, seed: int) -> None:
        # A connection for each request: llama.cpp may close one that a request is about to use again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=CONNECT)
        headers_ = headers() | {"Content-Type": "application/json"}
        async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers_, trust_env=False) as self.http:
            self.origin = time.perf_counter()
            if load.clients is not None:
                await self._closed_loop(load.clients, seconds)
            else:
                assert load.rate is not None
                await self._open_loop(arrivals(load.rate, len(self.bodies), seed), seconds)

    def now(self) -> float:
        return time.perf_counter() - self.origin

    async def _closed_loop(self, clients: int, seconds: float) -> None:
        numbers = iter(range(len(self.bodies)))

        async def client() -> None:
            for number in numbers:  # shared by the clients
                if self.now() > seconds:
                    break
                await self._ask(number, self.now())

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())

    async def _open_loop(self, due: Sequence[float], seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, moment in enumerate(due):
                if moment > seconds:
                    break
                await asyncio.sleep(max(0.0, moment - self.now()))
                group.create_task(self._ask(number, moment))

    async def _ask(self, number: int, begin: float) -> None:
        """Sends a request and stores its answer."""
        answer, parts = Answer(number, begin), []
        try:
            async with asyncio.timeout(self.timeout - self.now()):
                async with self.http.stream("POST", self.url, content=self.bodies[number]) as response:
                    async for data in response.aiter_raw():
                        parts.append((self.now(), data))
            if response.status_code != 200:
                text = b"".join(data for _, data in parts).decode(errors="replace")
                answer.error = f"status {response.status_code}: {' '.join(text.split())[:200]}"
                answer.is_refused = response.status_code in REFUSED
        except TimeoutError:
            answer.error = f"no complete answer after {self.timeout:g} s"
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.end = self.now()
        self.ended.append((answer, parts))


def read_answer(answer: Answer, parts: Sequence[tuple[float, bytes]]) -> Answer:
    """Reads the server-sent events of an answer, unless it has failed.

    Args:
        answer: What is known of it. The rest is set.
        parts: The bytes of the body and the times of their arrival.
    """
    if answer.error:
        return answer
    rest, usage, is_done, first_event = b"", None, False, None
    for moment, data in parts:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[len(b"data:") :].strip()
            if content == b"[DONE]":
                is_done = True
                continue
            event = json.loads(content)
            if "error" in event:
                answer.error = f"the stream has an error: {event['error']}"
                return answer
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                first_event = moment if first_event is None else first_event
                if choice["text"]:
                    answer.text += choice["text"]
                    answer.times.append(moment)
    if not answer.times and first_event is not None:  # tokens that have no text, such as the end of the text
        answer.times.append(first_event)
    if not is_done or not answer.times:
        answer.error = "the stream ended without an answer" if is_done else "the stream ended early"
    elif usage is None:
        answer.error = "the server counts no tokens: it needs stream_options.include_usage"
    else:
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return answer

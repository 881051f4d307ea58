"""The load generator, against a server whose delays are known."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.http_server import interrupt_after, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.bench import serve_load
from jaxlm.bench.serve_load import Answer, Load, Measured, Prompt, find_model, read_answer, run_load

FIRST, GAP = 0.06, 0.03  # seconds
# A thread of a busy machine may run late. The medians of a few requests are later by less than this.
LATE = 0.25
sent: list[list[float]] = []  # when the server sent each token of each request
one_at_a_time = asyncio.Semaphore(1)


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


async def complete(http: Request) -> Response:
    body = await http.json()
    prompt, count = body["prompt"], body["max_tokens"]
    assert (body["model"], body["stream"], body["ignore_eos"]) == ("fake", True, True)
    if prompt == "refuse":
        return JSONResponse({"error": {"message": "too many requests"}}, 429)
    if prompt == "fail":
        return JSONResponse({"error": {"message": "out of luck"}}, 500)

    async def events() -> Any:
        times: list[float] = []
        sent.append(times)
        if prompt == "hang":
            await asyncio.sleep(30)
        if prompt == "queue":
            async with one_at_a_time:
                await asyncio.sleep(FIRST)
        else:
            await asyncio.sleep(FIRST)
        for n in range(count):
            times.append(time.perf_counter())
            yield event(choices=[{"text": f"é{n} "}], usage=None)
            await asyncio.sleep(GAP if n < count - 1 else 0)
        if prompt == "error":
            yield event(error={"message": "it broke"})
        if prompt != "no usage":
            used = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 2}}
            yield event(choices=[], usage=used)
        if prompt != "break":
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def models(http: Request) -> Response:
    return JSONResponse({"data": [{"id": "fake"}]})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    with running(Starlette(routes=routes)) as found:
        yield found


def run(url: str, load: Load, prompts: list[str], tokens: int = 3, seconds: float = 20.0) -> Measured:
    measured = Measured()
    sent.clear()
    run_load(url, "fake", load, [Prompt(prompt, tokens) for prompt in prompts], seconds, measured)
    return measured


def test_a_closed_loop(url) -> None:
    assert find_model(url) == "fake"
    measured = run(url, Load(clients=3), ["a"] * 9)
    answers = measured.answers
    assert measured.is_complete
    assert sorted(answer.number for answer in answers) == [*range(9)]
    assert all(not answer.error for answer in answers)
    assert {(a.text, a.prompt_tokens, a.completion_tokens, a.cached_tokens) for a in answers} == {
        ("é0 é1 é2 ", 7, 3, 2)
    }
    # Sleeping ends no earlier than it should, up to the resolution of the clock.
    assert all(answer.first_token > FIRST - 0.01 for answer in answers)
    assert FIRST <= np.median([answer.first_token for answer in answers]) < FIRST + LATE
    ours = np.median([gap for answer in answers for gap in answer.intervals])
    theirs = np.median([later - earlier for times in sent for earlier, later in itertools.pairwise(times)])
    assert ours == pytest.approx(theirs, abs=0.02)  # both are measured with one clock; a median of 18
    # Three rounds of three clients at once, not nine requests in turn.
    least = FIRST + 2 * GAP
    assert 3 * least < measured.seconds < 8 * least + LATE
    assert max(answer.end for answer in answers) == measured.seconds
    overlapping = [sum(b.begin < a.end and a.begin < b.end for b in answers) for a in answers]
    assert max(overlapping) > 1


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(serve_load.arrivals(5.0, 20_000, seed=1))
    gaps = np.diff(times)
    assert gaps.min() > 0
    # Of an exponential distribution, mean and standard deviation are equal. Their standard error is 0.7 % and 1 %.
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.04)
    assert serve_load.arrivals(5.0, 3, seed=1) == times[:3].tolist()
    assert serve_load.arrivals(5.0, 3, seed=2) != times[:3].tolist()


def test_an_open_loop_counts_the_time_in_a_queue(url) -> None:
    """A server that answers one request at a time: the last of six waits for the other five."""
    measured = run(url, Load(rate=1000.0), ["queue"] * 6, tokens=1)
    waits = sorted(answer.first_token for answer in measured.answers)
    assert waits[-1] > 6 * FIRST - 0.05
    assert waits[0] < FIRST + LATE


def test_an_open_loop_counts_the_time_before_a_request_is_sent(url, monkeypatch) -> None:
    """A generator that runs late: times count from the moment at which a request was due."""
    monkeypatch.setattr(serve_load, "arrivals", lambda rate, count, seed: [0.0] * count)
    ask = serve_load.Sender._ask

    async def stall(self, number: int, begin: float) -> None:
        time.sleep(0.1)
        await ask(self, number, begin)

    monkeypatch.setattr(serve_load.Sender, "_ask", stall)
    measured = run(url, Load(rate=1.0), ["a", "a", "a"], tokens=1)
    assert [answer.begin for answer in measured.answers] == [0.0] * 3
    assert max(answer.first_token for answer in measured.answers) > 0.3 + FIRST - 0.01


def test_errors_and_refusals_are_counted(url) -> None:
    prompts = ["refuse", "fail", "break", "error", "no usage", "a"]
    found = {prompts[answer.number]: answer for answer in run(url, Load(clients=6), prompts).answers}
    assert found["a"].error == ""
    assert found["refuse"].is_refused
    assert not found["fail"].is_refused
    assert found["fail"].error == 'status 500: {"error":{"message":"out of luck"}}'
    assert found["break"].error == "the stream ended early"
    assert "it broke" in found["error"].error
    assert "include_usage" in found["no usage"].error
    nobody = run("http://127.0.0.1:1/v1", Load(clients=1), ["a"])
    assert nobody.answers[0].error.startswith("ConnectError")


def test_a_load_ends(url) -> None:
    """No request is sent after `seconds`, and none is waited for after twice as long."""
    begin = time.perf_counter()
    measured = run(url, Load(clients=2), ["hang", *["a"] * 100], tokens=1, seconds=0.3)
    assert 0.6 <= time.perf_counter() - begin < 0.6 + 2 * LATE
    assert 1 < len(measured.answers) < 50
    [failed] = [answer for answer in measured.answers if answer.error]
    assert (failed.number, failed.error) == (0, "no complete answer after 0.6 s")
    late = run(url, Load(rate=1.0), ["a"] * 100, tokens=1, seconds=0.3)
    assert len(late.answers) < 5


def test_an_interrupt_keeps_what_was_measured(url, monkeypatch) -> None:
    interrupt_after(3, monkeypatch)
    measured = Measured()
    with pytest.raises(KeyboardInterrupt):
        run_load(url, "fake", Load(clients=2), [Prompt("a", 1)] * 200, 60, measured)
    assert not measured.is_complete
    assert 3 <= len(measured.answers) < 100
    assert all(not answer.error for answer in measured.answers)


def test_events_in_any_parts() -> None:
    """Bytes arrive as the network divides them: within an event, a line or a letter."""
    data = "".join([
        event(choices=[{"text": ""}]), ": a comment\n\n", event(choices=[{"text": "é"}]).replace("\n", "\r\n"),
        event(choices=[{"text": "b"}]),
        event(choices=[{"text": "", "finish_reason": "length"}], usage={"prompt_tokens": 1, "completion_tokens": 2}),
        "data: [DONE]\n\n",
    ]).encode()  # fmt: skip
    whole = read_answer(Answer(0, 0.0), [(1.0, data)])
    parts = read_answer(Answer(0, 0.0), [(float(i), data[i : i + 1]) for i in range(len(data))])
    assert (whole.text, whole.times, whole.error) == ("éb", [1.0, 1.0], "")
    assert (parts.text, parts.error, parts.completion_tokens) == ("éb", "", 2)
    assert parts.times == [float(data.index(end) + len(end) - 1) for end in (b"\r\n", b'"b"}]}\n')]
    silent = event(choices=[{"text": ""}], usage={"prompt_tokens": 1, "completion_tokens": 1}) + "data: [DONE]\n\n"
    assert read_answer(Answer(0, 0.0), [(3.0, silent.encode())]).times == [3.0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [("http://127.0.0.1:1/v1", "start the server, or correct the URL"), ("no-url", "correct the URL")],
)
def test_a_url_without_a_server(bad, words) -> None:
    with pytest.raises(ValueError, match=words):
        find_model(bad)


def test_a_url_of_something_else(url) -> None:
    with pytest.raises(ValueError, match="404"):
        find_model(url.removesuffix("/v1"))

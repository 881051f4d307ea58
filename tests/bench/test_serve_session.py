"""Servers in turns: rounds, records, ratios within a round, and prompts. And their processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.bench import serve_process, serve_session, serve_tables
from jaxlm.bench.serve_load import Answer, Load, Measured, Prompt
from jaxlm.bench.serve_process import ServerProcess
from jaxlm.bench.serve_prompts import from_lines, random_words, words
from jaxlm.bench.serve_session import ServeCase, Server, ServeSession

OURS, RIVAL = Server("jaxlm", "http://a/v1"), Server("llama.cpp", "http://b/v1")


def answer(number: int, first: float, gaps: list[float], text: str = "x", **fields: Any) -> Answer:
    """An answer of a token of text at each time, which was asked for at second 1."""
    times = [1 + first, *(1 + first + np.cumsum(gaps))]
    counts = {"prompt_tokens": 10, "completion_tokens": len(times)}
    return Answer(number, 1.0, times, times[-1], text, **{**counts, **fields})


def measured(*answers: Answer, seconds: float = 2.0) -> Measured:
    return Measured([*answers], seconds, client_seconds=0.1, is_complete=True)


def session(**rounds: list[Measured]) -> ServeSession:
    found = ServeSession([OURS, RIVAL], [random_words(10, 3)], [Load(clients=2)], 2)
    test = ServeCase("10+3", Load(clients=2))
    found.measured = {(test, name.replace("llama", "llama.cpp")): each for name, each in rounds.items()}
    found.load_averages = [0.5, 1.25]
    return found


def test_the_figures_of_a_load() -> None:
    firsts = [0.01 * n for n in range(1, 101)]
    good = [answer(n, first, [0.02, 0.04]) for n, first in enumerate(firsts)]
    bad = [Answer(100, 1.0, error="status 429: busy", is_refused=True), Answer(101, 1.0, error="ConnectError: no")]
    [record] = serve_tables.records(session(jaxlm=[measured(*good, *bad, seconds=50.0)]), first_token_limit=250.0)
    assert (record["requests"], record["failed"], record["refused"]) == (102, 2, 1)
    assert record["errors"] == ["ConnectError: no", "status 429: busy"]
    assert record["requests_per_second"] == 100 / 50
    assert record["output_tokens_per_second"] == 300 / 50
    assert record["total_tokens_per_second"] == 1300 / 50
    # Linear interpolation between ranks: of 10 to 1,000 ms.
    assert record["first_token_ms"] == pytest.approx({"p50": 505.0, "p95": 950.5, "p99": 990.1})
    assert record["inter_token_ms"] == pytest.approx({"p50": 30.0, "p95": 40.0, "p99": 40.0})
    assert record["latency_ms"] == pytest.approx({"p50": 565.0, "p95": 1010.5, "p99": 1050.1})
    assert record["goodput"] == 25 / 50
    json.dumps(record)
    table = serve_tables.table([record])
    assert "505, 951, 990" in table
    assert "goodput, requests/s within 250 ms" in table


def test_ratios_are_within_a_round() -> None:
    """Round 1: 8 and 4 tokens/s, first tokens 0.1 and 0.3 s. Round 2, on a busy machine: 2 and 2, 0.4 and 0.2 s."""

    def a_round(first: float, seconds: float, text: str = "x") -> Measured:
        return measured(*(answer(n, first, [0.1], text if n else "x") for n in range(4)), seconds=seconds)

    found = session(jaxlm=[a_round(0.1, 1.0), a_round(0.4, 4.0)], llama=[a_round(0.3, 2.0, "y"), a_round(0.2, 4.0)])
    ours, theirs = serve_tables.records(found, None)
    assert "jaxlm" not in theirs
    beside = ours["llama.cpp"]
    assert beside["throughput_ratios"] == [2.0, 1.0]
    assert beside["first_token_ratios"] == pytest.approx([3.0, 0.5])
    assert (beside["texts"], beside["equal_texts"]) == (8, 5)
    text = serve_tables.text(found, [ours, theirs])
    assert "1.50 (1.00 to 2.00)" in text
    assert "1.75 (0.50 to 3.00)" in text
    assert "5 of 8" in text
    assert "begin of the rounds: 0.5, 1.2" in text


@pytest.mark.parametrize(
    "theirs",
    [
        measured(answer(0, 0.1, [0.1])),  # one request less
        measured(answer(0, 0.1, [0.1]), answer(1, 0.1, [0.1, 0.1])),  # one token more
        measured(answer(0, 0.1, [0.1]), answer(1, 0.1, [0.1], prompt_tokens=11)),
        measured(answer(0, 0.1, [0.1]), Answer(1, 1.0, error="status 503: busy", is_refused=True)),
    ],
)
def test_a_round_of_unequal_work_has_no_ratio(theirs) -> None:
    ours = measured(answer(1, 0.1, [0.1]), answer(0, 0.1, [0.1]))
    assert serve_tables.records(session(jaxlm=[ours], llama=[ours]), None)[0]["llama.cpp"]["throughput_ratios"] == [1]
    found = session(jaxlm=[ours], llama=[theirs])
    record, *_ = serve_tables.records(found, None)
    assert record["llama.cpp"]["throughput_ratios"] == []
    assert "0 of 1" in serve_tables.text(found, serve_tables.records(found, None))


def test_servers_take_turns_with_the_same_requests(monkeypatch) -> None:
    calls: list[tuple[str, Load, list[Prompt]]] = []

    def run_load(url, model, load, prompts, seconds, measured, seed=0) -> None:
        assert model == f"model of {url}"
        calls.append((url, load, [*prompts]))
        measured.answers, measured.seconds, measured.is_complete = [answer(0, 0.1, [0.1])], 1.0, True

    monkeypatch.setattr(serve_session, "run_load", run_load)
    monkeypatch.setattr(serve_session, "find_model", lambda url: f"model of {url}")
    loads = [Load(clients=1), Load(clients=17), Load(rate=2.0)]
    found = ServeSession([OURS, RIVAL], [random_words(5, 3), random_words(6, 3)], loads, 2)
    progress: list[str] = []
    found.run(lambda text, left: progress.append(text))
    warm, calls = calls[:4], calls[4:]
    assert [(url, len(prompts)) for url, _, prompts in warm] == [(OURS.url, 2)] * 2 + [(RIVAL.url, 2)] * 2
    pairs = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(pairs) == 2 * 2 * 3
    for (url, load, prompts), (other_url, other_load, other_prompts) in pairs:
        assert {url, other_url} == {OURS.url, RIVAL.url}
        assert (load, prompts) == (other_load, other_prompts)
        assert len(prompts) == (34 if load.clients == 17 else 16)
    assert {pair[0][0] for pair in pairs} == {OURS.url, RIVAL.url}  # each is first at times
    for server in (OURS, RIVAL):  # no prompt comes twice
        texts = [str(p.text) for url, _, prompts in [*warm, *calls] if url == server.url for p in prompts]
        assert len(texts) == len(set(texts)) > 200
    assert all(len(rounds) == 2 for rounds in found.measured.values())
    order = [(r["test"], r["load"], r["server"]) for r in serve_tables.records(found, None)]
    assert order == [(kind.name, load.name, server.name) for kind in found.kinds for load in loads
                     for server in (OURS, RIVAL)]  # fmt: skip
    assert len(found.load_averages) == 2
    assert progress[2] == "round 1 of 2: 5+3, 1 client, jaxlm"


def test_a_failing_server_is_an_error_before_the_rounds(monkeypatch) -> None:
    def run_load(url, model, load, prompts, seconds, measured, seed=0) -> None:
        measured.answers = [Answer(0, 0.0, error="status 400: too long")]

    monkeypatch.setattr(serve_session, "run_load", run_load)
    monkeypatch.setattr(serve_session, "find_model", lambda url: "model")
    with pytest.raises(ValueError, match=r"jaxlm fails at a first request of 5\+3: status 400: too long"):
        ServeSession([OURS], [random_words(5, 3)], [Load(clients=1)], 1).run(lambda text, left: None)


def test_prompts() -> None:
    kind = random_words(20, 5)
    assert (kind.name, kind.longest) == ("20+5", 45)
    first = kind.request(1)
    assert first == kind.request(1)
    assert isinstance(first.text, str)
    assert (len(first.text.split()), first.max_tokens) == (20, 5)
    # 1,000 prompts hardly ever begin with the same two words.
    assert len({" ".join(str(kind.request(n).text).split()[:2]) for n in range(1000)}) > 990
    assert len(words()) > 500
    lines: list[tuple[str | list[int], str | None]] = [(f"prompt {n}", "four" * n) for n in range(1, 9)]
    read = from_lines("f.jsonl", lines, None)
    assert {(read.request(n).text, read.request(n).max_tokens) for n in range(8)} == {
        (f"prompt {n}", n) for n in range(1, 9)
    }
    assert read.request(8) == read.request(0)
    assert from_lines("f.jsonl", lines, 7).request(3).max_tokens == 7
    with pytest.raises(ValueError, match="no answer in the field completion: pass -n"):
        from_lines("f.jsonl", [("a", None)], None)


def test_the_message_of_a_server_that_ends() -> None:
    with pytest.raises(ValueError, match="a name ended with status 1: KeyError: 'no server'"):
        ServerProcess("a name", "no server")


def test_a_server_ends_with_its_parent(monkeypatch, tmp_path) -> None:
    """The process prints its address, and ends when its standard input is closed."""
    (tmp_path / "fake_server.py").write_text(
        "import sys, threading\n"
        "from jaxlm.bench import serve_process\n"
        "serve_process.rivals.llama_cpp_server = lambda *args: print('library', args, file=sys.stderr) or Server()\n"
        "class Server:\n    listening_address = 'http://127.0.0.1:4321'\n"
        "serve_process.main(*sys.argv[1:])\n"
    )
    popen = serve_process.subprocess.Popen
    monkeypatch.setattr(
        serve_process.subprocess, "Popen",
        lambda args, **more: popen([args[0], str(tmp_path / "fake_server.py"), *args[3:]], **more),
    )  # fmt: skip
    server = serve_process.start_llama_cpp(Path("model.gguf"), 3, 100)
    try:
        assert server.url == "http://127.0.0.1:4321/v1"
        assert "library ('model.gguf', 3, 100)" in Path(server.errors.name).read_text()
        assert server.process.poll() is None
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.process.wait(20) != 0
    finally:
        server.close()

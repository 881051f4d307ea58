"""Prefill and decoding timed with a tiny model: what runs, in which order, and what counts."""

import dataclasses
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from helpers.tiny_models import tiny

from jaxlm.bench.cases import Case, Sample
from jaxlm.bench.measure import Jaxlm, Session
from jaxlm.devices import hardware
from jaxlm.inference import compilation, decoding
from jaxlm.inference.compilation import CompiledSteps


@pytest.fixture(scope="module")
def model():
    return tiny("llama3")


@pytest.fixture(autouse=True)
def rates(monkeypatch) -> None:
    monkeypatch.setattr("jaxlm.bench.limits.read_rate", lambda device: 1e9)
    monkeypatch.setattr("jaxlm.bench.limits.matmul_rate", lambda device, dtype: 1e9)


class Fake:
    """A rival that takes this time."""

    def __init__(self, name: str, seconds: float | None, calls: list[str]):
        self.name, self.seconds, self.calls, self.closed = name, seconds, calls, False

    def run(self, case: Case, prompts: list[list[int]]) -> Sample | None:
        assert prompts == case.prompts(199)
        self.calls.append(self.name)
        return None if self.seconds is None else Sample(self.seconds)

    def close(self) -> None:
        self.closed = True


def counted(monkeypatch, *names: str) -> Counter:
    """Counts the programs that run."""
    calls = Counter()
    for name in names:
        original: Any = getattr(CompiledSteps, name)

        def wrapped(self, *args, original=original, name=name):
            calls[name] += not self._ahead
            return original(self, *args)

        monkeypatch.setattr(CompiledSteps, name, wrapped)
    return calls


def test_decoding_is_timed_after_the_first_token(model, monkeypatch) -> None:
    calls = counted(monkeypatch, "step", "sample_token")
    case = Case("decode", 6, 0, 2)
    sample = Jaxlm(model).run(case, case.prompts(199))
    assert calls == {"step": 6, "sample_token": 1}
    assert len(sample.intervals) == 2 * 6
    assert not sample.first_token
    # Two rows arrive together, so the intervals of a row add up to the time of all.
    assert sum(sample.intervals) / 2 == pytest.approx(sample.seconds, rel=0.2)


def test_prefill_is_timed_without_compilation(model, monkeypatch) -> None:
    case = Case("prefill", 20, 0, 2)
    ours = Jaxlm(dataclasses.replace(model, config=dataclasses.replace(model.config, eps=2e-5)))  # new programs
    first, second = (ours.run(case, case.prompts(199)) for _ in range(2))
    assert first.compile_seconds > second.compile_seconds == 0
    assert first.seconds < first.compile_seconds
    assert len(first.first_token) == 2
    assert max(second.first_token) == second.seconds


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_at_a_depth_computes_only_what_follows(model, monkeypatch, batch) -> None:
    case, seen = Case("prefill", 7, 40, batch), []
    chunks: Any = decoding.chunks

    def wrapped(ids, starts, sizes):
        seen.append((list(starts), [len(row) for row in ids]))
        return chunks(ids, starts, sizes)

    monkeypatch.setattr(decoding, "chunks", wrapped)
    sample = Jaxlm(model).run(case, case.prompts(199))
    rows = 1 if batch == 1 else 4  # a power of two
    assert seen == [([0] * rows, [40] * rows), ([40] * rows, [7] * rows)]
    assert len(sample.first_token) == batch


def test_rivals_take_turns_and_the_slower_contestants_end(model) -> None:
    calls: list[str] = []
    slow, fast, other = Fake("a float32", 2.0, calls), Fake("a bfloat16", 1.0, calls), Fake("b", None, calls)
    case = Case("decode", 2, 0, 1)
    session = Session(model, [case], 2, [slow, fast, other])
    session.run(lambda text, seconds: None)
    row = session.rows[case]
    assert calls == ["a float32", "a bfloat16", "b"] * 2 + ["a bfloat16"]
    assert (slow.closed, fast.closed, other.closed) == (True, False, True)
    assert len(row.samples) == 2
    assert row.rivals == {"a float32": [2.0], "a bfloat16": [1.0, 1.0]}
    assert row.rival("a") == ("a bfloat16", 2.0)
    assert session.rates.timed == 2


def test_round_0_is_not_counted(model, monkeypatch) -> None:
    numbers = iter(range(100, 200))
    monkeypatch.setattr(Jaxlm, "run", lambda self, case, prompts: Sample(next(numbers), 5.0))
    case = Case("decode", 2, 0, 1)
    session = Session(model, [case], 2)
    session.run(lambda text, seconds: None)
    assert [sample.seconds for sample in session.rows[case].samples] == [101, 102]
    assert session.rows[case].compile_seconds == 15


def test_progress_says_what_runs_and_how_long_it_takes(model) -> None:
    lines: list[tuple[str, float | None]] = []
    session = Session(model, [Case("decode", 2, 0, 1)], 2)
    session.run(lambda text, seconds: lines.append((text, seconds)))
    assert lines[0] == ("warm-up: tg2, batch 1, jaxlm", None)
    assert [text for text, _ in lines if "jaxlm" in text][-1] == "round 2 of 2: tg2, batch 1, jaxlm"
    left = [seconds for text, seconds in lines if text.startswith("round") and text.endswith("jaxlm")]
    assert len(left) == 2
    assert all(left)


def test_what_does_not_fit_is_refused_before_anything_runs(model, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda device: 2_000_000)
    monkeypatch.setattr(Jaxlm, "run", lambda *_: pytest.fail("a case ran"))
    cases = [Case("decode", 8, 0, 1), Case("decode", 8, 1024, 64)]
    with pytest.raises(MemoryError, match="batch_size=") as error:
        Session(model, cases, 1).run(lambda text, seconds: None)
    assert "64 sequences" in str(error.value)
    with pytest.raises(ValueError, match="context length"):
        Session(model, [Case("prefill", 40_000, 0, 1)], 1).run(lambda text, seconds: None)


def test_waits_for_programs_that_are_compiled_in_the_background(monkeypatch) -> None:
    future: Future[None] = Future()
    monkeypatch.setattr(compilation, "_running", {future})
    threading.Timer(0.2, future.set_result, (None,)).start()
    compilation.wait_for_background()
    assert future.done()

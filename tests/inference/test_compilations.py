"""What compiles and what does not: every program that jax compiles is counted, also those of single operations."""

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, bias_of, model_of, quick_compilation, tokenizer_of

import jaxlm
from jaxlm.devices import hardware
from jaxlm.inference import decoding, engine
from jaxlm.inference.decoding import CompiledSteps, executables
from jaxlm.model import Model
from jaxlm.models import llama3
from jaxlm.nn import Rope

COMPILE = "/jax/core/compile/backend_compile_duration"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_compilation():
        yield


def model_with(context: int) -> Model:
    """A model for a single test: models of the same config share programs."""
    return model_of(llama3, llama3.Config(**SIZES, L=1, rope=Rope(1e4), context=context), tokenizer_of(TEMPLATE))


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the programs that are compiled in the test. Threads of earlier tests are waited for."""
    for thread in threading.enumerate():
        if thread.name.startswith("jaxlm-compile"):
            thread.join()
    names: list[str] = []

    def record(event: str, duration: float, **about: Any) -> None:
        if event == COMPILE:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(record)
    yield names
    jax.monitoring.unregister_event_duration_listener(record)


def ids(length: int) -> list[int]:
    return [(7 * i) % SIZES["V"] for i in range(length)]


def test_first_prompt_compiles_few_programs(compiled: list[str]) -> None:
    """Each small program takes as long as the first token of a small model."""
    model = model_with(4001)
    compiled.clear()
    jaxlm.generate(model, ids(32), max_tokens=4, **GREEDY)
    assert {"jit(prefill)", "jit(sample_token)", "jit(insert)", "jit(step)"} <= {*compiled}
    # Besides these: the PRNG key of a request, the keys of all rows, two empty KV caches.
    assert len(compiled) <= 8, compiled


def test_other_lengths_compile_nothing(compiled: list[str]) -> None:
    model = model_with(4002)
    jaxlm.generate(model, ids(32), max_tokens=64, **GREEDY)
    assert compiled
    compiled.clear()
    for length, max_tokens in ((50, 100), (200, 40), (7, 300), (440, 3000)):
        jaxlm.generate(model, ids(length), max_tokens=min(max_tokens, 40), **GREEDY)
        list(islice(jaxlm.stream(model, ids(length), max_tokens=max_tokens, temperature=1.0, top_p=0.9), 3))
    jaxlm.generate(model, [ids(3), ids(70), ids(130)], max_tokens=9, batch_size=1, **GREEDY)
    assert compiled == []


def test_other_batches_compile_nothing(compiled: list[str]) -> None:
    model = model_with(4003)
    jaxlm.generate(model, [ids(20)] * 4, max_tokens=8, **GREEDY)
    compiled.clear()
    jaxlm.generate(model, [ids(3), ids(4), ids(15), ids(9)], max_tokens=20, **GREEDY)
    jaxlm.generate(model, [ids(100)] * 4, max_tokens=30, temperature=0.7, repetition_penalty=1.0)
    assert compiled == []


def test_second_turn_compiles_nothing(compiled: list[str]) -> None:
    model = model_with(4004)
    talk = jaxlm.Conversation(model, max_tokens=6, temperature=0, logit_bias=bias_of(model))
    list(talk.send("hello"))
    compiled.clear()
    list(talk.send("and now a longer message, of many more words than the one before it " * 3))
    talk.set("max_tokens", 30)
    list(talk.retry())
    assert compiled == []


def test_penalties_compile_nothing_for_another_length(compiled: list[str]) -> None:
    model = model_with(4005)
    how = {**GREEDY, "repetition_penalty": 1.5, "logprobs": 2}
    jaxlm.generate(model, ids(12), max_tokens=5, **how)
    compiled.clear()
    jaxlm.generate(model, ids(90), max_tokens=9, **how)
    assert compiled == []


def test_decoding_copies_nothing_to_the_device() -> None:
    chunks = jaxlm.stream(model_with(4006), ids(9), max_tokens=20, **GREEDY)
    assert len(list(islice(chunks, 2))) == 2
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        assert sum(len(chunk.tokens) for chunk in chunks) >= 17


def test_long_prompts_take_full_chunks() -> None:
    full, small = decoding.chunk_sizes("cpu", 1)
    sizes = {
        length: [tokens.shape[1] for tokens, _ in decoding.chunks([ids(length), ids(3)], 5, full, small)]
        for length in (1, small, small + 1, full - 1, full, 2 * full + small + 1)
    }
    assert sizes[1] == sizes[small] == [small]
    assert sizes[small + 1] == [small, small]
    assert sizes[full - 1] == [small] * (full // small)
    assert sizes[full] == [full]
    assert sizes[2 * full + small + 1] == [full, full, small, small]
    pieces = decoding.chunks([ids(full + 9), ids(3)], 5, full, small)
    tokens, pos = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    assert tokens[0][pos[0] >= 0].tolist() == ids(full + 9)
    assert pos[0][pos[0] >= 0].tolist() == list(range(5, full + 14))
    assert tokens[1][pos[1] >= 0].tolist() == ids(3)


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 5000])
def test_cache_lengths(rows: int) -> None:
    """Short requests have the same lengths. Every length fits the context, and the last one all tokens."""

    def lengths(prompt: int, max_tokens: int, context: int = 9000) -> engine.CacheLengths:
        return engine.cache_lengths([engine.Request(ids(prompt), engine.DEFAULT_PARAMS, max_tokens)], rows, context)

    least, most, _ = engine.SMALLEST_CACHE
    short = lengths(3, 20)
    assert short == lengths(30, 30)
    assert least <= short.decode[0] <= most
    assert short.decode[0] * rows <= max(least * rows, 2 * engine.SMALLEST_CACHE[2])
    assert lengths(40, 8960).decode[-1] == 9000
    assert lengths(8999, 1) == (lengths(8999, 1).prefill, [9000])
    assert lengths(5, 40, context=50) == ([50], [50])
    assert all(b == min(2 * a, 9000) for a, b in zip(*(lengths(3, 8000).decode[i:] for i in (0, 1)), strict=False))


def test_scarce_memory_takes_shorter_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fit are not refused because the smallest KV cache does not."""
    from jaxlm.inference import memory

    model = model_with(4007)
    requests = [engine.Request(ids(20), engine.DEFAULT_PARAMS, 12)]
    shortest = engine.shortest_cache_lengths(requests)
    assert shortest.decode == [32]
    monkeypatch.setattr(hardware, "available_memory", lambda device: memory.row_bytes(model, shortest))
    assert memory.check_memory(model, requests, 1) == shortest
    monkeypatch.setattr(hardware, "available_memory", lambda device: memory.row_bytes(model, shortest) - 1)
    with pytest.raises(MemoryError):
        memory.check_memory(model, requests, 1)
    monkeypatch.undo()
    assert memory.check_memory(model, requests, 1).decode == [1024]


class Slow:
    """A lowered program that is compiled after others are."""

    def __init__(self, lowered: Any, after: threading.Event):
        self.lowered, self.after = lowered, after

    def compile(self) -> Any:
        assert self.after.wait(timeout=60)
        return self.lowered.compile()


def test_expected_programs_are_compiled_while_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is compiled when all that are needed next have been traced. The notices are those of the programs
    that were waited for, in the caller's thread."""
    monkeypatch.setattr(decoding, "WORKERS", 4)
    model, lower, traced, all_traced = model_with(4008), decoding.lower_program, [], threading.Event()

    def slow(function: Any, donate: Any, args: Any) -> Any:
        lowered = lower(function, donate, args)
        traced.append(getattr(function, "func", function).__name__)
        if traced[-1] == "step":
            all_traced.set()
        return Slow(lowered, all_traced) if traced[-1] == "prefill" else lowered

    monkeypatch.setattr(decoding, "lower_program", slow)
    notices: list[tuple[str, float | None, bool]] = []
    main = threading.current_thread()
    token = decoding.on_compile.set(
        lambda name, seconds=None: notices.append((name, seconds, threading.current_thread() is main))
    )
    try:
        answer = jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    finally:
        decoding.on_compile.reset(token)
    assert traced == ["prefill", "sample_token", "insert", "step"]
    assert all(in_main for *_, in_main in notices)
    assert [name for name, seconds, _ in notices if seconds is None] == [
        name for name, seconds, _ in notices if seconds is not None
    ]
    assert notices[0][:2] == ("prefill", None)
    assert answer.compile_seconds == pytest.approx(sum(seconds or 0.0 for _, seconds, _ in notices))
    names = [key[0] for key in executables(model.family, model.config)]
    assert sorted(names) == ["decode", "first token", "insert", "prefill"]


@pytest.mark.parametrize("program", ["prefill", "step"])
def test_error_of_the_compiler_reaches_the_caller(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lower = model_with(4009), decoding.lower_program

    class Failing:
        def compile(self) -> Any:
            raise RuntimeError("out of registers")

    def failing(function: Any, donate: Any, args: Any) -> Any:
        name = getattr(function, "func", function).__name__
        return Failing() if name == program else lower(function, donate, args)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "lower_program", failing)
        with pytest.raises(RuntimeError, match="out of registers"):
            jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    assert len(jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY).tokens) == 4
    executables(model.family, model.config).clear()  # for the other program


def test_interrupt_drops_the_programs_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cancelled, cancel = model_with(4010), [], CompiledSteps.cancel

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledSteps, "cancel", lambda steps: cancelled.append(steps) or cancel(steps))
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    assert [(steps._expected, steps._workers, steps._compiling) for steps in cancelled] == [([], None, {})]
    assert len(jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY).tokens) == 4

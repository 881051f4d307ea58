"""What compiles and what does not: every program that jax compiles is counted, also those of single operations."""

import gc
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent import futures
from itertools import combinations_with_replacement, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, bias_of, model_of, quick_compilation, tokenizer_of

import jaxlm
from jaxlm.devices import hardware
from jaxlm.inference import compilation, decoding, memory
from jaxlm.inference.compilation import CompiledSteps, clear_executables, executables
from jaxlm.inference.prefill import DEFAULT_PARAMS
from jaxlm.inference.requests import Request
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
    finish_compiling()
    names: list[str] = []

    def record(event: str, duration: float, **about: Any) -> None:
        if event == COMPILE:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(record)
    yield names
    jax.monitoring.unregister_event_duration_listener(record)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is fast with tiny models: as with others, programs that are needed next are traced meanwhile."""
    monkeypatch.setattr(compilation, "wait", lambda *args, **kwargs: SimpleNamespace(done=set()))


def finish_compiling() -> None:
    while compilation._running:  # a callback may come after the end of a program
        futures.wait([*compilation._running])


def ids(length: int) -> list[int]:
    return [(7 * i) % SIZES["V"] for i in range(length)]


def test_first_prompt_compiles_few_programs(compiled: list[str]) -> None:
    """Each small program takes as long as the first token of a small model."""
    model = model_with(4001)
    compiled.clear()
    jaxlm.generate(model, ids(32), max_tokens=4, **GREEDY)
    assert {"jit(prefill)", "jit(sample_token)", "jit(insert)", "jit(step)"} <= {*compiled}
    # Besides these: chunks of other prompts, the PRNG key of a request, the keys of all rows, two empty KV caches.
    assert len(compiled) <= 9, compiled


def test_other_lengths_compile_nothing(compiled: list[str], patient: None) -> None:
    model = model_with(4002)
    jaxlm.generate(model, ids(32), max_tokens=64, **GREEDY)
    assert compiled
    finish_compiling()
    compiled.clear()
    for length, max_tokens in ((50, 100), (200, 40), (7, 300), (440, 3000)):
        jaxlm.generate(model, ids(length), max_tokens=min(max_tokens, 40), **GREEDY)
        list(islice(jaxlm.stream(model, ids(length), max_tokens=max_tokens, temperature=1.0, top_p=0.9), 3))
    jaxlm.generate(model, [ids(3), ids(70)[::-1], ids(133)[3:]], max_tokens=9, batch_size=1, **GREEDY)
    assert compiled == []


def test_other_batches_compile_nothing(compiled: list[str], patient: None) -> None:
    model = model_with(4003)
    jaxlm.generate(model, [ids(20)] * 4, max_tokens=8, **GREEDY)
    finish_compiling()
    compiled.clear()
    jaxlm.generate(model, [ids(3), ids(4), ids(15), ids(9)], max_tokens=20, **GREEDY)
    jaxlm.generate(model, [ids(100)] * 4, max_tokens=30, temperature=0.7, repetition_penalty=1.0)
    assert compiled == []


def test_second_turn_compiles_nothing(compiled: list[str], patient: None) -> None:
    model = model_with(4004)
    talk = jaxlm.Conversation(model, max_tokens=6, temperature=0, logit_bias=bias_of(model))
    list(talk.send("hello"))
    finish_compiling()
    compiled.clear()
    list(talk.send("and now a longer message, of many more words than the one before it " * 3))
    talk.set("max_tokens", 30)
    list(talk.retry())
    assert compiled == []


def test_penalties_compile_nothing_for_another_length(compiled: list[str], patient: None) -> None:
    model = model_with(4005)
    how = {**GREEDY, "repetition_penalty": 1.5, "logprobs": 2}
    jaxlm.generate(model, ids(12), max_tokens=5, **how)
    finish_compiling()
    compiled.clear()
    jaxlm.generate(model, ids(90), max_tokens=9, **how)
    assert compiled == []


def test_decoding_copies_nothing_to_the_device() -> None:
    chunks = jaxlm.stream(model_with(4006), ids(9), max_tokens=20, **GREEDY)
    assert len(list(islice(chunks, 2))) == 2
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        assert sum(len(chunk.tokens) for chunk in chunks) >= 17


@pytest.mark.parametrize(
    ("length", "want"),
    [(1, [64]), (64, [64]), (65, [128]), (128, [128]), (129, [128, 64]), (200, [128, 128]), (384, [128] * 3),
     (440, [128] * 3 + [64]), (449, [512]), (513, [512, 64]), (1100, [512, 512, 128]), (5100, [512] * 10)],
)  # fmt: skip
def test_chunks_cover_the_prompts(length: int, want: list[int]) -> None:
    pieces = decoding.chunks([ids(length), ids(3)], [5, 5], [512, 128, 64])
    assert [tokens.shape[1] for tokens, _ in pieces] == want
    tokens, pos = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    assert tokens[0][pos[0] >= 0].tolist() == ids(length)
    assert pos[0][pos[0] >= 0].tolist() == list(range(5, length + 5))
    assert tokens[1][pos[1] >= 0].tolist() == ids(3)


@pytest.mark.parametrize(("sizes", "rows"), [((512, 128, 64, 32), 1), ((64, 16), 8), ((2048, 256), 1), ((8,), 3)])
def test_no_other_small_chunks_cost_less(sizes: tuple[int, ...], rows: int) -> None:
    """Plans of up to four chunks, and of one size."""

    def cost(plan: Sequence[int]) -> int:
        return sum(size * rows + hardware.CHUNK_COST for size in plan)

    small = sizes[1:] or sizes
    plans = [plan for n in range(1, 5) for plan in combinations_with_replacement(small, n)]
    for width in range(1, sizes[0] - small[-1] + 1):
        found = decoding.chunk_widths(width, sizes, rows)
        assert sum(found) >= width
        uniform = [(size,) * -(-width // size) for size in small]
        assert cost(found) <= min(cost(plan) for plan in [*plans, *uniform] if sum(plan) >= width)


def test_chunks_cost_the_tokens_of_all_rows() -> None:
    """The padding of eight rows costs more than one more chunk."""
    for rows, want in ((1, [64]), (8, [16, 16])):
        found = [tokens.shape for tokens, _ in decoding.chunks([ids(20)] * rows, [0] * rows, [512, 64, 16])]
        assert found == [(rows, T) for T in want]


def test_chunk_sizes_are_of_all_rows() -> None:
    sizes = {rows: decoding.chunk_sizes("cpu", rows) for rows in (1, 2, 8, 64)}
    assert sizes == {1: [512, 128, 64, 32], 2: [256, 64, 32, 16], 8: [64, 16], 64: [16]}


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 5000])
def test_cache_lengths(rows: int) -> None:
    """Short requests have the same lengths. Every length fits the context, and the last one all tokens."""

    def lengths(prompt: int, max_tokens: int, context: int = 9000) -> memory.CacheLengths:
        return memory.cache_lengths([Request(ids(prompt), DEFAULT_PARAMS, max_tokens, None)], rows, context)

    least, most, _ = memory.SMALLEST_CACHE
    short = lengths(3, 20)
    assert short == lengths(30, 30)
    assert least <= short.decode[0] <= most
    assert short.decode[0] * rows <= max(least * rows, 2 * memory.SMALLEST_CACHE[2])
    assert lengths(40, 8960).decode[-1] == 9000
    assert lengths(8999, 1) == (lengths(8999, 1).prefill, [9000])
    assert lengths(5, 40, context=50) == ([50], [50])
    assert all(b == min(2 * a, 9000) for a, b in zip(*(lengths(3, 8000).decode[i:] for i in (0, 1)), strict=False))


def test_scarce_memory_takes_shorter_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fit are not refused because the smallest KV cache does not."""
    model = model_with(4007)
    requests = [Request(ids(20), DEFAULT_PARAMS, 12, None)]
    shortest = memory.shortest_cache_lengths(requests, model.config.context)
    assert shortest.decode == [32]
    needed = memory.kv_memory(model, 1, shortest) + memory.temporary_bytes(model, 1, 32)
    monkeypatch.setattr(hardware, "available_memory", lambda device: needed)
    assert memory.check_memory(model, requests, 1) == shortest
    monkeypatch.setattr(hardware, "available_memory", lambda device: needed - 1)
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
    """Here, prefill is compiled when the first token has been traced, and insert when decode has. The notices are those
    of the programs that were waited for, in the caller's thread."""
    model, lower, traced = model_with(4008), compilation.lower_program, []
    reached = defaultdict(threading.Event)

    def slow(function: Any, donate: Any, args: Any) -> Any:
        lowered = lower(function, donate, args)
        traced.append(getattr(function, "func", function).__name__)
        slow_first = {"prefill": "sample_token", "insert": "step"}
        if traced[-1] in slow_first and "step" not in traced:
            return Slow(lowered, reached[slow_first[traced[-1]]])
        reached[traced[-1]].set()
        return lowered

    monkeypatch.setattr(compilation, "lower_program", slow)
    notices: list[tuple[str, float | None, bool]] = []
    main = threading.current_thread()
    token = compilation.on_compile.set(
        lambda name, seconds=None: notices.append((name, seconds, threading.current_thread() is main))
    )
    try:
        answer = jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    finally:
        compilation.on_compile.reset(token)
    assert traced[:4] == ["prefill", "sample_token", "insert", "step"]
    assert all(in_main for *_, in_main in notices)
    assert [name for name, seconds, _ in notices if seconds is None] == [
        name for name, seconds, _ in notices if seconds is not None
    ]
    assert notices[0][:2] == ("prefill", None)
    assert answer.compile_seconds == pytest.approx(sum(seconds or 0.0 for _, seconds, _ in notices))
    assert {"decode", "first token", "insert", "prefill"} == {key[0] for key in executables(model.family, model.config)}


def test_notices_reach_the_caller_of_a_thread_of_the_engine() -> None:
    names: list[str] = []
    token = compilation.on_compile.set(lambda name, seconds=None: names.append(name))
    try:
        with jaxlm.Engine(model_with(4011), 1, length=64) as engine:
            assert [*engine.stream(ids(9), max_tokens=2, **GREEDY)]
    finally:
        compilation.on_compile.reset(token)
    assert "prefill" in names


@pytest.mark.parametrize("program", ["prefill", "step"])
def test_error_of_the_compiler_reaches_the_caller(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lower = model_with(4009), compilation.lower_program

    class Failing:
        def compile(self) -> Any:
            raise RuntimeError("out of registers")

    def failing(function: Any, donate: Any, args: Any) -> Any:
        name = getattr(function, "func", function).__name__
        return Failing() if name == program else lower(function, donate, args)

    with monkeypatch.context() as patch:
        patch.setattr(compilation, "lower_program", failing)
        with pytest.raises(RuntimeError, match="out of registers"):
            jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    assert len(jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY).tokens) == 4
    clear_executables()  # for the other program


def test_interrupt_drops_the_programs_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cancelled, cancel = model_with(4010), [], CompiledSteps.cancel

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledSteps, "cancel", lambda steps: cancelled.append(steps) or cancel(steps))
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    assert [(steps._expected, steps._compiling) for steps in cancelled[:1]] == [([], {})]
    assert len(jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY).tokens) == 4


def test_the_programs_of_the_process_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all models together."""
    clear_executables()
    monkeypatch.setattr(compilation, "MAX_EXECUTABLES", 5)
    models = [model_with(n) for n in (4020, 4021)]
    for model in models:
        jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
        compilation.wait_for_background()
    assert sum(len(executables(m.family, m.config)) for m in models) == 5
    clear_executables()


def test_the_program_used_longest_ago_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_executables()
    monkeypatch.setattr(compilation, "MAX_EXECUTABLES", 3)
    for n in (0, 1, 2):
        compilation._keep(("architecture", n), str(n))
    assert compilation._find(("architecture", 0)) == "0"
    compilation._keep(("architecture", 3), "3")
    assert [compilation._find(("architecture", n)) for n in range(4)] == ["0", None, "2", "3"]
    clear_executables()


def test_programs_are_evicted_before_mappings_run_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process without mappings left crashes."""
    clear_executables()
    for name, text in (("MAPS", "a mapping\n" * 70), ("MAX_MAP_COUNT", "100\n")):
        monkeypatch.setattr(compilation, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    for n in range(8):
        compilation._keep(("architecture", n), n)
    assert [n for n in range(8) if compilation._find(("architecture", n)) is not None] == [*range(8)]
    (tmp_path / "MAPS").write_text("a mapping\n" * 71)
    compilation._keep(("architecture", 8), 8)
    assert [n for n in range(9) if compilation._find(("architecture", n)) is not None] == [*range(2, 9)]
    clear_executables()


@pytest.mark.skipif(not compilation.MAPS.exists(), reason="Linux only")
def test_an_evicted_program_leaves_no_mappings() -> None:
    clear_executables()
    model = model_with(4022)
    jaxlm.generate(model, ids(9), max_tokens=4, **GREEDY)
    compilation.wait_for_background()
    before = compilation.mappings()
    count = len(executables(model.family, model.config))
    clear_executables()
    gc.collect()
    assert before - compilation.mappings() > count * 5 / int(compilation.MAX_MAP_COUNT.read_text())

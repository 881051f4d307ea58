"""The open engine: requests that come and go at any time, beside each request alone."""

import asyncio
import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_chat import quick_compilation, tokenizer_of
from helpers.tiny_models import FAMILIES, tiny

import jaxlm
from jaxlm.bench import memory_use
from jaxlm.devices import hardware
from jaxlm.inference import memory, prefix_cache
from jaxlm.inference.engine import Engine
from jaxlm.inference.requests import requests_for
from jaxlm.model import Model

COMPILE = "/jax/core/compile/backend_compile_duration"
LIGHT = [("gemma3", 4)]  # with and without sliding windows; the others are slow tests
BAD = 198  # a token whose embedding is NaN


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the programs that are compiled in the test."""
    names: list[str] = []

    def record(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILE:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(record)
    yield names
    jax.monitoring.unregister_event_duration_listener(record)


def model_of(family: str) -> Model:
    """A tiny model with a tokenizer, whose logits are NaN after the token BAD."""
    model = tiny(family, tie_word_embeddings=False, max_position_embeddings=128)
    weights = {**model.weights, "embed": model.weights["embed"].at[BAD].set(jnp.nan)}
    return replace(model, weights=weights, tokenizer=tokenizer_of(None))


def drawn(rng: random.Random) -> tuple[list[int], dict[str, Any]]:
    """A prompt, often with the beginning of others, and its options."""
    stem = [(7 * i) % 90 for i in range(40)]
    prompt = [*stem[: rng.choice([0, 0, 3, 30, 40])], *(rng.randrange(90) for _ in range(rng.randint(1, 50)))]
    options: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 7, 20, 30]), "seed": rng.randrange(99)}
    options |= {"temperature": rng.choice([0.0, 0.8, 1.3]), "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.3, "logprobs": rng.choice([0, 2])}
    if rng.random() < 0.3:
        options["stop"] = rng.choice(["a", "e", "the"])
    if rng.random() < 0.1:
        prompt.append(BAD)
    return prompt, options


@pytest.mark.parametrize(("family", "steps"), [
    pytest.param(family, steps, marks=[] if (family, steps) in LIGHT else pytest.mark.slow)
    for family in FAMILIES for steps in (1, 4)
])  # fmt: skip
def test_random_requests_equal_each_request_alone(
    family: str, steps: int, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrivals, cancellations, stop strings and NaN in any order. No program is compiled after `prepare`."""
    monkeypatch.setitem(hardware.STEPS, "cpu", steps)
    monkeypatch.setitem(hardware.CHUNK, "cpu", 32)
    monkeypatch.setitem(hardware.SMALL_CHUNKS, "cpu", (16,))
    monkeypatch.setattr("jaxlm.inference.memory.PREFILL_CACHE", 64)
    monkeypatch.setattr(prefix_cache, "WORTH_WAITING", 24)
    rng, model = random.Random(FAMILIES.index(family)), model_of(family)
    engine = Engine(model, 3)
    engine.prepare(constraints=False)
    assert compiled
    compiled.clear()
    texts: dict[Any, list[Any]] = {}
    asked: dict[Any, Any] = {}
    cancelled = set()
    while len(asked) < 40 or engine.is_busy:
        while len(asked) < 40 and rng.random() < 0.4:
            prompt, options = drawn(rng)
            asked[engine.submit(prompt, **options)] = prompt, options
        for chunk in engine.step():
            texts.setdefault(chunk.request, []).append(chunk)
        running = [request for request in asked if not request.finished]
        if running and rng.random() < 0.02:
            cancelled.add(rng.choice(running))
            engine.cancel([*cancelled][-1])
    assert compiled == []
    assert all(slot.request is None for slot in engine.scheduler.rows)
    assert engine.scheduler.hits > 0
    for request, (prompt, options) in asked.items():
        chunks = texts[request]
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        tokens, text, reason = [t for chunk in chunks for t in chunk.tokens], "".join(chunks), chunks[-1].finish_reason
        try:
            alone = [*jaxlm.stream(model, prompt, **options)]
            scores = [[s.chosen for c in found for s in c.logprobs or []] for found in (chunks, alone)]
        except ValueError:  # BAD is in the prompt or in the answer
            assert reason in ("error", "cancelled")
            continue
        expected = [t for chunk in alone for t in chunk.tokens]
        if reason == "cancelled":
            assert request in cancelled
            assert expected[: len(tokens)] == tokens
        else:
            assert (tokens, text, reason) == (expected, "".join(alone), alone[-1].finish_reason)
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    reasons = [chunks[-1].finish_reason for chunks in texts.values()]
    assert {"stop", "length", "error"} <= {*reasons}
    engine.close()


def test_a_prompt_joins_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tokens of a running answer, one chunk of a long prompt is prefilled at most."""
    model = tiny("llama3")
    engine, order = Engine(model, 2, length=1024), []
    steps = engine.steps
    monkeypatch.setattr(steps, "expect", lambda *calls: None)  # calls that compile and do not run
    for name in ("prefill", "step"):
        original = getattr(steps, name)
        setattr(steps, name, lambda *a, original=original, name=name: order.append(name) or original(*a))
    engine.submit([1, 2, 3], max_tokens=60, ignore_eos=True)
    while "step" not in order:
        engine.step()
    order.clear()
    engine.submit([5] * 900, max_tokens=2, ignore_eos=True)
    while engine.is_busy:
        engine.step()
    joined = "".join("p" if name == "prefill" else "s" for name in order)
    assert joined.count("p") >= 2
    assert "pp" not in joined


def test_texts_do_not_share_random_numbers() -> None:
    """A model whose distribution does not depend on the prompt. 1,000 prompts of equal length: the most frequent token
    would come 1,000 times if prompts shared their keys. The counts have the deviation of independent draws."""
    model = tiny("llama3", vocab_size=20)
    model = replace(model, weights={**model.weights, "head": jnp.zeros((20, 48)), "embed": model.weights["embed"]})
    assert "head" in model.weights
    prompts = [[i // 400, i // 20 % 20, i % 20] for i in range(1000)]
    cases: list[tuple[int, list[list[int]]]] = [(1, prompts), (1000, [[3, 4, 5]])]
    for n, asked in cases:
        requests = requests_for(model, asked, {"seed": 3, "temperature": 1.0, "max_tokens": 2}, n)
        keys = {jax.random.key_data(request.key).tobytes() for request in requests}
        assert len(keys) == 1000
        engine = Engine(model, 64, length=16)
        engine.add(*requests)
        while engine.is_busy:
            engine.step()
        for place in (0, 1):
            counts = np.bincount([request.tokens[place] for request in requests], minlength=20)
            chi_squared = ((counts - 50) ** 2 / 50).sum()
            assert 5 < chi_squared < 50  # 19 degrees of freedom: one in 10,000 is outside
        pairs = len({tuple(request.tokens) for request in requests})
        assert pairs > 330  # of 400; 1,000 independent pairs reach 367


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_the_longest_prefix_is_reused_at_any_point(family: str) -> None:
    model = tiny(family)
    engine = Engine(model, 2, length=256)
    base = [(11 * i) % 190 for i in range(120)]

    def run(ids: list[int]) -> tuple[int, list[int]]:
        request = engine.submit(ids, max_tokens=9, temperature=0, ignore_eos=True)
        while engine.is_busy:
            engine.step()
        return request.cached, request.tokens

    first = run(base)
    assert first[0] == 0
    for cut, more in ((120, [5] * 30), (77, [6] * 4), (100, [7] * 50), (64, [1])):
        ids = [*base[:cut], *more]
        assert run(ids) == (cut, jaxlm.generate(model, ids, max_tokens=9, temperature=0, ignore_eos=True).tokens)
    again = run(base)
    assert again == (100, first[1])  # the row with all of it was taken by another request
    assert run(base) == (119, first[1])  # one token is computed: its hidden state is needed
    follow = [*base, *first[1]]
    assert run([*follow, 3])[0] == len(follow) - 1  # the last token of an answer is not in the KV cache


def test_the_row_that_was_used_least_recently_is_taken() -> None:
    model = tiny("llama3")
    engine = Engine(model, 3, length=128)
    prompts = [[i] * 40 for i in range(4)]

    def cached(i: int) -> int:
        request = engine.submit(prompts[i], max_tokens=2, ignore_eos=True)
        while engine.is_busy:
            engine.step()
        return request.cached

    assert [cached(0), cached(1), cached(2)] == [0, 0, 0]
    assert cached(3) == 0  # in the row of 0
    assert cached(1) == 39  # 2 is now the oldest
    assert cached(0) == 0
    assert [cached(1), cached(3), cached(2)] == [39, 39, 0]


def test_a_row_after_nan_is_clean() -> None:
    """Masked slots with NaN would spoil the next request of the row, also beyond its own prompt."""
    model = model_of("llama3")
    engine = Engine(model, 1)
    bad = engine.submit([*range(50), BAD], max_tokens=5)
    while engine.is_busy:
        engine.step()
    assert bad.finished == "error"
    good = engine.submit([1, 2, 3], max_tokens=30, temperature=0, ignore_eos=True)
    while engine.is_busy:
        engine.step()
    assert good.tokens == jaxlm.generate(model, [1, 2, 3], max_tokens=30, temperature=0, ignore_eos=True).tokens


def test_threads_and_asyncio_share_an_engine() -> None:
    model = replace(tiny("qwen3"), tokenizer=tokenizer_of(None))
    prompts = [[i, 2 * i, 3] for i in range(12)]
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    want = jaxlm.generate(model, prompts, **how)
    with Engine(model, 4, length=64) as engine:
        got: dict[int, str] = {}

        def ask(i: int) -> None:
            got[i] = "".join(engine.stream(prompts[i], **how))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()

        async def one(i: int) -> str:
            return "".join([chunk async for chunk in engine.astream(prompts[i], **how)])

        async def all_of_them() -> list[str]:
            return await asyncio.gather(*(one(i) for i in range(6, 12)))

        later = asyncio.run(all_of_them())
        for thread in threads:
            thread.join()
    assert [got[i] for i in range(6)] + later == want


def test_closing_a_stream_cancels_its_request() -> None:
    model = tiny("qwen3")
    with Engine(model, 2, length=2048) as engine:
        stream: Any = engine.stream([1, 2], max_tokens=2000, ignore_eos=True)
        request = next(stream).request
        stream.close()
        for _ in range(100):
            if request.finished:
                break
            threading.Event().wait(0.1)
        assert request.finished == "cancelled"
        assert len(request.tokens) < 2000


def test_close_ends_all_requests() -> None:
    engine = Engine(tiny("qwen3"), 1, length=64)
    requests = [engine.submit([i], max_tokens=50, ignore_eos=True) for i in range(3)]
    engine.step()
    engine.close()
    assert [request.finished for request in requests] == ["cancelled"] * 3
    assert engine.scheduler.state is None
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1])


def test_a_failing_program_ends_the_requests_that_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("qwen3"), 1, length=64)
    first, second = (engine.submit([i], max_tokens=5, temperature=0, ignore_eos=True) for i in range(2))
    monkeypatch.setattr(engine.steps, "expect", lambda *calls: None)  # calls that compile and do not run
    real, calls = engine.steps.step, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(*args)

    monkeypatch.setattr(engine.steps, "step", failing)
    while engine.is_busy:
        engine.step()
    assert (first.finished, str(first.error)) == ("error", "RESOURCE_EXHAUSTED: out of memory")
    assert (second.finished, len(second.tokens)) == ("length", 5)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [([1] * 60, {"max_tokens": 10}, "exceed the length of this engine, 64"),
     ([1] * 64, {}, "64 tokens, and the length of this engine is 64"), ([], {}, "empty"),
     ([1], {"temprature": 1}, "did you mean"), ([1], {"stop": "x"}, "tokenizer")],
)  # fmt: skip
def test_bad_requests_leave_the_engine_as_it_is(prompt: list[int], options: dict[str, Any], words: str) -> None:
    engine = Engine(tiny("qwen3"), 1, length=64)
    with pytest.raises((ValueError, TypeError), match=words):
        engine.submit(prompt, **options)
    assert not engine.is_busy


def test_a_prompt_without_an_answer_may_fill_its_row() -> None:
    """It ends, and the request beside it goes on."""
    engine = Engine(tiny("qwen3"), 2, length=64)
    running = engine.submit([1], max_tokens=20, temperature=0, ignore_eos=True)
    engine.step()
    [full] = engine.requests([[2] * 64], {"max_tokens": 1})
    full.max_tokens = 0  # as for the server's echo
    engine.add(full)
    while engine.is_busy:
        engine.step()
    assert (full.finished, full.error, full.tokens) == ("length", None, [])
    assert (running.finished, len(running.tokens)) == ("length", 20)


def test_prompt_logprobs_and_echo() -> None:
    model = replace(tiny("qwen3"), tokenizer=tokenizer_of(None))
    ids = [(3 * i) % 90 for i in range(70)]
    answer = jaxlm.generate(model, ids, max_tokens=3, temperature=0, prompt_logprobs=True, logprobs=2, echo=True)
    logits = np.asarray(model.forward([ids], model.weights)[0])[0].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores: Any = answer.prompt_logprobs
    assert scores[0] is None
    assert len(scores) == 70
    for n in range(1, 70):
        assert scores[n].chosen == pytest.approx(want[n - 1, ids[n]], abs=1e-4)
        assert [i for i, _ in scores[n].top] == np.argsort(-want[n - 1])[:2].tolist()
    assert answer.tokens[:70] == ids
    assert len(answer.logprobs or []) == len(answer.tokens) == 73
    assert model.tokenizer is not None
    assert answer.startswith(model.tokenizer.decode(ids, skip_special=True))


def test_prompt_logprobs_of_several_prompts() -> None:
    """Of different lengths, prefilled together; the second one shares a prefix with the first."""
    model = tiny("qwen3")
    prompts = [[(3 * i) % 90 for i in range(40)], [*((3 * i) % 90 for i in range(30)), 7, 8, 9]]
    together: Any = jaxlm.generate(model, prompts, max_tokens=2, temperature=0, prompt_logprobs=True, logprobs=1)
    for prompt, found in zip(prompts, together):
        alone: Any = jaxlm.generate(model, prompt, max_tokens=2, temperature=0, prompt_logprobs=True, logprobs=1)
        assert found.cached_tokens == 0
        for a, b in ((found.prompt_logprobs[1:], alone.prompt_logprobs[1:]), (found.logprobs, alone.logprobs)):
            assert [x.chosen for x in a] == pytest.approx([x.chosen for x in b], abs=1e-4)


def test_several_answers_prefill_their_prompt_once() -> None:
    model = tiny("llama3", max_position_embeddings=1024)
    answers = jaxlm.generate(model, [(7 * i) % 90 for i in range(400)], n=4, max_tokens=3, temperature=1.0, seed=0)
    assert sorted(answer.cached_tokens for answer in answers) == [0, 399, 399, 399]


def test_a_row_without_a_request_does_not_decode() -> None:
    engine = Engine(tiny("llama3"), 2, length=128)
    short = engine.submit([1, 2], max_tokens=3, ignore_eos=True)
    long = engine.submit([3, 4], max_tokens=60, ignore_eos=True)
    while len(long.tokens) < 30:
        engine.step()
    assert short.finished
    assert engine.scheduler.state is not None
    pos = np.asarray(engine.scheduler.state.pos)
    assert sorted(pos.tolist())[0] == -1
    assert pos.max() >= 30
    engine.close()


def test_a_function_of_the_tokens_ends_an_answer() -> None:
    model = tiny("qwen3")
    seen: list[int] = []
    answer = jaxlm.generate(
        model,
        [3, 4],
        max_tokens=20,
        ignore_eos=True,
        stop_when=lambda tokens: seen.append(len(tokens)) or len(tokens) == 6,
    )
    assert (len(answer.tokens), answer.finish_reason) == (6, "stop")
    assert seen == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ZeroDivisionError):
        jaxlm.generate(model, [3, 4], max_tokens=20, stop_when=lambda tokens: bool(1 // 0))


def test_an_engine_plans_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV caches and temporaries. Without a given length, the context length is halved until it fits."""
    model = tiny("gemma3", max_position_embeddings=8192)
    lengths = {length: memory.few_cache_lengths(length) for length in (8192, 4096)}
    needed = {n: memory.kv_memory(model, 4, lengths[n], False) + memory.temporary_bytes(model, 4, n) for n in lengths}
    for free, length in ((needed[8192], 8192), (needed[8192] - 1, 4096)):
        monkeypatch.setattr(hardware, "available_memory", lambda device, free=free: free)
        assert Engine(model, 4).length == length
    with pytest.raises(MemoryError, match=r"4 sequences of 8,192 tokens.*fewer slots, a shorter length"):
        Engine(model, 4, length=8192)


def test_logits_processors_run_on_the_device() -> None:
    model = tiny("qwen3")
    only = [7, 11]
    allowed = jnp.zeros(199).at[jnp.array(only)].set(1.0)
    answers = jaxlm.generate(
        model, [[3, 4], [5]], max_tokens=12, temperature=100.0, ignore_eos=True, seed=0,
        logits_processors=[lambda logits: jnp.where(allowed > 0, logits, -jnp.inf)],
    )  # fmt: skip
    assert {token for answer in answers for token in answer.tokens} == {*only}


@pytest.mark.parametrize("wrong", [lambda logits: logits[:, :5], lambda logits: None])
def test_logits_processors_return_logits(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must return an array of the shape"):
        jaxlm.generate(tiny("qwen3"), [3, 4], max_tokens=2, logits_processors=[wrong])


class Alternating:
    """A constraint that allows one of two tokens in turn."""

    def __init__(self, count: int):
        self.left, self.finished = count, False

    def mask(self) -> np.ndarray:
        bits = np.zeros(7, np.uint32)
        token = (33, 198)[self.left % 2]
        bits[token // 32] = 1 << token % 32
        return bits

    def accept(self, token: int) -> None:
        assert token == (33, 198)[self.left % 2]
        self.left -= 1
        self.finished = not self.left


def test_a_constraint_of_the_caller() -> None:
    """Beside a request without one, whose text does not change."""
    model = tiny("qwen3")
    free = {"max_tokens": 12, "temperature": 0.8, "seed": 1, "ignore_eos": True}
    engine = Engine(model, 2, length=64)
    bound = engine.submit([3, 4], max_tokens=20, constraint=lambda: Alternating(5))
    other = engine.submit([9, 9, 9], **free)
    while engine.is_busy:
        engine.step()
    assert bound.tokens == [198, 33, 198, 33, 198]
    assert bound.finished == "stop"
    assert other.tokens == jaxlm.generate(model, [9, 9, 9], **free).tokens


@pytest.mark.slow
def test_memory_is_flat_over_many_requests() -> None:
    model, rng = model_of("gemma3"), random.Random(0)
    engine, resident = Engine(model, 4), []
    engine.prepare(constraints=False)
    for number in range(2600):
        prompt, options = drawn(rng)
        engine.submit(prompt, **options)
        engine.step()
        if number in (400, 2599):
            while engine.is_busy:
                engine.step()
            gc.collect()
            resident.append((sum(array.nbytes for array in jax.live_arrays()), memory_use.resident() or 0))
    arrays, process = zip(*resident)
    assert arrays[1] <= arrays[0] * 1.02 + 10_000
    assert process[1] <= process[0] + 20_000_000  # 10 kB per request

"""The engine when something goes wrong: failing constraints, clients that leave, interrupts, the end of a process."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_chat import quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.inference import memory
from jaxlm.inference.engine import Engine
from jaxlm.inference.requests import Request

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_compilation():
        yield


def run(engine: Engine, steps: int = 2000) -> list[Any]:
    """The chunks of all requests. AssertionError if they do not end."""
    chunks = []
    for _ in range(steps):
        if not engine.is_busy:
            return chunks
        chunks += engine.step()
    raise AssertionError("the engine is still busy")


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Constrained:
    """A constraint whose mask fails, or allows nothing, at one of its calls."""

    finished = False

    def __init__(self, fails_at: int, bits: int | None):
        self.left, self.bits = fails_at, bits

    def mask(self) -> np.ndarray:
        self.left -= 1
        if not self.left and self.bits is None:
            raise ZeroDivisionError("no mask")
        return np.full(7, 0xFFFFFFFF if self.left else 0, np.uint32)

    def accept(self, token: int) -> None:
        pass


@pytest.mark.parametrize("fails_at", [1, 3])
@pytest.mark.parametrize(("bits", "error"), [(None, ZeroDivisionError), (0, ValueError)])
def test_a_constraint_that_fails_ends_its_request(fails_at: int, bits: int | None, error: type[Exception]) -> None:
    engine = Engine(tiny("qwen3"), 2, length=64)
    bad = engine.submit([3, 4], max_tokens=20, constraint=lambda: Constrained(fails_at, bits), **GREEDY)
    good = engine.submit([5, 6], max_tokens=20, **GREEDY)
    chunks = run(engine)
    assert [type(c.error) for c in chunks if c.request is bad and c.finish_reason] == [error]
    assert bad.finished == "error"
    assert good.tokens == jaxlm.generate(tiny("qwen3"), [5, 6], max_tokens=20, **GREEDY).tokens
    assert all(slot.request is None for slot in engine.scheduler.rows)


def test_the_text_has_the_last_token() -> None:
    """Of an answer that ends by its grammar or by a function, not by a stop token."""
    model = replace(tiny("qwen3", vocab_size=200), tokenizer=tokenizer_of(None))
    assert model.tokenizer is not None
    for regex in ("[a-c]{3}", "yes|no"):
        answer = jaxlm.generate(model, [3, 4], max_tokens=40, temperature=1.0, seed=1, regex=regex)
        assert answer.finish_reason == "stop"
        assert str(answer) in ("yes", "no") or len(answer) == 3
        assert str(answer) == "".join(jaxlm.stream(model, [3, 4], max_tokens=40, temperature=1.0, seed=1, regex=regex))
    ended = jaxlm.generate(model, [3, 4], max_tokens=9, stop_when=lambda tokens: len(tokens) == 5, **GREEDY)
    whole = jaxlm.generate(model, [3, 4], max_tokens=5, **GREEDY)
    assert (ended.tokens, str(ended)) == (whole.tokens, str(whole))


def test_an_interrupt_while_prefixes_are_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device arrays are gone: no row may claim that it has keys and values."""
    model, path = tiny("llama3", max_position_embeddings=128), tmp_path / "x.safetensors"
    prompt = [(7 * i) % 90 for i in range(50)]
    engine = Engine(model, 2)
    engine.submit(prompt, max_tokens=4, **GREEDY)
    run(engine)
    engine.save_prefix_cache(path)
    running = engine.submit(prompt[::-1], max_tokens=30, **GREEDY)
    while not running.tokens:
        engine.step()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.steps, "insert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.load_prefix_cache(path)
    run(engine)
    assert running.finished == "error"
    again = engine.submit(prompt, max_tokens=4, **GREEDY)
    run(engine)
    assert again.cached == 0
    assert again.tokens == jaxlm.generate(model, prompt, max_tokens=4, **GREEDY).tokens


@pytest.mark.parametrize("how", ["close", "drop", "drop before the first chunk"])
def test_a_stream_that_is_left_cancels_its_request(how: str) -> None:
    with Engine(tiny("qwen3"), 2, length=2048) as engine:
        stream = engine.stream([1, 2], max_tokens=2000, ignore_eos=True)
        request = stream.request
        if how != "drop before the first chunk":
            next(stream)
        if how == "close":
            stream.close()
            assert [*stream] == []
        del stream
        wait_for(lambda: request.finished)
        assert request.finished == "cancelled"
        assert len(request.tokens) < 2000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the generators that never end
def test_asyncio_clients_that_leave() -> None:
    """A loop that is closed fails neither the other requests nor the thread of the engine."""
    model, seen = tiny("qwen3"), list[Request]()
    with Engine(model, 3, length=2048) as engine:

        async def leave() -> None:
            async for chunk in engine.astream([1, 2], max_tokens=2000, ignore_eos=True):
                seen.append(chunk.request)
                break

        other = engine.stream([5, 6], max_tokens=40, **GREEDY)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()  # without ending its generators
        assert sum(len(chunk.tokens) for chunk in other) == 40
        wait_for(lambda: seen[0].finished)
        assert len([*engine.stream([5, 6], max_tokens=4, **GREEDY)]) == 4

        async def cancelled() -> None:
            task = asyncio.create_task(anext(engine.astream([3], max_tokens=2000, ignore_eos=True)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(cancelled())
        wait_for(lambda: not engine.is_busy)

        async def failing() -> None:
            async for _ in engine.astream([3], max_tokens=20, stop_when=lambda tokens: bool(1 // 0)):
                pass

        with pytest.raises(ZeroDivisionError):
            asyncio.run(failing())


def test_other_threads_get_their_turn() -> None:
    """`step` and `save_prefix_cache` of another thread, while the engine's own thread decodes."""
    with Engine(tiny("qwen3"), 2, length=2048) as engine:
        stream = engine.stream([1, 2], max_tokens=2000, ignore_eos=True)
        next(stream)
        waits = []
        for _ in range(5):
            start = time.monotonic()
            engine.step()
            waits.append(time.monotonic() - start)
        assert max(waits) < 2
        stream.close()


def test_the_thread_ends_with_its_requests() -> None:
    before = threading.active_count()
    engine = Engine(tiny("qwen3"), 1, length=64)
    assert sum(len(chunk.tokens) for chunk in engine.stream([1, 2], max_tokens=5, **GREEDY)) == 5
    wait_for(lambda: threading.active_count() <= before)
    assert sum(len(chunk.tokens) for chunk in engine.stream([1, 2], max_tokens=5, **GREEDY)) == 5


def test_a_process_ends_while_the_engine_decodes() -> None:
    program = (
        "import jaxlm; from jaxlm.cli.common import STORIES\n"
        "engine = jaxlm.Engine(jaxlm.load(str(STORIES), progress=False), 1)\n"
        "stream = engine.stream('Once', max_tokens=250, ignore_eos=True)\n"
        "next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("slots", "length", "prompts"), [
    (5, 1024, [(5, 900)]), (9, 512, [(9, 300)]), (4, 2048, [(4, 600), (4, 1500)]),
])  # fmt: skip
def test_the_planned_memory_is_enough(slots: int, length: int, prompts: list[tuple[int, int]]) -> None:
    """All KV caches that exist at once, beside the plan."""
    model = tiny("llama3", max_position_embeddings=2048)
    engine, most = Engine(model, slots, length=length), 0
    before = sum(a.nbytes for a in jax.live_arrays() if a.ndim == 4)

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal most
            most = max(most, sum(a.nbytes for a in jax.live_arrays() if a.ndim == 4) - before)
            return function(*args)

        return call

    for name in ("prefill", "insert", "step", "resize_cache", "take"):
        setattr(engine.steps, name, watched(getattr(engine.steps, name)))
    for round_, (count, tokens) in enumerate(prompts):
        for n in range(count):
            engine.submit([n + 10 * round_] * tokens, max_tokens=8, ignore_eos=True)
        run(engine)
    planned = memory.kv_memory(model, slots, engine.scheduler.lengths, engine.scheduler.rings)
    assert 0.3 * planned < most <= planned

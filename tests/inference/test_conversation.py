"""Conversations against a slow twin that sees the same ids at once, without a cache."""

import copy
import gc
import itertools
import json
import pickle
import random
import re
import threading
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, bias_of, model_of, quick_compilation, tokenizer_of
from helpers.tiny_tokenizers import byte_fallback, load

import jaxlm
from jaxlm import Engine
from jaxlm.devices import hardware
from jaxlm.inference import memory
from jaxlm.inference.compilation import CompiledSteps
from jaxlm.inference.completion import Completion, join_chunks
from jaxlm.inference.conversation import Conversation
from jaxlm.inference.scheduler import Scheduler
from jaxlm.model import Model
from jaxlm.models import gemma3, llama3
from jaxlm.nn import Rope

WINDOW, CHUNK = 16, 8
GEMMA = gemma3.Config(
    **SIZES, L=2, rope=Rope(1e4), local_rope=Rope(1e3), windows=(WINDOW, None), scale=8**-0.5, context=256
)
LLAMA = llama3.Config(**SIZES, L=1, rope=Rope(1e4), context=256)
LENGTH = 256  # of every forward pass of the slow twin


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def gemma() -> Model:
    return model_of(gemma3, GEMMA, tokenizer_of(TEMPLATE))


@pytest.fixture(scope="module")
def llama() -> Model:
    """Without a template: continues text."""
    return model_of(llama3, LLAMA, tokenizer_of(None))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches whose edges are near."""
    monkeypatch.setitem(hardware.CHUNK, "cpu", CHUNK)
    monkeypatch.setattr(memory, "PREFILL_CACHE", 64)


def talk(model: Model, **options) -> Conversation:
    return Conversation(model, **{"temperature": 0, "max_tokens": 6, "logit_bias": bias_of(model), **options})


def twin(model: Model, ids: list[int], count: int, bias: dict[int, float], repetition: float = 1.0) -> list[int]:
    """Greedy tokens, each from a forward pass over everything before it."""
    made: list[int] = []
    while len(made) < count and not (made and made[-1] in model.tokenizer.stop_ids):
        made.append(likeliest(model, (*ids, *made), tuple(bias.items()), repetition))
    return made


@cache  # many turns begin alike
def likeliest(model: Model, ids: tuple[int, ...], bias: tuple[tuple[int, float], ...], repetition: float) -> int:
    tokens, pos = np.zeros((1, LENGTH), np.int32), np.full((1, LENGTH), -1)
    tokens[0, : len(ids)], pos[0, : len(ids)] = ids, np.arange(len(ids))
    logits, _ = model.forward(tokens, model.weights, None, jnp.asarray(pos))
    last, seen = np.array(logits)[0, len(ids) - 1], list(ids)
    for token, more in bias:
        last[token] += more
    last[seen] = np.where(last[seen] > 0, last[seen] / repetition, last[seen] * repetition)
    return int(np.argmax(last))


def made_by(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def check(c: Conversation, ids: list[int], pieces, new: int | None = None) -> list[int]:
    """Runs a turn whose prompt should be `ids`; -> prompt and answer."""
    pieces = list(pieces)
    made = made_by(pieces)
    assert pieces[-1].prompt_tokens == len(ids)
    assert made == twin(c.model, ids, len(made), c.options.logit_bias or {})
    assert "".join(pieces) == c.model.tokenizer.decode(made)
    assert pieces[-1].finish_reason == ("stop" if made[-1] in c.model.tokenizer.stop_ids else "length")
    if new is not None:
        assert c.prefilled == new
    return [*ids, *made]


def ask(c: Conversation, said: list[int], text: str) -> list[int]:
    """The ids of the prompt of the next turn, said being those of all turns before, after an answer cut by length."""
    end = "<end>" if said else "<bos>"
    return [*said, *c.model.tokenizer.encode(f"{end}<user>{text}<end><assistant>", add_special_tokens=False)]


def test_every_turn_matches_a_full_forward_pass_and_prefills_only_new_tokens(gemma):
    spelled = {gemma.tokenizer.convert_tokens_to_ids(letter): 3.0 for letter in "atern"}
    c, said = talk(gemma, max_tokens=9, logit_bias={**bias_of(gemma), **spelled}), []
    for text in ["hello there", "and then some more", "x", "at last, many words to pass the window again"]:
        ids = ask(c, said, text)
        # The newest token of an answer has been read, but not been given to the model.
        said = check(c, ids, c.send(text), new=len(ids) - max(0, len(said) - 1))
    assert len(said) > 4 * WINDOW
    assert [m["role"] for m in c.messages] == ["user", "assistant"] * 4
    canonical = gemma.tokenizer.chat(c.messages, add_generation_prompt=False)
    assert canonical[:-1] != said  # the answers were not spelled as the tokenizer would, so keeping that was tested


def test_answer_ends_at_a_stop_token(gemma):
    end = gemma.tokenizer.convert_tokens_to_ids("<end>")
    free = {token: value for token, value in bias_of(gemma).items() if token != end}
    c = talk(gemma, max_tokens=40, logit_bias={**free, end: 9.0})
    ids = ask(c, [], "hello")
    said = check(c, ids, c.send("hello"))
    assert said[-1] == end
    assert not c.messages[-1]["content"].endswith("<end>")
    ids = [*said, *gemma.tokenizer.encode("<user>go on<end><assistant>", add_special_tokens=False)]
    check(c, ids, c.send("go on"), new=len(ids) - len(said) + 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_retry_prefills_one_token_however_long_the_answer_was(gemma, monkeypatch, steps):
    """Also where the answer is longer than the sliding window. Afterwards the text goes on past what was there."""
    monkeypatch.setitem(hardware.STEPS, "cpu", steps)
    prompt = ask(talk(gemma), [], "a" * 2 * WINDOW)
    for count in (1, 2, 5, WINDOW, 3 * WINDOW):
        c = talk(gemma, max_tokens=count)
        check(c, prompt, c.send("a" * 2 * WINDOW), new=len(prompt))
        check(c, prompt, c.retry(), new=1)
        c.set("max_tokens", 3 * WINDOW + 10)
        check(c, prompt, c.retry(), new=1)


def test_retry_after_several_turns(gemma):
    c = talk(gemma)
    said = check(c, ask(c, [], "one and two and three"), c.send("one and two and three"))
    ids = ask(c, said, "four")
    check(c, ids, c.send("four"))
    check(c, ids, c.retry(), new=1)
    said = check(c, ids, c.retry(), new=1)
    check(c, ask(c, said, "five"), c.send("five"))
    assert len(c.messages) == 6


@pytest.mark.parametrize("steps", [1, 4])
def test_cache_grows_during_an_answer(gemma, monkeypatch, steps):
    monkeypatch.setitem(hardware.STEPS, "cpu", steps)
    c = talk(gemma, max_tokens=70)
    said = check(c, ask(c, [], "ho"), c.send("ho"))
    assert c._engine.scheduler.state.kv.length == 128
    ids = ask(c, said, "more")
    check(c, ids, c.send("more"), new=len(ids) - len(said) + 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_of_calls(gemma, seed, monkeypatch):
    """Turns, retries, answers cut off at any place: the tokens of each turn follow from its prompt alone."""
    rng, asked = random.Random(seed), []
    c = talk(gemma)
    chunks = c._chunks
    monkeypatch.setattr(c, "_chunks", lambda request, answer: asked.append(request) or chunks(request, answer))
    for _ in range(12):
        c.set("max_tokens", rng.choice([1, 2, 5, 9, 14]))
        retry = c.messages and rng.random() < 0.4
        pieces = c.retry() if retry else c.send(rng.choice(["no", "an old story", "yes " * 6]))
        prompt = asked[-1].ids
        made = made_by(itertools.islice(pieces, rng.choice([1, 2, 4, 99])))
        assert made == twin(gemma, prompt, len(made), bias_of(gemma))
        if len(c._engine.scheduler.rows[0].ids) > 150:
            c.reset()


def test_stop_keeps_the_generated_text(gemma):
    c = talk(gemma, max_tokens=30)
    pieces = c.send("tell me")
    shown = [next(pieces) for _ in range(4)]
    pieces.close()
    assert c.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    ids = ask(c, [*ask(c, [], "tell me"), *made_by(shown)], "go on")
    check(c, ids, c.send("go on"))
    assert c.prefilled <= len(gemma.tokenizer.encode("<end><user>go on<end><assistant>"))


@pytest.mark.parametrize("also", ["send", "retry", "save", "stop"])
def test_next_call_stops_a_running_answer(gemma, also, tmp_path):
    c = talk(gemma, max_tokens=30)
    pieces = c.send("tell me")
    shown = next(pieces) + next(pieces)
    {"send": lambda: c.send("x"), "retry": c.retry, "save": lambda: c.save(tmp_path / "c"), "stop": c.stop}[also]()
    assert c.messages == [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": shown}]
    assert list(pieces) == []


@pytest.mark.parametrize("program", ["prefill", "sample_token", "step"])
def test_conversation_continues_after_an_interrupt(gemma, monkeypatch, program):
    """Ctrl-C arrives while a program runs, which has taken the cache with it."""
    c = talk(gemma)
    said = check(c, ask(c, [], "hi"), c.send("hi"))

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    real = getattr(CompiledSteps, program)
    with monkeypatch.context() as patch:
        patch.setattr(CompiledSteps, program, interrupted)
        c.system = "x"  # so that other tokens take the place of those that were said; few, for the ring keeps the rest
        with pytest.raises(KeyboardInterrupt):
            list(c.send("y"))
        c.system = None
    if program == "step":
        assert len(c.messages) == 4
        c.messages = c.messages[:2]
    assert len(c.messages) == 2
    prompts = ask(c, said, "now"), gemma.tokenizer.chat([*c.messages, {"role": "user", "content": "now"}])
    assert made_by(c.send("now")) in [twin(gemma, ids, 6, bias_of(gemma)) for ids in prompts]


ABANDONED = {
    "conversation": lambda model, options: talk(model, **options).send("hello"),
    "stream": lambda model, options: jaxlm.stream(model, "hello", **options),
    "engine": lambda model, options: Engine(model, 1, length=64).stream("hello", **options),
}


@pytest.mark.parametrize("kind", ABANDONED)
def test_garbage_collector_runs_no_step(gemma, kind, monkeypatch):
    """On Python 3.11 the collector may run while jax takes a traceback, in an array that this thread reuses. A
    finalizer that calls jax then frees code objects that are in use, and the process crashes (jax 0.10)."""
    chunks = ABANDONED[kind](gemma, {"temperature": 0, "max_tokens": 6, "logit_bias": bias_of(gemma)})
    next(chunks)
    threads, advance = [], Scheduler.advance
    monkeypatch.setattr(Scheduler, "advance", lambda self: (threads.append(threading.get_ident()), advance(self))[1])
    is_alive = weakref.ref(chunks)
    cycle = [chunks]
    cycle.append(cycle)
    del cycle, chunks
    gc.collect()
    assert is_alive() is None
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_that_ends_frees_its_kv_cache(gemma, whole, monkeypatch):
    schedulers, advance, thread = [], Scheduler.advance, threading.get_ident()

    def noted(scheduler: Scheduler) -> None:
        if threading.get_ident() == thread:  # the thread of another test's engine may still run
            schedulers.append(scheduler)
        advance(scheduler)

    monkeypatch.setattr(Scheduler, "advance", noted)
    chunks: Any = jaxlm.stream(gemma, "hello", temperature=0, max_tokens=6, logit_bias=bias_of(gemma))
    next(chunks), next(chunks)
    assert schedulers[0].state is not None
    _ = [*chunks] if whole else chunks.close()
    assert schedulers[0].state is None


def test_full_context(gemma):
    short = model_of(gemma3, replace(GEMMA, context=64), gemma.tokenizer)
    c = talk(short, max_tokens=None)
    ids = ask(c, [], "go")
    said = check(c, ids, c.send("go"))
    assert len(said) == 64
    before = list(c.messages)
    with pytest.raises(ValueError, match=r"full: the conversation has \d+ tokens.* takes 64.*reset"):
        c.send("once more")
    assert c.messages == before
    c.reset()
    check(c, ids, c.send("go"), new=len(ids))


def test_failed_turn_does_not_change_the_conversation(gemma):
    c = talk(gemma)
    said = check(c, ask(c, [], "hi"), c.send("hi"))
    with pytest.raises(ValueError, match="no such words"):
        c.send("refuse")
    assert len(c.messages) == 2
    check(c, ask(c, said, "ho"), c.send("ho"))


def test_system_message_takes_effect_in_the_next_turn(gemma):
    c = talk(gemma, system="be kind")
    ids = gemma.tokenizer.encode("<bos><system>be kind<end><user>hi<end><assistant>", add_special_tokens=False)
    check(c, ids, c.send("hi"))
    c.system = "be rude"
    pieces = list(c.send("ho"))
    messages = [{"role": "system", "content": "be rude"}, *c.messages[:3]]
    assert made_by(pieces) == twin(gemma, gemma.tokenizer.chat(messages), 6, bias_of(gemma))
    assert all(m["role"] != "system" for m in c.messages)


def test_stop_string_ends_an_answer_and_is_not_in_messages(gemma):
    c = talk(gemma, max_tokens=20)
    whole = "".join(c.send("hello"))
    c.reset()
    c.set("stop", whole[9:11])
    cut = whole[: whole.index(whole[9:11])]
    pieces = list(c.send("hello"))
    assert ("".join(pieces), pieces[-1].finish_reason) == (cut, "stop")
    assert c.messages[-1]["content"] == cut
    c.set("stop", None)
    made = made_by(c.send("ho"))
    assert made == twin(gemma, gemma.tokenizer.chat(c.messages[:3]), 20, bias_of(gemma))


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_is_not_in_messages(gemma, monkeypatch, opened):
    template = TEMPLATE.replace("<assistant>", "<assistant><think>") if opened else TEMPLATE
    model = model_of(gemma3, GEMMA, tokenizer_of(template, thinking=True))
    close = model.tokenizer.convert_tokens_to_ids("</think>")
    c = talk(model, max_tokens=12)
    *_, begin = model.tokenizer.encode("<think>", add_special_tokens=False)
    # The model's every token is forced: first the tag that opens, then a word, then the tag that closes, then words.
    answer = ([] if opened else [begin]) + model.tokenizer.encode("hm", add_special_tokens=False) + [close]
    forced = iter(answer)

    def forcing(real):
        def run(*args):
            state, made = real(*args)
            token = next(forced, None)
            if token is None:
                return state, made
            return state._replace(token=jnp.asarray([token])), made._replace(tokens=jnp.asarray([[token]]))

        return run

    for name in ("sample_token", "step"):
        monkeypatch.setattr(CompiledSteps, name, forcing(getattr(CompiledSteps, name)))
    shown = "".join(c.send("why"))
    assert c.opened == opened
    assert shown.removeprefix("<think>").startswith("hm</think>")
    assert c.messages[-1]["content"] == shown.partition("</think>")[2].lstrip()
    messages = [*c.messages, {"role": "user", "content": "so"}]
    pieces = list(c.send("so"))
    prompt = model.tokenizer.chat(messages)
    if not opened:  # the words after the thought, spelled anew
        assert pieces[-1].prompt_tokens == len(prompt)
        assert made_by(pieces) == twin(model, prompt, 12, bias_of(model))
    else:
        assert "hm" not in c._prefixes[1].text


# Without a template


def test_model_without_template_continues_the_text(llama):
    c = talk(llama, max_tokens=10)
    encode = llama.tokenizer.encode
    said = check(c, encode("a stone and"), c.send("a stone and"))
    assert said.count(llama.tokenizer.bos_id) == 1
    ids = [*said, *encode(" an end", add_special_tokens=False)]
    said = check(c, ids, c.send(" an end"), new=len(ids) - len(said) + 1)
    said = check(c, said, c.send(""), new=1)  # nothing said: it goes on
    assert "".join(m["content"] for m in c.messages) == llama.tokenizer.decode(said)


def test_stop_token_is_removed_when_the_text_continues(llama):
    end = llama.tokenizer.convert_tokens_to_ids("<end>")
    c = talk(llama, max_tokens=40, logit_bias={**bias_of(llama), end: 9.0})
    said = check(c, llama.tokenizer.encode("go"), c.send("go"))
    assert said[-1] == end
    ids = [*said[:-1], *llama.tokenizer.encode("k", add_special_tokens=False)]
    check(c, ids, c.send("k"), new=len(ids) - len(said) + 1)


def test_system_message_without_template_raises(llama):
    with pytest.raises(ValueError, match="no chat template"):
        talk(llama, system="be kind").send("hi")


@pytest.fixture(params=["made", "published"])
def prefixing(request, tmp_path) -> tuple[Model, dict[int, float]]:
    """A model whose vocabulary marks spaces, and whose tokenizer puts one in front of a text. The made one writes
    letters that never merge, and a word."""
    if request.param == "published":
        return jaxlm.load(request.getfixturevalue("shared") / "checkpoints/stories260K", progress=False), {}
    tok = load(byte_fallback(tmp_path, prefix=True))
    allowed = tok.convert_tokens_to_ids([*"aonisrldcum", "▁the"])
    bias = {i: -1e4 for i in range(tok.vocab_size) if i not in allowed}
    return model_of(llama3, replace(LLAMA, V=tok.vocab_size), tok), bias


def test_several_turns_of_a_text_that_begins_with_a_space(prefixing):
    """SentencePiece's vocabulary marks spaces, and its tokenizer puts one before whatever it is given."""
    model, bias = prefixing
    c = Conversation(model, temperature=0, max_tokens=24, logit_bias=bias)
    first = "".join(c.send("Once upon"))
    assert bias or first.startswith(" a time, there was a little girl named Lily.")
    assert " the" in first
    "".join(c.send(", and"))
    said = "".join(m["content"] for m in c.messages)
    assert said.startswith(f"Once upon{first}, and")
    assert c.prefilled < 8
    ids = model.tokenizer.encode(f"Once upon{first}, and")
    assert model.tokenizer.encode(said) == [*ids, *twin(model, ids, 24, bias)]


# Options, sampling, files


def test_retry_samples_again_and_seed_reproduces_the_conversation(gemma):
    def answers(seed):
        c = talk(gemma, temperature=1.0, seed=seed, max_tokens=12)
        return ["".join(c.send("hi")), "".join(c.retry()), "".join(c.retry()), "".join(c.send("ho"))]

    first = answers(5)
    assert len(set(first)) == 4
    assert answers(5) == first
    assert answers(6) != first


def test_chunk_seed_reproduces_its_text(gemma):
    c = talk(gemma, temperature=1.0, seed=5)
    for answer in (list(c.send("hi")), list(c.retry())):
        options = {"temperature": 1.0, "max_tokens": 6, "logit_bias": bias_of(gemma), "seed": answer[-1].seed}
        assert jaxlm.generate(gemma, c.messages[:1], **options) == "".join(answer)


def test_penalties_count_the_whole_conversation_and_logprobs_are_returned(gemma):
    c = talk(gemma, repetition_penalty=3.0, logprobs=2, max_tokens=9)
    said = [*ask(c, [], "hi"), *made_by(c.send("hi"))]
    pieces, prompt = list(c.send("ho")), ask(c, said, "ho")
    made, bias = made_by(pieces), bias_of(gemma)
    assert made == twin(gemma, prompt, 9, bias, repetition=3.0)
    assert made != twin(gemma, prompt, 9, bias)
    assert [len(x.top) for p in pieces for x in p.logprobs] == [2] * 9


def test_options_are_checked_by_name_and_range(gemma):
    c = talk(gemma)
    with pytest.raises(ValueError, match=r"top_p=2: must be a number from 0 to 1"):
        c.set("top_p", 2)
    with pytest.raises(TypeError, match=r"unknown option 'temprature'; did you mean 'temperature'\?"):
        c.set("temprature", 1)
    with pytest.raises(TypeError, match="unknown option 'max_new_tokens'"):
        Conversation(gemma, max_new_tokens=4)
    c.set("temperature", 0.5)
    assert c.options.temperature == 0.5
    assert c.options.max_tokens == 6


def test_save_and_load_a_conversation(gemma, tmp_path):
    path = tmp_path / "talk.json"
    c = talk(gemma, system="be kind", stop=["zz"], template_args={"mood": 1})
    list(c.send("hi"))
    c.save(path)
    assert json.loads(path.read_text())["messages"] == c.messages
    other = talk(gemma)
    list(other.send("something else"))
    other.load(path)
    assert (other.messages, other.system, other.options) == (c.messages, c.system, c.options)
    assert other.template_args == {"mood": 1}
    system = {"role": "system", "content": "be kind"}
    ids = gemma.tokenizer.chat([system, *c.messages, {"role": "user", "content": "ho"}])
    check(other, ids, other.send("ho"))


@pytest.mark.parametrize("text", ["no json", "[]", '{"messages": 3}', '{"messages": [{"role": "user"}]}',
                                  '{"messages": [], "options": {"top_p": 7}}'])  # fmt: skip
def test_load_rejects_invalid_files(gemma, tmp_path, text):
    path: Path = tmp_path / "bad.json"
    path.write_text(text)
    c = talk(gemma)
    list(c.send("hi"))
    with pytest.raises(ValueError, match=r"bad\.json.*conversation"):
        c.load(path)
    assert len(c.messages) == 2


def test_retry_without_messages_raises(gemma):
    with pytest.raises(ValueError, match="no message yet"):
        talk(gemma).retry()


def test_model_without_tokenizer_raises(gemma):
    with pytest.raises(ValueError, match="has no tokenizer"):
        Conversation(Model(gemma.family, gemma.config, gemma.weights))


def test_a_conversation_can_be_pickled_and_continued_in_another_way(gemma: Model) -> None:
    conversation = talk(gemma, system="be brief", seed=3, temperature=1.0)  # each turn has other random numbers
    chunks = [*conversation.send("one two")]
    branch = copy.deepcopy(conversation)
    there = pickle.loads(pickle.dumps(conversation))
    assert branch.model is gemma
    assert there.model is not gemma
    expected = "".join(conversation.send("three"))
    for other in (branch, there):
        assert (other.system, other.options) == (conversation.system, conversation.options)
        assert "".join(other.send("three")) == expected
        assert other.messages == conversation.messages
    assert [*branch.send("four")]
    assert len(branch.messages) == len(conversation.messages) + 2
    assert repr(branch).startswith("Conversation(random weights, 6 messages, system='be brief'")
    assert len(repr(branch)) < 200
    chunk = pickle.loads(pickle.dumps(chunks[-1]))
    assert (chunk, chunk.tokens, chunk.finish_reason, chunk.request) == (*attributes(chunks[-1]), None)
    whole = join_chunks(chunks)
    assert attributes(pickle.loads(pickle.dumps(whole))) == attributes(copy.copy(whole)) == attributes(whole)


def attributes(completion: Any) -> tuple[Any, ...]:
    return completion, completion.tokens, completion.finish_reason


def test_notebook_views_escape_what_a_model_writes(gemma: Model) -> None:
    conversation = talk(gemma, system="<script>")
    conversation.messages = [{"role": "user", "content": "1 < 2 & <b>"}, {"role": "assistant", "content": "yes\n<img>"}]
    html = conversation._repr_html_()
    assert "1 &lt; 2 &amp; &lt;b&gt;" in html
    assert not re.search("<script>|<img>", html)
    whole = Completion("<img>\nok")
    whole.generation_tokens, whole.tokens_per_second, whole.finish_reason = 1, 2.0, "stop"
    assert "&lt;img&gt;\nok" in whole._repr_html_()
    assert "1 token, 2.0 tokens/s, ended by stop" in whole._repr_html_()


def test_send_takes_text_only(gemma: Model) -> None:
    conversation = talk(gemma)
    with pytest.raises(ValueError, match="send takes a text"):
        conversation.send([{"role": "user", "content": "one"}])  # pyright: ignore
    with pytest.raises(ValueError, match="system=3"):
        talk(gemma, system=3)
    assert conversation.messages == []

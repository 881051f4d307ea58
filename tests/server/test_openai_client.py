"""The server on loopback, used with the openai client."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pydantic
import pytest
from helpers.serving import serving, slow_steps, wait_until_idle
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.model import Model
from jaxlm.server.state import Server

TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer_of(TOOLS + TEMPLATE))


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[tuple[Server, str]]:
    with quick_compilation():
        served = Server(model, jaxlm.Engine(model, 4), "tiny", max_waiting=16)
        with serving(served) as url:
            yield served, url


@pytest.fixture
def client(server: tuple[Server, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_is_that_of_generate(client: openai.OpenAI, model: Model) -> None:
    for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 3}):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, **options)
        expected = jaxlm.generate(model, HELLO, max_tokens=12, **options)
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", str(expected))
        assert choice.finish_reason == expected.finish_reason
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == expected.generation_tokens
        assert answer.usage.total_tokens == expected.prompt_tokens + expected.generation_tokens


def test_streams_have_the_same_text(client: openai.OpenAI, model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.9, "seed": 1}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = [*stream]
    expected = jaxlm.generate(model, HELLO, **options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == str(expected)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.generation_tokens
    assert all("usage" in chunk.to_dict() for chunk in chunks)  # null in the others, as from OpenAI


def test_usage_counts_each_prompt_once(client: openai.OpenAI, model: Model) -> None:
    prompts, options = ["hello", "a b c d"], {"n": 2, "max_tokens": 3, "temperature": 0.9, "seed": 1}
    expected: Any = jaxlm.generate(model, prompts, **options)
    flat = [answer for each in expected for answer in (each if isinstance(each, list) else [each])]
    assert len(flat) == 4
    count = sum(answer.prompt_tokens for answer in flat[::2])
    assert flat[0].prompt_tokens != flat[2].prompt_tokens
    whole = client.completions.create(model="tiny", prompt=prompts, **options)
    stream = client.completions.create(
        model="tiny", prompt=prompts, stream=True, stream_options={"include_usage": True}, **options
    )
    for usage in (whole.usage, [*stream][-1].usage):
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (count, sum(a.generation_tokens for a in flat))


def test_several_answers_and_log_probabilities(client: openai.OpenAI, model: Model) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, max_tokens=6, temperature=0.9, seed=5, logprobs=True, top_logprobs=2
    )
    expected: Any = jaxlm.generate(model, HELLO, n=3, max_tokens=6, temperature=0.9, seed=5, logprobs=2)
    assert [choice.message.content for choice in answer.choices] == [str(e) for e in expected]
    for choice, e in zip(answer.choices, expected):
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for score, want in zip(choice.logprobs.content, e.logprobs, strict=True):
            assert score.logprob == pytest.approx(want.chosen, abs=1e-4)
            assert [top.logprob for top in score.top_logprobs] == pytest.approx([v for _, v in want.top], abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected[0].prompt_tokens
    assert answer.usage.completion_tokens == sum(e.generation_tokens for e in expected)


def test_completions_of_several_prompts_with_echo(client: openai.OpenAI, model: Model) -> None:
    prompts = ["hello", "a b c"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0, logprobs=1, echo=True)
    expected: Any = jaxlm.generate(model, prompts, max_tokens=5, temperature=0, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == [str(e) for e in expected]
    for choice, e in zip(answer.choices, expected):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.token_logprobs) == len(e.tokens)
        assert choice.logprobs.token_logprobs[1:] == pytest.approx([s.chosen for s in e.logprobs[1:]], abs=1e-4)


def test_a_prompt_without_an_answer(client: openai.OpenAI, server: tuple[Server, str]) -> None:
    """max_tokens=0 returns what echo and logprobs ask for."""
    prompt = "the prompt<end>"
    options: Any = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True}
    [whole] = client.completions.create(max_tokens=4, **options).choices
    answer = client.completions.create(max_tokens=0, **options)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs is not None
    assert whole.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert whole.logprobs.token_logprobs is not None
    n = len(choice.logprobs.token_logprobs)
    assert n == answer.usage.prompt_tokens == len(whole.logprobs.token_logprobs) - 4
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(whole.logprobs.token_logprobs[1:n], abs=1e-4)
    assert whole.text.startswith(prompt)
    assert whole.logprobs.text_offset is not None
    assert whole.logprobs.text_offset[n] == len(prompt)
    [part] = client.completions.create(max_tokens=0, stream=True, **options)
    assert part.choices[0].text == prompt
    wait_until_idle(server[0])


class Answer(pydantic.BaseModel):
    yes: bool


def test_structured_output(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=80, temperature=1.0, seed=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = r'Sum: <tool_call>\{"name": "add", "arguments": \{"a": 1\}\}</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(client: openai.OpenAI, stream: bool) -> None:
    """The regular expression makes the random model write a call."""
    options: Any = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [TOOL],
        "max_tokens": 150,
        "extra_body": {"regex": CALL},
    }
    if not stream:
        [choice] = client.chat.completions.create(**options).choices
        calls, content, reason = choice.message.tool_calls, choice.message.content, choice.finish_reason
    else:
        chunks = [*client.chat.completions.create(**options, stream=True)]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        content = "".join(delta.content or "" for delta in deltas)
        reason = chunks[-1].choices[0].finish_reason
        assert deltas[-1].to_dict() == {}  # as from OpenAI
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", '{"a": 1}')]
    assert str(calls[0].id).startswith("call_")
    assert (content, reason) == ("Sum: ", "tool_calls")


def test_many_at_once_are_those_alone(client: openai.OpenAI, model: Model) -> None:
    def ask(n: int) -> str | None:
        options: dict[str, Any] = {"max_tokens": 4 + n, "temperature": 0.9, "seed": n}
        answer = client.completions.create(model="tiny", prompt="a" * (n + 1), **options)
        assert answer.choices[0].text == str(jaxlm.generate(model, "a" * (n + 1), **options))
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert len([*pool.map(ask, range(16))]) == 16


def test_errors_name_what_is_wrong(client: openai.OpenAI, server: tuple[Server, str]) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match=r"1,001 tokens.*shorten the prompt"):
        client.completions.create(model="tiny", prompt="a " * 500, max_tokens=3)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="image"):
        client.chat.completions.create(model="tiny", messages=image)
    with httpx.Client(base_url=server[1], timeout=60) as http:
        for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": 3}', b'{"messages": []}'):
            answer = http.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400, body[:20]
            assert answer.json()["error"]["message"]
        assert http.post("/v1/chat/completions", content=b" " * (9 << 20)).status_code == 413
        assert http.get("/v1/nothing").status_code == 404
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").status_code == 200
        ids = http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
        assert "hello" in http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert "jaxlm_generation_tokens_total" in http.get("/metrics").text


def test_a_client_that_leaves_frees_its_slot(server: tuple[Server, str]) -> None:
    served, url = server
    body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}
    with slow_steps(served) as seen, httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()  # dropping it would close the connection
            line = next(lines)
            assert json.loads(line.removeprefix("data: "))["choices"]
            assert served.active == 1
        with pytest.raises(httpx.TimeoutException):
            http.post("/v1/completions", json=body, timeout=0.8)
        wait_until_idle(served)
    assert [request.finished for request in seen] == ["cancelled", "cancelled"]


def test_overload_is_refused(server: tuple[Server, str]) -> None:
    """60 clients, 4 slots, 16 may wait: every request is answered or refused."""
    _, url = server

    def ask(n: int) -> int:
        body = {"prompt": f"{n}", "max_tokens": 40, "ignore_eos": True}
        answer = httpx.post(url + "/v1/completions", json=body, timeout=120)
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 1 + 60 // 20  # 20 are slots and places in the queue
        return answer.status_code

    with ThreadPoolExecutor(60) as pool:
        found = [*pool.map(ask, range(60))]
    assert {*found} == {200, 429}
    assert found.count(200) >= 20

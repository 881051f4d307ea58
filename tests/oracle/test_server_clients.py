"""Clients that others wrote, unchanged, with a server on loopback: openai, langchain-openai, litellm and llm."""

import asyncio
import gc
import json
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pydantic
import pytest
from helpers.serving import serving, slow_steps, wait_until_idle
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import tiny
from oracle import reference

import jaxlm
from jaxlm.model import Model
from jaxlm.server.state import Server

pytestmark = pytest.mark.oracle

KEY = "secret"
HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
CALLS = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
# The regular expression makes the random model write a call.
CALL = {"regex": r'<tool_call>\{"name": "add", "arguments": \{"a": 1, "b": 2\}\}</tool_call>'}


class Answer(pydantic.BaseModel):
    yes: bool


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {name: {"type": "integer"} for name in "ab"}},
    },
}


@pytest.fixture(scope="module", autouse=True)
def loopback_only() -> Iterator[None]:
    """Names of other machines are refused, and a client that asks for one fails its test."""
    look_up, asked = socket.getaddrinfo, []

    def refuse(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            asked.append(host)
            raise OSError(f"the test may not reach {host}")
        return look_up(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert asked == []


@pytest.fixture(scope="module")
def model() -> Model:
    template = TOOLS + TEMPLATE.replace("{{ m.content }}", "{{ m.content or '' }}" + CALLS)
    return replace(tiny("llama3", max_position_embeddings=512), tokenizer=tokenizer_of(template))


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[tuple[Server, str]]:
    with reference.quickly():
        served = Server(model, jaxlm.Engine(model, 4), "tiny", keys=[KEY])
        with serving(served) as url:
            yield served, url + "/v1"


@pytest.fixture
def client(server: tuple[Server, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[1], api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def leaving(server: tuple[Server, str]) -> Iterator[Server]:
    """The server, with slow steps. A client that leaves must have ended the requests of 400 tokens."""
    served, _ = server
    with slow_steps(served) as seen:
        yield served
        wait_until_idle(served)
    assert {request.finished for request in seen if request.max_tokens == 400} == {"cancelled"}


@pytest.fixture(scope="module")
def expected(model: Model) -> Callable[[Any], Any]:
    """The greedy text of jaxlm.generate."""
    return lambda prompt: jaxlm.generate(model, prompt, **GREEDY)


def counts(answer: Any) -> tuple[int, int, int]:
    return answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens


def same(found: Any, expected: Any) -> bool:
    """Whether two columns of log-probabilities are the same."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return [*found] == [*expected] and same([*found.values()], [*expected.values()])
    return found == pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else found == expected


COLUMNS = ("tokens", "text_offset", "token_logprobs", "top_logprobs")


# openai


def test_openai_chats(client: openai.OpenAI, expected: Any) -> None:
    text = expected(HELLO)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert answer.choices[0].message.content == text
    n, m = text.prompt_tokens, text.generation_tokens
    assert counts(answer) == (n, m, n + m)
    with client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as chunks:
        parts = [*chunks]
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == text
    assert counts(parts[-1]) == counts(answer)


def test_openai_stream_helper(client: openai.OpenAI) -> None:
    """The helper accumulates the chunks and parses what is complete."""
    # The helper refuses an answer that max_tokens has cut off: the regular expression ends it.
    options: Any = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    options["extra_body"] = {"regex": "[a-z]{9}"}
    with client.chat.completions.stream(stream_options={"include_usage": True}, **options) as stream:
        events = [*stream]
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**options)
    text = whole.choices[0].message.content
    assert text is not None
    assert len(text) == 9
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    assert "".join(event.delta for event in events if event.type == "content.delta") == text
    assert [event.content for event in events if event.type == "content.done"] == [text]
    assert final.choices[0].message.content == text
    assert (final.choices[0].finish_reason, whole.choices[0].finish_reason) == ("stop", "stop")
    assert counts(final) == counts(whole)
    scores = [answer.choices[0].logprobs for answer in (final, whole)]
    found, expected = ([s.model_dump() for s in each.content or []] for each in scores if each is not None)
    assert same(found, expected)
    assert b"".join(bytes(s["bytes"]) for s in found).decode() == text


def test_openai_completions(client: openai.OpenAI, expected: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["hello", "a b"], n=2, logprobs=2, **GREEDY)
    assert [choice.text for choice in answer.choices] == [expected(text) for text in ("hello", "hello", "a b", "a b")]
    parts = [
        *client.completions.create(
            model="tiny", prompt="hello", stream=True, logprobs=2, stream_options={"include_usage": True}, **GREEDY
        )
    ]
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected("hello")
    assert parts[-1].usage is not None
    scores, found = [part.choices[0].logprobs for part in parts[:-1]], answer.choices[0].logprobs
    assert found is not None
    for name in COLUMNS:
        assert same([x for part in scores for x in getattr(part, name)], getattr(found, name))


def test_openai_echo(client: openai.OpenAI, model: Model) -> None:
    """With max_tokens=0, the log-probabilities of the prompt are all there is. Its text is that which was sent."""
    text = "<user>the rest<end>"
    for prompt in (text, model.tokenizer.encode(text, False)):
        options: Any = {"model": "tiny", "prompt": prompt, "echo": True, "temperature": 0, "logprobs": 1}
        answer = client.completions.create(max_tokens=0, **options)
        [choice] = answer.choices
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        longer = client.completions.create(max_tokens=3, **options)
        assert longer.choices[0].text.startswith(text)
        scores, more = choice.logprobs, longer.choices[0].logprobs
        assert scores is not None
        assert more is not None
        for name in COLUMNS:
            n = len(getattr(scores, name))
            assert (n, len(getattr(more, name))) == (answer.usage.prompt_tokens, answer.usage.prompt_tokens + 3)
            assert same(getattr(scores, name), getattr(more, name)[:n])
        assert scores.tokens is not None
        assert scores.text_offset is not None
        spans = zip(scores.text_offset, [*scores.text_offset[1:], len(text)], scores.tokens)
        assert all(text[a:b] == token or (a == b and token == "<bos>") for a, b, token in spans)
        parts = [*client.completions.create(max_tokens=0, stream=True, **options)]
        assert [part.choices[0].text for part in parts] == [text]
    assert client.completions.create(model="tiny", prompt="a", max_tokens=0).choices[0].text == ""


def test_openai_tool_loop(client: openai.OpenAI, model: Model, expected: Any) -> None:
    messages: list[Any] = [*HELLO]
    options: Any = {"model": "tiny", "tools": [ADD]}
    answer = client.chat.completions.create(messages=messages, extra_body=CALL, max_tokens=100, **options)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    messages.append(message)
    assert message.tool_calls is not None
    for call in message.tool_calls:
        assert call.type == "function"
        result = add(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    answer = client.chat.completions.create(messages=messages, **GREEDY, **options)
    called = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
        },
        {"role": "tool", "content": "3"},
    ]
    rendered = model.tokenizer.render([*HELLO, *called], tools=[ADD])
    assert 'add{"a": 1, "b": 2}<end><tool>3<end>' in rendered
    assert answer.choices[0].message.content == expected(model.tokenizer.encode(rendered, False))


def test_openai_streamed_tool_calls(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(pydantic.create_model("add", a=(int, ...), b=(int, ...)))
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[tool], extra_body=CALL, max_tokens=100
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [(event.name, event.index, json.loads(event.arguments)) for event in done] == [("add", 0, {"a": 1, "b": 2})]
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments.model_dump() == {"a": 1, "b": 2}


def test_openai_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=80, temperature=1, seed=0
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_openai_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        client.with_options(api_key="wrong").models.list()
    assert error.value.type == "authentication_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    with (
        pytest.raises(openai.BadRequestError, match="max_tokens"),
        client.completions.create(model="tiny", prompt="a", max_tokens=10_000, stream=True) as parts,
    ):
        list(parts)


def test_openai_retries(server: tuple[Server, str], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client repeats a request after the seconds of Retry-After."""
    served, url = server
    monkeypatch.setattr(served, "active", served.engine.slots + served.max_waiting)  # one more is too many
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    asked: list[float] = []
    hooks: Any = {
        "request": [lambda request: asked.append(time.monotonic())],
        "response": [lambda response: monkeypatch.undo()],
    }
    http = httpx.Client(event_hooks=hooks, timeout=60)
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=1, http_client=http) as again:
        answer = again.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert answer.choices[0].message.content
    [first, second] = asked
    assert second - first >= 1


def test_openai_timeout(client: openai.OpenAI, leaving: Server) -> None:
    client.completions.create(model="tiny", prompt="a", max_tokens=4)  # compiles
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="tiny", prompt="a", max_tokens=400, extra_body={"ignore_eos": True}, timeout=1)


def test_openai_async(server: tuple[Server, str], leaving: Server, expected: Any) -> None:
    """Several at once; a task that is cancelled while it reads a stream frees its slot."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=server[1], api_key=KEY, max_retries=0, timeout=60) as client:
            texts = ["hello", "a b", "the rest"]
            asked = [client.completions.create(model="tiny", prompt=text, **GREEDY) for text in texts]
            answers = await asyncio.gather(*asked)
            assert [answer.choices[0].text for answer in answers] == [expected(text) for text in texts]
            async with client.chat.completions.stream(model="tiny", messages=HELLO, **GREEDY) as stream:
                parts = [event.delta async for event in stream if event.type == "content.delta"]
            assert "".join(parts) == expected(HELLO)
            begun = asyncio.Event()

            async def read() -> None:
                stream = await client.completions.create(
                    model="tiny", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
                async for _ in stream:
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            assert leaving.active == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while leaving.active:  # the client is still open
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


# langchain-openai

TOKENS = ("input_tokens", "output_tokens", "total_tokens")


def test_langchain_chats(server: tuple[Server, str], expected: Any) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=server[1], api_key=KEY, temperature=0, max_tokens=12, stream_usage=True)
    answer = chat.invoke([("user", "hello")])
    assert answer.content == expected(HELLO)
    parts = [*chat.stream("hello")]
    assert "".join(str(part.content) for part in parts) == expected(HELLO)
    [used] = [part.usage_metadata for part in parts if part.usage_metadata]
    assert answer.usage_metadata is not None
    assert [used[name] for name in TOKENS] == [answer.usage_metadata[name] for name in TOKENS]
    answers = chat.batch(["hello", "a b"])
    assert [each.content for each in answers] == [expected(HELLO), expected([{"role": "user", "content": "a b"}])]
    parser = ChatOpenAI(model="tiny", base_url=server[1], api_key=KEY, temperature=1, seed=0, max_tokens=80)
    found = parser.with_structured_output(Answer, method="json_schema").invoke("hello")
    assert isinstance(found, Answer)


def test_langchain_tools(server: tuple[Server, str]) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: Any = {"model": "tiny", "base_url": server[1], "api_key": KEY, "temperature": 0, "max_tokens": 100}
    caller = ChatOpenAI(**options, extra_body=CALL).bind_tools([add])
    answer = caller.invoke("hello")
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 1, "b": 2})
    whole: Any = None
    for part in caller.stream("hello"):
        whole = part if whole is None else whole + part
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("add", {"a": 1, "b": 2})]
    history = [HumanMessage("hello"), answer, ToolMessage("3", tool_call_id=call["id"])]
    assert ChatOpenAI(**{**options, "max_tokens": 4}).bind_tools([add]).invoke(history).content


def test_langchain_completions(server: tuple[Server, str], expected: Any) -> None:
    from langchain_openai import OpenAI

    complete = OpenAI(model="tiny", base_url=server[1], api_key=KEY, temperature=0, max_tokens=12, max_retries=0)
    assert complete.invoke("hello") == expected("hello")
    assert "".join(complete.stream("hello")) == expected("hello")
    assert complete.batch(["hello", "a b"]) == [expected("hello"), expected("a b")]


# litellm


@pytest.fixture
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise the import asks the network for prices
        import litellm
    yield litellm
    with warnings.catch_warnings():  # litellm leaves an event loop open
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_litellm(litellm: Any, server: tuple[Server, str], expected: Any) -> None:
    options: Any = {"model": "openai/tiny", "api_base": server[1], "api_key": KEY, "messages": HELLO, **GREEDY}
    answer = litellm.completion(**options)
    assert answer.choices[0].message.content == expected(HELLO)
    parts = [*litellm.completion(**options, stream=True, stream_options={"include_usage": True})]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected(HELLO)
    assert counts(parts[-1]) == counts(answer)
    called = litellm.completion(**{**options, "max_tokens": 100}, tools=[ADD], extra_body=CALL)
    assert called.choices[0].message.tool_calls[0].function.name == "add"
    parsed = litellm.completion(**{**options, "max_tokens": 80, "temperature": 1}, seed=0, response_format=Answer)
    Answer.model_validate_json(parsed.choices[0].message.content)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/other"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"})


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_litellm_async(litellm: Any, server: tuple[Server, str], expected: Any) -> None:
    options: Any = {"model": "openai/tiny", "api_base": server[1], "api_key": KEY, "messages": HELLO, **GREEDY}

    async def run() -> None:
        answer = await litellm.acompletion(**options)
        assert answer.choices[0].message.content == expected(HELLO)
        parts = [part async for part in await litellm.acompletion(**options, stream=True)]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected(HELLO)

    asyncio.run(asyncio.wait_for(run(), 60))


# llm


def test_llm(server: tuple[Server, str], model: Model, tmp_path: Any, monkeypatch: Any, expected: Any) -> None:
    """The command llm, with the models of extra-openai-models.yaml."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    common = f"  model_name: tiny\n  api_base: {server[1]}\n  api_key_name: jaxlm\n"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n{common}  supports_schema: true\n  supports_tools: true\n"
        f"- model_id: tiny-text\n{common}  completion: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"jaxlm": KEY}))
    from click.testing import CliRunner
    from llm.cli import cli

    def llm(*words: str) -> str:
        result = CliRunner().invoke(cli, ["prompt", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    greedy = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    for model_id, prompt in (("tiny", HELLO), ("tiny-text", "hello")):
        for more in ([], ["--no-stream"]):
            assert llm("-m", model_id, "hello", *greedy, *more) == expected(prompt) + "\n"
    function = "def add(a: int, b: int) -> int:\n    return a + b"
    ids = model.tokenizer.chat(HELLO, tools=[ADD])
    assert llm("-m", "tiny", "hello", *greedy, "--functions", function) == expected(ids) + "\n"
    again = llm("-c", "more", *greedy)
    assert again
    sampled = ["-o", "temperature", "1", "-o", "seed", "0", "-o", "max_tokens", "80"]
    schema = json.dumps({**Answer.model_json_schema(), "additionalProperties": False})
    Answer.model_validate_json(llm("-m", "tiny", "hello", "--schema", schema, *sampled))

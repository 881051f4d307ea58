"""Forced tool calls: valid under the JSON schema of the tool, with real tokenizers and over HTTP."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from helpers.serving import serving
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.inference.structured import compile_grammar
from jaxlm.processing.detokenizer import TextStream
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.server import completions
from jaxlm.server.reasoning import Splitter
from jaxlm.server.state import Server
from jaxlm.server.tool_calls import GEMMA, HERMES, LLAMA, CallForm, forced_grammar, form_of, parameters_of

LEVEL = {"$ref": "#/$defs/level"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "level": LEVEL, "room": {"type": "string", "maxLength": 4}},
                "required": ["on", "level"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
                "$defs": {"level": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": 'say "hi"'}},
]
SCHEMAS = {tool["function"]["name"]: parameters_of(tool) for tool in TOOLS}


def check(calls: list[tuple[str, str]]) -> None:
    """Calls are valid for an implementation of JSON schema that is not ours."""
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(shared / "tokenizers" / "qwen3")
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def llama(shared: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(shared / "tokenizers" / "llama3")
    assert tokenizer is not None
    tokenizer.hf.eos_token = "<|eot_id|>"
    return tokenizer


def allowed(constraint: Any) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()


def answer(tokenizer: Tokenizer, grammar: str, seed: int) -> list[str]:
    """The text of a random answer under a grammar, as it is streamed. It ends where it may."""
    constraint = compile_grammar(tokenizer, tokenizer.vocab_size, grammar=grammar).start()
    rng, stream, chunks = np.random.default_rng(seed), TextStream(tokenizer), []
    for _ in range(400):
        choices = allowed(constraint)
        if set(choices) & set(tokenizer.stop_ids):
            return [*chunks, stream.flush()]
        token = int(rng.choice(choices))
        constraint.accept(token)
        chunks.append(stream.push(token))
    raise AssertionError("the answer does not end: " + "".join(chunks))


def test_real_tokenizers_write_calls(qwen: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer, form in ((qwen, HERMES), (llama, LLAMA)):
        for seed, several in enumerate((False, False, True)):
            chunks = answer(tokenizer, forced_grammar(form, TOOLS, several, tokenizer, "closed"), seed)
            splitter = Splitter(True, False, form, list(SCHEMAS))
            found = [splitter.add(chunk, n == len(chunks) - 1) for n, chunk in enumerate(chunks)]
            assert "".join(parts.content for parts in found).strip() == ""
            functions = [call["function"] for parts in found for call in parts.tool_calls]
            check([(function["name"], function["arguments"]) for function in functions])


def test_tags_are_tokens_where_the_tokenizer_has_them(qwen: Tokenizer) -> None:
    tokenizer = qwen
    call, start, end = tokenizer.hf.convert_tokens_to_ids(["<tool_call>", "<think>", "</think>"])

    def begun(reasoning: str) -> Any:
        grammar = forced_grammar(HERMES, TOOLS, False, tokenizer, reasoning)
        return compile_grammar(tokenizer, tokenizer.vocab_size, grammar=grammar).start()

    assert allowed(begun("closed")) == [call]
    assert allowed(begun("")) == [call, start]
    constraint = begun("open")  # any text, or the end of reasoning, and no call in it
    assert call not in allowed(constraint)
    assert end in allowed(constraint)
    for token in tokenizer.encode("Hm.</think>\n\n<tool_call>\n"):
        constraint.accept(token)


def test_the_form_is_that_of_template_vocabulary_or_family(llama: Tokenizer, shared: Path) -> None:
    def form(tokenizer: Tokenizer, family: str, template: Any) -> CallForm:
        tokenizer.hf.chat_template = template
        model: Any = SimpleNamespace(tokenizer=tokenizer, family=SimpleNamespace(__name__=f"jaxlm.models.{family}"))
        return form_of(model)

    texts = {path.name: path.read_text() for path in (shared / "chat_templates").glob("*.jinja")}
    plain = tokenizer_of(None)
    for name in ("Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.3-70B"):
        assert form(llama, "llama3", texts[f"meta-llama-{name}-Instruct.jinja"]) is LLAMA
    for name in ("Qwen-Qwen3-0.6B.jinja", "Qwen-Qwen2.5-7B-Instruct.jinja"):
        assert form(plain, "qwen3", texts[name]) is HERMES
    hermes = {"default": "{{ messages }}", "tool_use": "{{ tools }} <tool_call>"}
    assert form(llama, "llama3", hermes) is HERMES  # Hermes 3 has the vocabulary of Llama 3.1
    assert form(plain, "gemma3", "{{ tools }}") is GEMMA
    assert form(plain, "olmo2", "{{ tools }}") is HERMES


TOOLS_TEMPLATE = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + TEMPLATE
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with quick_compilation():
        tokenizer = tokenizer_of(TOOLS_TEMPLATE)
        # Some tokenizers have the tags as special tokens, which texts omit by default.
        tokenizer.add_special_tokens(HERMES.tags)
        model = replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer)
        server = Server(model, jaxlm.Engine(model, 2, prefix_cache=False), "tiny")
        with serving(server) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            yield client


@pytest.mark.parametrize("form", [HERMES, LLAMA], ids=["tags", "json"])
def test_forced_calls(client: openai.OpenAI, form: CallForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "form_of", lambda model: form)
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        "seed": 1,
        "temperature": 1.0,
        "max_tokens": 150,
    }
    whole = client.chat.completions.create(**options).choices
    assert [(choice.message.content, choice.finish_reason) for choice in whole] == [(None, "tool_calls")] * 2
    expected: dict[int, Any] = {c.index: [call.function for call in c.message.tool_calls or []] for c in whole}
    found: dict[int, Any] = {0: [], 1: []}
    reasons = []
    for chunk in client.chat.completions.create(stream=True, **options):
        [choice] = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            found[choice.index].append(call.function)
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert reasons == ["tool_calls"] * 2
    assert [[(f.name, f.arguments) for f in calls] for calls in found.values()] == [
        [(f.name, f.arguments) for f in expected[n]] for n in found
    ]
    assert [len(calls) for calls in found.values()] == [1, 1]
    check([(f.name, f.arguments) for calls in found.values() for f in calls])


def test_a_named_function(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": 'say "hi"'}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, n=2)
    for one in answer.choices:
        calls: Any = [call.function for call in one.message.tool_calls or []]
        assert [(call.name, call.arguments) for call in calls] == [('say "hi"', "{}")]


@pytest.mark.parametrize(("fields", "message"), [
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tool_choice": "required", "tools": TOOLS, "regex": "a"}, "omit response_format, regex"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS}, "'other', which no tool"),
    ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
    ({"tools": [{"type": "function"}]}, "function"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]},
     "the parameters of 'a'"),
])  # fmt: skip
def test_errors_name_what_is_wrong(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/chat/completions", body={"messages": HELLO, **fields}, cast_to=object)

"""The file of --prompts: what may be on a line, what is printed with the answer, what is refused and where."""

import io
import json
from pathlib import Path

import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, model_of, quick_compilation, tokenizer_of

from jaxlm.cli import generate, main
from jaxlm.cli.prompt_lines import read_prompts
from jaxlm.inference.prompts import to_ids
from jaxlm.models import llama3
from jaxlm.nn import Rope

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "sky"}}
WITH_TOOLS = "{{ tools | tojson if tools }}" + TEMPLATE


@pytest.fixture(scope="module")
def model():
    with quick_compilation():
        config = llama3.Config(**SIZES, L=1, rope=Rope(1e4), context=256)
        yield model_of(llama3, config, tokenizer_of(WITH_TOOLS, thinking=True))


def file_of(tmp_path: Path, *lines) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_prompts_tools_and_further_fields(tmp_path):
    lines = read_prompts(file_of(
        tmp_path, '"a"', {"prompt": "b", "id": 7}, "", {"messages": [USER], "tools": [TOOL], "meta": {"x": None}},
        {"conversations": [{"from": "human", "value": "Hi"}], "tools": None}, {"prompt": [1, 2]},
        {"prompt": "b", "system": "s"}, {"messages": [USER], "system": "s"},
    ))  # fmt: skip
    assert [line.prompt for line in lines] == [
        "a", "b", [USER], [{"from": "human", "value": "Hi"}], [1, 2],
        [SYSTEM, {"role": "user", "content": "b"}], [SYSTEM, USER],
    ]  # fmt: skip
    assert [line.tools for line in lines] == [None, None, [TOOL], None, None, None, None]
    assert [line.fields for line in lines][:3] == [{}, {"id": 7}, {"meta": {"x": None}}]
    assert lines[2].where == f"{tmp_path / 'prompts.jsonl'}, line 4"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"promt": "a"}, "the line has 'promt': expected one of 'prompt', .*did you mean 'prompt'"),
        ({"message": [USER]}, "did you mean 'messages'"),
        ({"prompt": "a", "messages": [USER]}, "both 'prompt' and 'messages'"),
        ({}, "no fields"),
        ({"prompt": "a", "tools": "sky"}, "tools must be JSON"),
        ({"prompt": "a", "system": 3}, "field system must be a string"),
        ({"prompt": "a", "seed": 3}, "field 'seed' has the name of a field of the output"),
        ({"prompt": "a", "temperature": 0}, "field 'temperature' is a sampling parameter.*--temperature"),
        ({"messages": [SYSTEM, USER], "system": "t"}, "two system messages"),
        ({"prompt": None}, "not None"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2: .*{words}"):
        read_prompts(file_of(tmp_path, '"a"', line))


def test_fields_beside_a_prompt_are_those_of_training_rows(tmp_path):
    [line] = read_prompts(file_of(tmp_path, {
        "messages": [SYSTEM, USER], "system": "s", "functions": [{"name": "sky"}],
        "chat_template_kwargs": {"enable_thinking": False}, "id": 1,
    }))  # fmt: skip
    assert line.prompt == [SYSTEM, USER]
    assert line.tools == [TOOL]
    assert (line.template_args, line.fields) == ({"enable_thinking": False}, {"id": 1})
    [line] = read_prompts(file_of(tmp_path, {"prompt": "c", "history": [["a", "b"]], "system_prompt": "s"}))
    roles = [(message["role"], message["content"]) for message in line.prompt]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]


def answers(model, monkeypatch, capsys, *arguments) -> list[dict]:
    monkeypatch.setattr(generate.Generate, "load", lambda self: model)
    assert main(["generate", "--max-tokens", "4", "--seed", "1", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_carry_the_fields_of_their_lines(model, monkeypatch, capsys, tmp_path):
    lines = ['{"prompt": "a", "id": 7}', json.dumps({"messages": [USER], "tools": [TOOL], "meta": {"x": None}})]
    path = file_of(tmp_path, *lines)
    out = answers(model, monkeypatch, capsys, "--prompts", str(path))
    assert [(line.get("id"), line.get("meta")) for line in out] == [(7, None), (None, {"x": None})]
    assert all("reasoning" in line for line in out)
    with_tools = model.tokenizer.chat([USER], tools=[TOOL])
    assert out[1]["prompt_tokens"] == len(with_tools) > len(model.tokenizer.chat([USER]))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    again = answers(model, monkeypatch, capsys, "--prompts", "-")
    assert [line["tokens"] for line in again] == [line["tokens"] for line in out]


def test_reasoning_is_a_field_of_its_own(model):
    class Chunk(str):
        def __getattr__(self, name):
            return None if name == "logprobs" else [] if name == "tokens" else 0

    def parts(*texts, **options):
        line = generate.record([Chunk(text) for text in texts], model, **options)
        return line["reasoning"], line["text"]

    assert parts("<think>\nhm", "\n</think>\n\nyes") == ("hm", "yes")
    assert parts("hm</think>yes", opened=True) == ("hm", "yes")
    assert parts("yes") == ("", "yes")


def test_a_last_message_of_the_assistant_is_continued(model):
    begun = [USER, {"role": "assistant", "content": "so far"}]
    text = model.tokenizer.decode(to_ids(model, begun, {}), skip_special=False)
    assert text.endswith("<user>Hi<end><assistant>so far")
    again = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "so far"}]
    assert to_ids(model, again, {}) == to_ids(model, begun, {})
    assert to_ids(model, begun, {"continue_final_message": True, "add_generation_prompt": False}) == to_ids(
        model, begun, {}
    )
    answered = model.tokenizer.decode(to_ids(model, begun, {"add_generation_prompt": True}), skip_special=False)
    assert answered.endswith("so far<end><assistant>")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match="the last message is a tool call"):
        to_ids(model, [USER, call], {})


@pytest.mark.parametrize("value", [{"messages": []}, {"prompt": ""}])
@pytest.mark.parametrize("beside", [{"system": "s"}, {"history": [["a", "b"]]}])
def test_an_empty_prompt_beside_other_fields_is_refused(tmp_path, value, beside):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(value | beside) + "\n")
    with pytest.raises(ValueError, match="line 1: expected a string"):
        read_prompts(path)

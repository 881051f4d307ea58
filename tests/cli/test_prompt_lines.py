"""The file of --prompts: what may be on a line, what is printed with the answer, what is refused and where."""

import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, model_of, quick_compilation, tokenizer_of

from jaxlm.cli import generate, main
from jaxlm.cli.prompt_lines import PromptLine, read_prompts
from jaxlm.data.formats import MEDIA, TextOptions, conversation
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
    assert lines[2].where == f"{tmp_path / 'prompts.jsonl'}:4"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"promt": "a"}, "the line has 'promt': expected one of 'prompt', .*did you mean 'prompt'"),
        ({"message": [USER]}, "did you mean 'messages'"),
        ({"prompt": "a", "messages": [USER]}, "both 'prompt' and 'messages': remove one of them$"),
        ({}, "no fields"),
        ({"prompt": "a", "tools": "sky"}, "tools must be JSON"),
        ({"prompt": "a", "system": 3}, "field system must be a string"),
        ({"prompt": "a", "index": 3}, "field 'index' has the name of a field of the output"),
        ({"prompt": "a", "seed": 3}, "field 'seed' is a sampling parameter.*--seed"),
        ({"prompt": "a", "temperature": 0}, "field 'temperature' is a sampling parameter.*--temperature"),
        ({"messages": [SYSTEM, USER], "system": "t"}, "two system messages"),
        ({"prompt": None}, "field 'prompt' is empty"),
        ({"messages": "hi"}, "field 'messages' must be a list of messages"),
        ({"conversations": "hi"}, "field 'conversations' must be a list of messages"),
        ({"messages": [1, 2]}, "field 'messages' must be a list of messages"),
        ({"prompt": {"text": "a"}}, "field 'prompt' must be a text"),
        ({"prompt": [1, 2], "tools": [TOOL]}, "field 'tools' needs the chat template.*token ids"),
        ({"prompt": [1, 2], "system": "s"}, "field 'system' needs the chat template.*token ids"),
        (5, "expected a string"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"prompts.jsonl:2: .*{words}"):
        read_prompts(file_of(tmp_path, '"a"', line))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("max_new_tokens", "--max-tokens"), ("max_completion_tokens", "--max-tokens"), ("max_length", "--max-tokens"),
        ("stop_sequences", "--stop"), ("top_logprobs", "--logprobs"), ("repeat_penalty", "--repetition-penalty"),
        ("logit_bias", "--logit-bias"), ("do_sample", "--temperature 0"), ("num_beams", "beam search"),
        ("n", "number of"), ("no_repeat_ngram_size", "not supported"), ("sampling_params", "flags of their own"),
    ],
)  # fmt: skip
def test_sampling_parameters_of_other_tools_are_refused(tmp_path, field, words):
    with pytest.raises(ValueError, match=f"prompts.jsonl:1: the field '{field}' is a sampling parameter.*{words}"):
        read_prompts(file_of(tmp_path, {"messages": [USER], field: 2}))


def test_further_fields_are_kept(tmp_path):
    """Those of data, also if a flag of another tool or of another command has the name; and null fields."""
    names = ["id", "label", "answer", "category", "source", "split", "chosen", "question", "input", "file", "output"]
    names += ["length", "sample", "num_tokens", "k", "model_path", "checkpoint", "dataset", "task", "steps", "epoch"]
    fields = {**dict.fromkeys(names, True), "max_new_tokens": None, "images": [], "audio": None}
    [line] = read_prompts(file_of(tmp_path, {"messages": [USER], **fields}))
    assert line.fields == fields


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("enable_thinking", "chat_template_kwargs"),
        ("add_generation_prompt", "is continued"),
        ("sytem", "did you mean 'system'"),
        ("histroy", "'history'"),
        ("chat_template_kwarg", "'chat_template_kwargs'"),
    ],
)
def test_fields_that_would_change_the_rendering_are_refused(tmp_path, field, words):
    with pytest.raises(ValueError, match=f"prompts.jsonl:1: the field '{field}' is not read: .*{words}"):
        read_prompts(file_of(tmp_path, {"messages": [USER], field: True}))


def test_null_fields_are_absent_as_in_training(tmp_path):
    row = {"prompt": None, "messages": [USER], "conversations": None, "text": None, "enable_thinking": None}
    [line] = read_prompts(file_of(tmp_path, row))
    assert (line.prompt, line.fields) == ([USER], {"text": None, "enable_thinking": None})
    with pytest.raises(ValueError, match="field 'prompt' is empty"):
        read_prompts(file_of(tmp_path, {"prompt": None}))


def test_one_message_is_a_list_of_one_as_in_training(tmp_path):
    assert read_prompts(file_of(tmp_path, {"messages": USER}))[0].prompt == [USER]


def test_names_of_data_that_resemble_fields_are_kept(tmp_path):
    fields = {"story": "a", "reason": "b", "subsystem": "c"}
    assert read_prompts(file_of(tmp_path, {"messages": USER, **fields}))[0].fields == fields


@pytest.mark.parametrize("name", MEDIA)
def test_media_are_refused_as_in_training(tmp_path, name):
    row = {"messages": [USER, {"role": "assistant", "content": "a"}], name: ["x"]}
    with pytest.raises(ValueError, match=f"the field {name}: ") as of_training:
        conversation(row, "messages", TextOptions(), "assistant", True)
    with pytest.raises(ValueError, match=f"prompts.jsonl:1: {of_training.value}"):
        read_prompts(file_of(tmp_path, row))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [USER]}, "messages need the chat template"),
        ([USER], "messages need the chat template"),
        ({"prompt": [USER]}, "messages need the chat template"),
        ({"prompt": "a", "system": "s"}, "'system' needs the chat template"),
        ({"prompt": "a", "tools": [TOOL]}, "'tools' needs the chat template"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs' needs the chat template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_raw_does_not_take_what_needs_the_chat_template(tmp_path, capsys, line, words):
    path = file_of(tmp_path, '"a"', {"prompt": "a", "id": 1, "tools": None}, [1, 2], line)
    with pytest.raises(ValueError, match=f"prompts.jsonl:4: .*{words}.*omit --raw"):
        read_prompts(path, raw=True)
    assert main(["generate", "--raw", "--prompts", str(path)]) == 1
    assert re.search(f"prompts.jsonl:4: .*{words}.*omit --raw", capsys.readouterr().err)
    assert len(read_prompts(path)) == 4


@pytest.mark.parametrize("flags", [["--no-think"], ["--template-arg", "x=1"]])
def test_raw_does_not_take_flags_of_the_chat_template(capsys, flags):
    assert main(["generate", "hi", "--raw", *flags]) == 1
    assert f"jaxlm: {flags[0]} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", lambda data: pa.compress(data, "zstd", asbytes=True))],
    ids=["plain", "gz", "zst"],
)
def test_a_compressed_file_is_read_like_itself(tmp_path, suffix, compress):
    path = tmp_path / f"prompts.jsonl{suffix}"
    path.write_bytes(compress('"a\u2028b\x85"\r\n\n{"prompt": "c"}'.encode("utf-8-sig")))
    lines = read_prompts(path)
    assert [(line.where, line.prompt) for line in lines] == [(f"{path}:1", "a\u2028b\x85"), (f"{path}:3", "c")]
    path.write_bytes(compress(b'"a"\n5'))
    with pytest.raises(ValueError, match=f"prompts.jsonl{suffix}:2: expected a string"):
        read_prompts(path)
    if suffix:
        path.write_bytes(b"no archive")
        with pytest.raises(ValueError, match=f"prompts.jsonl{suffix}:1: .* cannot be read"):
            read_prompts(path)
    path.unlink()
    with pytest.raises(OSError, match="cannot be read"):
        read_prompts(path)


def test_lines_of_stdin_and_of_any_suffix_are_located_alike(tmp_path):
    assert read_prompts(Path("-"), lambda: '\ufeff"a"')[0][:2] == ("stdin:1", "a")
    (tmp_path / "prompts").write_text('\n"a"')
    assert read_prompts(tmp_path / "prompts")[0].where == f"{tmp_path / 'prompts'}:2"


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


def answers(model, monkeypatch, capsys, *arguments) -> tuple[list[dict], str]:
    """The JSON lines on stdout, and stderr."""
    monkeypatch.setattr(generate.Generate, "load", lambda self: model)
    assert main(["generate", "--max-tokens", "4", "--seed", "1", *arguments]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_answers_carry_the_fields_of_their_lines(model, monkeypatch, capsys, tmp_path):
    lines = ['{"prompt": "a", "id": 7}', json.dumps({"messages": [USER], "tools": [TOOL], "meta": {"x": None}})]
    lines.append(json.dumps([USER, {"role": "assistant", "content": "so far"}]))
    path = file_of(tmp_path, *lines)
    out, err = answers(model, monkeypatch, capsys, "--prompts", str(path))
    assert err.count("1 prompt ends with an assistant message") == 1
    assert [(line.get("id"), line.get("meta")) for line in out[:2]] == [(7, None), (None, {"x": None})]
    assert all("reasoning" in line for line in out)
    with_tools = model.tokenizer.chat([USER], tools=[TOOL])
    assert out[1]["prompt_tokens"] == len(with_tools) > len(model.tokenizer.chat([USER]))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    again, _ = answers(model, monkeypatch, capsys, "--prompts", "-")
    assert [line["tokens"] for line in again] == [line["tokens"] for line in out]


def test_a_system_message_is_not_for_token_ids(model):
    assert generate.prompt_of([1, 2], model, None, False) == [1, 2]
    with pytest.raises(ValueError, match="--system needs a text or messages"):
        generate.prompt_of([1, 2], model, "s", False)


def test_how_many_prompts_are_continued_is_noted_once(capsys):
    answered = [USER, {"from": "gpt", "value": "so far"}]
    lines = [PromptLine("", prompt) for prompt in ("a", [1, 2], [USER], answered, answered)]
    generate.note_continued(lines, {})
    assert capsys.readouterr().err.startswith("2 prompts end with an assistant message, which is continued")
    generate.note_continued(lines[:4], {})
    assert capsys.readouterr().err.startswith("1 prompt ends ")
    generate.note_continued(lines[:3], {})
    generate.note_continued(lines, {"add_generation_prompt": True})
    assert not capsys.readouterr().err


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
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: the field .* is empty"):
        read_prompts(path)

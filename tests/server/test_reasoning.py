"""Answers split into reasoning, content and tool calls, however the text is cut into chunks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.server.reasoning import Parts, Splitter
from jaxlm.server.tool_calls import GEMMA, HERMES, LLAMA, CallForm

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
ADD = ("add", {"a": 1, "b": [2]})


def split(
    chunks: list[str],
    reasons: bool = True,
    opened: bool = False,
    form: CallForm | None = HERMES,
    most: int | None = None,
) -> Parts:
    splitter = Splitter(reasons, opened, form, ["add", "sub"], most)
    found = [splitter.add(chunk, last=n == len(chunks) - 1) for n, chunk in enumerate(chunks)]
    called = [call for parts in found for call in parts.tool_calls]
    assert [call["index"] for call in called] == [*range(len(called))]
    assert splitter.count == len(called)
    assert len({call["id"] for call in called}) == len(called)
    return Parts("".join(p.reasoning for p in found), "".join(p.content for p in found), called)


def named(parts: Parts) -> list[Any]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in parts.tool_calls]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content", "calls"), [
    ("hello", False, "", "hello", []),
    ("<think>\nhm\n</think>\n\nYes", False, "\nhm\n", "Yes", []),
    ("hm</think>Yes", True, "hm", "Yes", []),
    ("<think>no end", False, "no end", "", []),
    (CALL, False, "", "", [ADD]),
    ("<think>t</think>I add. " + CALL + "\n" + CALL, False, "t", "I add. \n", [ADD, ADD]),
    ('<tool_call>{"name": 3}</tool_call>', False, "", '<tool_call>{"name": 3}</tool_call>', []),
    ('<tool_call>{"name": "a"', False, "", '<tool_call>{"name": "a"', []),
    ("a < b <thin", False, "", "a < b <thin", []),
])  # fmt: skip
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_chunks_change_nothing(
    text: str, opened: bool, reasoning: str, content: str, calls: list[Any], cuts: list[int]
) -> None:
    parts = split(cut_at(text, cuts), opened=opened)
    assert (parts.reasoning, parts.content, named(parts)) == (reasoning, content, calls)


def cut_at(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends)]


OBJECT = '{"name": "add", "parameters": {"a": 1, "b": [2]}}'
SUB = ("sub", {"x": "a\n", "y": None})


@pytest.mark.parametrize(("form", "text", "content", "calls"), [
    (LLAMA, OBJECT, "", [ADD]),
    (LLAMA, "<|python_tag|>" + OBJECT, "", [ADD]),
    (LLAMA, '\n{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2]}}\n', "", [ADD]),
    (LLAMA, '{"name": "add", "arguments": {"a": 1, "b": [2]}}', "", [ADD]),
    (LLAMA, f"{OBJECT}; {OBJECT}", "", [ADD, ADD]),
    (LLAMA, "The sum: " + OBJECT, "The sum: " + OBJECT, []),
    (LLAMA, OBJECT + " is the call", OBJECT + " is the call", []),
    (LLAMA, '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
    (LLAMA, '{"name": "add", "parameters": 3}', '{"name": "add", "parameters": 3}', []),
    (LLAMA, '{"name": "add", "parameters": {"a": NaN}}', '{"name": "add", "parameters": {"a": NaN}}', []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1e999}}', '{"name": "add", "parameters": {"a": 1e999}}', []),
    (LLAMA, '{"name": "add"', '{"name": "add"', []),
    (LLAMA, "<think>hm</think>" + OBJECT, "", [ADD]),
    (LLAMA, "", "", []),
    (GEMMA, "[add(a=1, b=[2])]", "", [ADD]),
    (GEMMA, "[add(a=1, b=[2]), sub(x='a\\n', y=None)]", "", [ADD, SUB]),
    (GEMMA, "```tool_code\nadd(a=1, b=[2])\nsub(x='a\\n', y=None)\n```", "", [ADD, SUB]),
    (GEMMA, "```tool_code\n[add(a=1, b=[2])]\n```\n", "", [ADD]),
    (GEMMA, OBJECT, "", [ADD]),
    (GEMMA, "```json\n" + OBJECT + "\n```", "", [ADD]),
    (GEMMA, "[1, 2]", "[1, 2]", []),
    (GEMMA, "add(1)", "add(1)", []),
    (GEMMA, "add(a=open('b'))", "add(a=open('b'))", []),
    (GEMMA, "add(a={(1, 2): 3})", "add(a={(1, 2): 3})", []),
    (GEMMA, "add(a=1e999)", "add(a=1e999)", []),
    (GEMMA, "add(a=1)\nb = 2", "add(a=1)\nb = 2", []),
    (GEMMA, "other(a=1)", "other(a=1)", []),
    (GEMMA, "add(a='\\d')", "", [("add", {"a": "\\d"})]),
])  # fmt: skip
@given(cuts=st.lists(st.integers(0, 100), max_size=8))
def test_calls_without_tags(form: CallForm, text: str, content: str, calls: list[Any], cuts: list[int]) -> None:
    parts = split(cut_at(text, cuts), form=form)
    assert (parts.content, named(parts)) == (content, calls)


def test_calls_after_the_first_are_dropped() -> None:
    for form, text in ((HERMES, CALL + "\n" + CALL), (LLAMA, f"{OBJECT};{OBJECT}")):
        assert named(split([text], form=form, most=1)) == [ADD]


def test_deep_text_is_content() -> None:
    for text in (
        "[add(a=" + "[" * 5000,
        '{"name": "add", "parameters": ' + "[" * 100_000,
        "add(a=" + "-" * 9000 + "1)",
    ):
        assert split([text], form=GEMMA).content == text


def test_surrogates_are_written_as_escapes() -> None:
    parts = split(['{"name": "add", "parameters": {"a": "\\ud800"}}'], form=LLAMA)
    [call] = parts.tool_calls
    assert json.loads(call["function"]["arguments"].encode()) == {"a": "\ud800"}


def test_tags_are_text_where_they_mean_nothing() -> None:
    assert split([CALL], form=None) == Parts("", CALL, [])
    assert split(["<think>a</think>b"], reasons=False) == Parts("", "<think>a</think>b", [])


def test_text_is_not_held_back() -> None:
    splitter = Splitter(True, False, HERMES)
    assert splitter.add("Hello, ") == Parts("", "Hello, ", [])
    assert splitter.add("a <").content == "a "
    assert splitter.add("b").content == "<b"

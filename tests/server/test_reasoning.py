"""Answers split into reasoning, content and tool calls, however the text is cut into chunks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.server.reasoning import Parts, Splitter

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
ADD = ("add", {"a": 1, "b": [2]})


def split(chunks: list[str], reasons: bool = True, opened: bool = False, calls: bool = True) -> Parts:
    splitter = Splitter(reasons, opened, calls)
    found = [splitter.add(chunk, last=n == len(chunks) - 1) for n, chunk in enumerate(chunks)]
    called = [call for parts in found for call in parts.tool_calls]
    assert [call["index"] for call in called] == [*range(len(called))]
    assert splitter.count == len(called)
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
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    chunks = [text[a:b] for a, b in zip([0, *ends], ends)]
    parts = split(chunks, opened=opened)
    assert (parts.reasoning, parts.content, named(parts)) == (reasoning, content, calls)


def test_tags_are_text_where_they_mean_nothing() -> None:
    assert split([CALL], calls=False) == Parts("", CALL, [])
    assert split(["<think>a</think>b"], reasons=False) == Parts("", "<think>a</think>b", [])


def test_text_is_not_held_back() -> None:
    splitter = Splitter(True, False, True)
    assert splitter.add("Hello, ") == Parts("", "Hello, ", [])
    assert splitter.add("a <").content == "a "
    assert splitter.add("b").content == "<b"

"""Splits the text of an answer, as it is generated, into reasoning, content and tool calls."""

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.processing.chat_template import THINKING

CALL = ("<tool_call>", "</tool_call>")  # of Qwen 3 and Hermes: {"name": ..., "arguments": {...}}


class Parts(NamedTuple):
    """New text of an answer.

    Attributes:
        reasoning: Text between the tags of reasoning.
        content: The text of the answer.
        tool_calls: Complete calls, in the form of the protocol.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()


class Splitter:
    """Takes chunks of text in order. Text that may be the beginning of a tag waits for the next chunk."""

    def __init__(self, reasons: bool, opened: bool, calls: bool):
        """
        Args:
            reasons: Whether the model writes reasoning between tags.
            opened: Whether the prompt ends inside of reasoning.
            calls: Whether tools were given.
        """
        self._tags: dict[str, str] = {}  # opening tag -> what is inside of it
        if reasons:
            self._tags[THINKING[0]] = "reasoning"
        if calls:
            self._tags[CALL[0]] = "call"
        self._inside: str = "reasoning" if opened else "content"
        self._text: str = ""  # not yet returned
        self._at_start: bool = True  # no content yet: blanks after reasoning are dropped
        self.count: int = 0  # tool calls so far

    def add(self, text: str, last: bool = False) -> Parts:
        """The parts of the next text. last: no text follows."""
        self._text += text
        reasoning, content, calls = "", "", []
        while True:
            ends = {"reasoning": [THINKING[1]], "call": [CALL[1]]}.get(self._inside, [*self._tags])
            found = min(((self._text.find(tag), tag) for tag in ends if tag in self._text), default=None)
            if found is None:
                break
            before, self._text = self._text[: found[0]], self._text[found[0] + len(found[1]) :]
            if self._inside == "call":
                content, calls = self._called(before, content, calls)
            elif self._inside == "reasoning":
                reasoning += before
            else:
                content += self._content(before)
            self._inside = self._tags[found[1]] if self._inside == "content" else "content"
        kept = 0 if last else max((_overlap(self._text, tag) for tag in ends), default=0)
        if self._inside != "call" or last:
            ready, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
            if self._inside == "reasoning":
                reasoning += ready
            else:
                content += self._content(CALL[0] + ready if self._inside == "call" else ready)
        return Parts(reasoning, content, calls)

    def _content(self, text: str) -> str:
        if self._at_start and self._tags:
            text = text.lstrip()
        self._at_start = self._at_start and not text
        return text

    def _called(self, text: str, content: str, calls: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        """A tool call; text that is none stays content."""
        call = parse_call(text)
        if call is None:
            return content + self._content(CALL[0] + text + CALL[1]), calls
        self.count += 1
        return content, [*calls, {"index": self.count - 1, **call}]


def parse_call(text: str) -> dict[str, Any] | None:
    """A tool call from its JSON; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": found["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _overlap(text: str, tag: str) -> int:
    """The number of characters at the end of a text that begin a tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)

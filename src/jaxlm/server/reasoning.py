"""Splits the text of an answer, as it is generated, into reasoning, content and tool calls."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.processing.chat_template import THINKING
from jaxlm.server.tool_calls import CallForm, written


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
    """Takes chunks of text in order. Text that may be the beginning of a tag or a call waits for the next chunk."""

    def __init__(
        self,
        reasons: bool,
        opened: bool,
        form: CallForm | None = None,
        names: Sequence[str] = (),
        most: int | None = None,
    ):
        """
        Args:
            reasons: Whether the model writes reasoning between tags.
            opened: Whether the prompt ends inside of reasoning.
            form: How the model writes calls; None if there are no tools.
            names: Names of the tools.
            most: Number of calls that are returned; further ones are dropped. None: all.
        """
        self._form, self._names, self._most = form, names, most
        self._tags: dict[str, str] = {}  # opening tag -> what is inside of it
        if reasons:
            self._tags[THINKING[0]] = "reasoning"
        if form is not None and form.tags:
            self._tags[form.tags[0]] = "call"
        begins = () if form is None else form.begins
        self._begins: list[str] = [text.replace("{name}", name) for text in begins for name in names]
        self._inside: str = "reasoning" if opened else "content"
        self._text: str = ""  # not yet returned
        self._at_start: bool = True  # no content yet: blanks after reasoning are dropped
        self.count: int = 0  # tool calls so far

    def add(self, text: str, last: bool = False) -> Parts:
        """The parts of the next text. last: no text follows."""
        self._text += text
        reasoning, content, calls = "", "", []
        while True:
            ends = [*self._tags]
            if self._inside == "reasoning":
                ends = [THINKING[1]]
            elif self._inside == "call" and self._form is not None:
                ends = [self._form.tags[1]]
            elif self._may_be_calls():
                if not last:
                    return Parts(reasoning, content, calls)
                found = self._called(self._text)
                if found is not None:
                    self._text = ""
                    return Parts(reasoning, content, [*calls, *found])
            tag = min(((self._text.find(tag), tag) for tag in ends if tag in self._text), default=None)
            if tag is None:
                break
            before, self._text = self._text[: tag[0]], self._text[tag[0] + len(tag[1]) :]
            if self._inside == "call":
                found = self._called(before)
                calls += found or []
                content += self._content(self._opening + before + tag[1]) if found is None else ""
            elif self._inside == "reasoning":
                reasoning += before
            else:
                content += self._content(before)
            self._inside = self._tags[tag[1]] if self._inside == "content" else "content"
        kept = 0 if last else max((_overlap(self._text, tag) for tag in ends), default=0)
        if self._inside != "call" or last:
            ready, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
            if self._inside == "reasoning":
                reasoning += ready
            else:
                content += self._content(self._opening + ready if self._inside == "call" else ready)
        return Parts(reasoning, content, calls)

    @property
    def _opening(self) -> str:
        return self._form.tags[0] if self._form is not None else ""

    def _may_be_calls(self) -> bool:
        """Whether the text is the beginning of an answer that may be calls without tags."""
        body = "".join(self._text[:200].split())
        return self._at_start and any(begin.startswith(body) or body.startswith(begin) for begin in self._begins)

    def _content(self, text: str) -> str:
        if self._at_start and (self._tags or self._begins):
            text = text.lstrip()
        self._at_start = self._at_start and not text
        return text

    def _called(self, text: str) -> list[dict[str, Any]] | None:
        """The tool calls of a text; None if it has none. Without tags, calls of other names are none either: the answer
        may be any JSON."""
        assert self._form is not None
        calls = self._form.parse(text)
        if calls is None or (not self._form.tags and any(name not in self._names for name, _ in calls)):
            return None
        if self._most is not None:
            calls = calls[: max(0, self._most - self.count)]
        self.count += len(calls)
        return [written(call, self.count - len(calls) + i) for i, call in enumerate(calls)]


def _overlap(text: str, tag: str) -> int:
    """The number of characters at the end of a text that begin a tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)

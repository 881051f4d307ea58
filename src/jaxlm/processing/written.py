"""Finds the contents of messages in the text that a chat template rendered: templates drop what they do not know."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARKER = "content-5b3f19-"
Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]
Span = tuple[int, int]


def marker(text: str) -> str:
    """A text that does not occur in `text`."""
    found = MARKER
    while found in text:
        found += "0"
    return found


def content_spans(render: Render, messages: Sequence[Message], text: str) -> list[Span | None] | None:
    """Finds every content in the text of a conversation, by one more rendering with markers in place of contents.

    Args:
        render: Renders messages with the chat template.
        messages: The messages. A content that is blank has no span.
        text: Their text.

    Returns:
        The span of characters of each message's content, None for a blank one. None instead of the list if a content
        does not appear once, in order, and as it is, stripped, or quoted as JSON.
    """
    shown, marked = _marked(messages, marker(text))
    try:
        pieces = re.split(f"{marker(text)}([0-9]+)\\.", render(marked))
    except ValueError:
        return None
    literals, numbers = pieces[::2], pieces[1::2]
    if numbers != [str(i) for i in shown] or not text.startswith(literals[0]):
        return None
    spans: list[Span | None] = [None] * len(messages)
    at = len(literals[0])
    for i, literal in zip(shown, literals[1:]):
        content = messages[i]["content"]
        variants = (content, content.strip(), json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
        written = next((one for one in variants if text.startswith(one + literal, at)), None)
        if written is None:
            return None
        spans[i] = at, at + len(written)
        at += len(written) + len(literal)
    return spans if at == len(text) else None


def dropped(render: Render, messages: Sequence[Message], text: str, besides: str | None = None) -> int | None:
    """Returns the index of the first message whose content the template does not write; None if it writes all.

    The arguments are those of content_spans. Messages of the role `besides` are not looked at. A content that the
    template changes counts as written.
    """
    tag = marker(text)
    shown, marked = _marked(messages, tag)
    try:
        together = render(marked)
    except ValueError:  # the template expects something of a content
        together = ""
    found = set(re.findall(f"{tag}([0-9]+)\\.", together))
    for i in shown:
        if messages[i]["role"] == besides or str(i) in found:
            continue
        try:
            written = tag in render([*messages[:i], {**messages[i], "content": tag}, *messages[i + 1 :]])
        except ValueError:
            written = messages[i]["content"].strip() in text
        if not written:
            return i
    return None


def _marked(messages: Sequence[Message], tag: str) -> tuple[list[int], list[Message]]:
    """Returns the indices of messages with a content that is not blank, and the messages with a marker in its place."""
    shown = [i for i, message in enumerate(messages) if message["content"].strip()]
    marked = list(messages)
    for i in shown:
        marked[i] = {**messages[i], "content": f"{tag}{i}."}
    return shown, marked

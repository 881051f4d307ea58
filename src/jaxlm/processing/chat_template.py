"""Chat messages as a template may be given them, and what a template has against them.

A template that is handed content of a shape it does not expect writes its Python repr, or nothing, and says nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

# Of a subclass too, an enumeration say, whatever it has made of these methods.
EXACT: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


def plain(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Copies of messages whose content is text; content that is a list of text parts is put together.

    ValueError for what is no message, and for parts that are no text ({"type": "image", …}).
    """
    return [_plain(message) for message in messages]


def _plain(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"a message is a dict with 'role' and 'content', got {message!r}")
    content = message.get("content")
    if not isinstance(content, list | tuple | Mapping):
        return dict(message)
    parts = [content] if isinstance(content, Mapping) else content
    return {**message, "content": "".join(_text(part) for part in parts)}


def _text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in (None, "text"):
        raise ValueError(
            f"the content of a message has a part of type {kind!r}: images and other media are not supported yet, "
            "give its text alone"
        )
    if kind is None or not isinstance(part.get("text"), str):
        raise ValueError(f"a part of a message's content is {{'type': 'text', 'text': …}}, got {part!r}")
    return part["text"]


def plain_data(value: Any) -> Any:
    """A copy made of Python's plain types alone, as transformers hands a template its data.

    Other objects bring methods that a sandbox cannot judge, some of which write files. What has no plain form becomes
    the name of its type.
    """
    if isinstance(value, bool) or value is None:
        return value
    for kind, exact in EXACT.items():
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        return {plain_data(name): plain_data(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if isinstance(value, np.generic):
        return plain_data(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic model
        return plain_data(dump())
    return f"<{type(value).__name__}>"


@contextmanager
def template_errors() -> Iterator[None]:
    """ValueError for what goes wrong inside a chat template, in the template's own words."""
    from transformers.utils import (
        DocstringParsingException,  # pyright: ignore[reportPrivateImportUsage]
        TypeHintParsingException,  # pyright: ignore[reportPrivateImportUsage]
    )

    try:
        yield
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"a tool cannot be described to the model: {error}") from error
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"the chat template refuses these messages: {error or type(error).__name__}") from error


THINKING = ("<think>", "</think>")


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """An answer's reasoning, without blank space around it, and what follows it.

    A block that is not closed is all reasoning; a text that does not begin with a block is all answer.
    `opened` says that the prompt ended with the opening tag, as some templates write it.
    """
    start, end = THINKING
    body = text.lstrip()
    if not opened and not body.startswith(start):
        return "", text
    thinking, _, answer = body.removeprefix(start).partition(end)
    return thinking.strip(), answer.lstrip()

"""Converts values to plain data for a chat template, template errors to ValueError, and splits reasoning off."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

THINKING = ("<think>", "</think>")  # tags around the reasoning of a model
# Conversions that also work for subclasses, such as enumerations, that override __str__ and others.
EXACT: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


def parse_value(text: str) -> Any:
    """The value of a template variable or a setting that is typed as text.

    None, True and False in any case (also null), JSON, or else the text itself. `"true"` in double quotes is a text.
    """
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def plain_data(value: Any) -> Any:
    """Copies a value to plain Python types (dict, list, tuple, str, numbers, bool, None), as transformers does.

    Other objects have methods that the sandbox cannot check; some of them write files. A value without a plain form is
    replaced by the name of its type.
    """
    from numpy import generic  # here, because the command line imports this file to show help

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
    if isinstance(value, generic):
        return plain_data(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic model
        return plain_data(dump())
    return f"<{type(value).__name__}>"


@contextmanager
def template_errors() -> Iterator[None]:
    """Converts an exception inside a chat template to a ValueError with the template's message."""
    from transformers.utils import (
        DocstringParsingException,  # pyright: ignore[reportPrivateImportUsage]
        TypeHintParsingException,  # pyright: ignore[reportPrivateImportUsage]
    )

    try:
        yield
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"a function passed as a tool has no valid JSON schema: {error}") from error
    except Exception as error:  # a template is a program and can raise anything
        raise ValueError(f"the chat template cannot render these messages: {error or type(error).__name__}") from error


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """Splits generated text into reasoning and answer.

    Text that does not begin with a reasoning block is all answer. An unclosed block is all reasoning.

    Args:
        text: Generated text.
        opened: Whether the prompt ended with the opening tag, as some templates render it.

    Returns:
        The reasoning without surrounding whitespace, and the text after it.
    """
    start, end = THINKING
    body = text.lstrip()
    if not opened and not body.startswith(start):
        return "", text
    thinking, _, answer = body.removeprefix(start).partition(end)
    return thinking.strip(), answer.lstrip()

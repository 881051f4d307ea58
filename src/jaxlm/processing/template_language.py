"""The tags, filters and functions that transformers adds to jinja2 for chat templates.

transformers defines them inside a private function, so they are reimplemented here. The tests compare both.
"""

import json
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock
from jinja2.utils import Namespace

Spans = list[tuple[int, int]]


class Written:
    """The output of a running template so far.

    Attributes:
        length: Number of characters.
        spans: Spans (begin, end) of the {% generation %} blocks.
    """

    def __init__(self) -> None:
        self.length = 0
        self.spans: Spans = []


written: ContextVar[Written] = ContextVar("written")  # of the template that runs in this thread


class Generation(Extension):
    """The tag {% generation %} … {% endgeneration %}, which marks assistant text for the loss mask."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        text, output = caller(), written.get()
        output.spans.append((output.length, output.length + len(text)))
        return text


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, unlike jinja2's filter of this name."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class TemplateDict:
    """`dict` for templates, without access to the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(Namespace):
    """`namespace` for templates: underscore-prefixed names are rejected, and the repr does not recurse."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # an attribute may be named self
        self, *more = args
        attributes = dict(*more, **kwargs)
        for name in attributes:
            check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the underscore-prefixed attribute {name!r}")


FILTERS: dict[str, Callable[..., Any]] = {"tojson": tojson}
GLOBALS: dict[str, Any] = {
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
    "dict": TemplateDict(),
    "namespace": TemplateNamespace,
}

"""What a chat template finds beside jinja2's own tags, filters and functions, as transformers gives it.

It is written here because transformers makes it within a private function. tests/test_sandbox.py compares the two.
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
    """How much a template has written before what it is at, and the spans of that which it has marked."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: Spans = []


written: ContextVar[Written] = ContextVar("written")  # by the template that runs in this thread


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which a template marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        text, so_far = caller(), written.get()
        so_far.spans.append((so_far.length, so_far.length + len(text)))
        return text


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; jinja2's own escapes what means something in HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class TemplateDict:
    """`dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(Namespace):
    """`namespace`, without names of Python's insides, and with a repr that does not follow namespaces in each other."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # an attribute may be called self
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

"""Bounds for chat templates, which are programs and come with a checkpoint from a stranger.

jinja2's sandbox keeps them from files, modules and the insides of Python, but not from running for ever or filling the
memory. Here every step pays for itself and for what it makes, out of LIMIT, and all end with SECONDS. No step may be
large in itself, for nothing interrupts it: an operation can make, and take, as much as the sizes of its operands
multiplied, and runs only where that is left.

Nothing inside transformers is used or changed: a program may render with it and with jaxlm at once.
"""

import functools
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, GeneratorType
from typing import Any

from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Call, EnvironmentAttribute, Output, Slice, TemplateData
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.processing.template_language import FILTERS, GLOBALS, Generation, Written, written

SECONDS = 10.0
LIMIT, SHARE = 5_000_000, 200  # characters; and so many times those of the messages. Real templates take 3 % at most
ITEM = 100  # characters for which an item of a list counts, and a step
SOURCE = 100_000  # characters of a template
# Filters that make more of a value, by what else they are given; the others pick or change its parts.
GROWING = {"batch", "center", "format", "indent", "join", "replace", "slice", "sum", "tojson", "truncate", "xmlattr"}
# Not needed for a chat, and slow in ways that the sizes of their operands do not show.
ABSENT = {"lipsum", "pprint", "striptags", "urlize", "wordwrap", "encode", "to_bytes"}


class _Meter:
    """What is left to a template."""

    def __init__(self, given: Any):
        self.left = LIMIT + SHARE * _size(given, most=10**9)
        self.end = time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        self.left -= amount + ITEM
        self.check(0)

    def check(self, amount: int) -> None:
        if amount > self.left:
            raise SecurityError("it makes more text, or takes more steps, than a chat can need")
        if time.monotonic() > self.end:
            raise SecurityError(f"it takes more than {SECONDS:g} seconds")


_meter: ContextVar[_Meter] = ContextVar("meter")


def _size(value: Any, most: int | None = None) -> int:
    """Characters and items, counted as often as they can be reached: as many as a copy or a comparison meets. The count
    ends where it is above `most`, or what is left."""
    size, todo, most = 0, [value], _meter.get().left if most is None else most
    while todo and size <= most:
        one = todo.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | Set | ValuesView):
            todo += one
        size += ITEM
    return size


def _check(subject: Any, operands: Iterable[Any]) -> None:
    """May an operation run that makes so much of its subject? Whole numbers count by value: they may be widths."""
    if amount := sum(map(_amount, operands)):
        _meter.get().check(_size(subject) * amount)


def _amount(operand: Any) -> int:
    if isinstance(operand, int):
        return abs(operand)
    return len(operand) + 1 if isinstance(operand, str) else _size(operand)


def _made(value: Any) -> Any:
    """What a step has made, when it is paid for."""
    if isinstance(value, int) and value.bit_length() > 1000:
        raise SecurityError("it makes a number of more than 1,000 bits")
    _meter.get().check(_size(value))
    _meter.get().spend(_length(value))
    return value


def _length(value: Any) -> int:
    """What the value itself takes, without its items."""
    return len(value) if isinstance(value, str) else ITEM * len(value) if isinstance(value, list | tuple | dict) else 0


def _check_format(text: str, named: bool) -> None:
    """Widths are numbers written as text: in `%` formats, or (named) in braces."""
    specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)] if named else [text]
    if any(re.search(r"[0-9]{5}|%[^a-zA-Z%]*\*" + r"|\{" * named, spec) for spec in specs):
        raise SecurityError("it has a format with a width above 9,999, or with one that is computed")


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test under the bounds."""
    skipped = int(hasattr(function, "jinja_pass_arg"))  # it is handed its environment first

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first, value, more = args[:skipped], args[skipped], [*args[skipped + 1 :], *kwargs.values()]
        value = _made(list(value)) if isinstance(value, GeneratorType | range) else value
        if name == "format":
            _check_format(str(value), named=False)
        if name == "round" and any(isinstance(x, int) and abs(x) > 300 for x in more):
            raise SecurityError("it rounds to more than 300 digits")
        if name in GROWING:
            _check(value, more)
        return _made(function(*first, value, *args[skipped + 1 :], **kwargs))

    return run


class _Code(CodeGenerator):
    """Python for a template, with a step counted in every loop and a price on everything that it builds."""

    def visit_For(self, node: Any, frame: Any) -> None:
        node.iter = _called("steps", node.iter)
        super().visit_For(node, frame)

    def visit_Output(self, node: Any, frame: Any) -> None:
        # Within macros and blocks that are captured, texts wait in a list: `concat` would count them too late.
        if frame.buffer is not None:
            parts = [part if isinstance(part, TemplateData) else _called("text", part) for part in node.nodes]
            node = Output(parts, lineno=node.lineno)
        super().visit_Output(node, frame)

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Getitem(self, node: Any, frame: Any) -> None:
        self._priced(super().visit_Getitem, node, frame, isinstance(node.arg, Slice))

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        self._priced(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_List(self, node: Any, frame: Any) -> None:
        self._priced(super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._priced(super().visit_Dict, node, frame)

    def _priced(self, visit: Callable[..., None], node: Any, frame: Any, priced: bool = True) -> None:
        self.write("environment.made(" * priced)
        visit(node, frame)
        self.write(")" * priced)


def _called(method: str, node: Any) -> Call:
    """What a method of the environment makes of a node's value."""
    return Call(EnvironmentAttribute(method), [node], [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the bounds of this module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code
    made = staticmethod(_made)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept = []
        for part in parts:
            _meter.get().spend(len(part))
            kept.append(part)
        return "".join(kept)

    def text(self, value: Any) -> str:
        return value if isinstance(value, str) else str(value)

    def steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            _meter.get().spend(0)
            yield value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in ABSENT and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, named=False)
            _check(left, [[right]])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _meter.get().check(left.bit_length() * abs(right) * 20_000)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                _meter.get().check(_length(value) * times if isinstance(times, int) else 0)
        return _made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        operands = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        if isinstance(subject, str):
            if function.__name__ in ("format", "format_map"):
                _check_format(subject, named=True)
            _check(subject, operands)
        elif isinstance(function, FunctionType):
            _meter.get().check(256 * _size(operands))  # strftime stops there
        elif isinstance(function, LoopContext):  # of a recursive loop
            args = (self.steps(args[0]), *args[1:])
        return _made(super().call(context, function, *args, **kwargs))


@contextmanager
def bounded(given: Any) -> Iterator[None]:
    """Templates that run within keep to the bounds. given: what they are run with, which gives them room.

    Raises what a template raises, and jinja2's SecurityError where it would pass a bound.
    """
    token = _meter.set(_Meter(given))
    try:
        yield
    finally:
        _meter.reset(token)


def run(source: str, given: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text that a template writes, and the spans in it that its {% generation %} tags mark. given: its variables.

    A span within a macro or a captured block is counted from what was written before that, as transformers does.
    """
    with bounded(given):
        so_far, parts = Written(), []
        token = written.set(so_far)
        try:
            for part in _compiled(_short(source)).generate(**given):
                _meter.get().spend(len(part))
                parts.append(part)
                so_far.length += len(part)
        finally:
            written.reset(token)
        return "".join(parts), so_far.spans


def variables(source: str) -> set[str]:
    """The names that a template reads and does not set itself: what a caller can give it."""
    with bounded(None):  # jinja2 computes what is constant on the way
        return find_undeclared_variables(_environment().parse(_short(source)))


def _short(source: str) -> str:
    if len(source) > SOURCE:
        raise SecurityError(f"it has {len(source):,} characters, more than {SOURCE:,}")
    return source


@functools.lru_cache(16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@functools.cache
def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    filters = {name: filter for name, filter in (environment.filters | FILTERS).items() if name not in ABSENT}
    environment.filters = {name: _metered(name, filter) for name, filter in filters.items()}
    environment.tests = {name: _metered(name, test) for name, test in environment.tests.items()}
    environment.globals = {name: made for name, made in environment.globals.items() if name not in ABSENT} | GLOBALS
    return environment

"""A sandbox for chat templates with limits on output, steps and time.

A chat template is a program, and it comes with a checkpoint that may be untrusted. jinja2's sandbox denies it files,
modules and Python internals, but does not limit time or memory. This sandbox does:

- Each template has a budget of LIMIT characters, and more for long conversations (SHARE). Every step and every value
  that it builds is charged to the budget.
- Before an operation whose result can be as large as the product of its operands' sizes, that product is checked
  against the remaining budget. A single operation cannot be interrupted once it runs.
- A template ends with an error after SECONDS.

transformers' own sandbox is neither used nor changed, so a program can render with transformers and jaxlm.
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
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Call, EnvironmentAttribute, Output, Slice, TemplateData
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.processing.template_language import FILTERS, GLOBALS, Generation, Written, written

SECONDS = 10.0
# Budget in characters: LIMIT, and SHARE times the size of the messages. Published templates use at most 3 % of it.
LIMIT, SHARE = 5_000_000, 200
ITEM = 100  # cost of a step and of an item of a container, in characters
SOURCE = 100_000  # maximum length of a template in characters
# Filters whose output can grow with their arguments. The output of other filters is no larger than their input.
GROWING = {"batch", "center", "format", "indent", "join", "replace", "slice", "sum", "tojson", "truncate", "xmlattr"}
# Removed: chat templates do not need them, and their cost does not follow from the sizes of their operands.
ABSENT = {"lipsum", "pprint", "striptags", "urlize", "wordwrap", "encode", "to_bytes"}


class _Meter:
    """The remaining budget of a template, in characters and time."""

    def __init__(self, template_variables: Any):
        self.left = LIMIT + SHARE * _size(template_variables, limit=10**9)
        self.end = time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        """Charges a step and `amount` characters."""
        self.left -= amount + ITEM
        self.check(0)

    def check(self, amount: int) -> None:
        """Raises SecurityError if `amount` exceeds the remaining budget, or the time is up."""
        if amount > self.left:
            raise SecurityError("it exceeds the limit on output and steps")
        if time.monotonic() > self.end:
            raise SecurityError(f"it exceeds the time limit of {SECONDS:g} seconds")


_meter: ContextVar[_Meter] = ContextVar("meter")


def _size(value: Any, limit: int | None = None) -> int:
    """Size of a value in characters. A value that is contained twice counts twice, because a copy or a comparison
    visits it twice. Counting stops above `limit`, by default the remaining budget."""
    size, todo, limit = 0, [value], _meter.get().left if limit is None else limit
    while todo and size <= limit:
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
    """Checks the possible size of an operation's result, the product of the operands' sizes, against the budget.
    Integers count by value, because they may be widths or repetitions."""
    if amount := sum(map(_amount, operands)):
        _meter.get().check(_size(subject) * amount)


def _amount(operand: Any) -> int:
    if isinstance(operand, int):
        return abs(operand)
    return len(operand) + 1 if isinstance(operand, str) else _size(operand)


def _charged(value: Any) -> Any:
    """Charges the budget for the result of a step, and returns it."""
    if isinstance(value, int) and value.bit_length() > 1000:
        raise SecurityError("it computes a number of more than 1,000 bits")
    _meter.get().check(_size(value))
    _meter.get().spend(_length(value))
    return value


def _length(value: Any) -> int:
    """Size of a value in characters, without the contents of its items."""
    return len(value) if isinstance(value, str) else ITEM * len(value) if isinstance(value, list | tuple | dict) else 0


def _check_format(text: str, named: bool) -> None:
    """Rejects large widths, which are digits inside the format: of `%` formats or, if `named`, of `str.format`."""
    specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)] if named else [text]
    if any(re.search(r"[0-9]{5}|%[^a-zA-Z%]*\*" + r"|\{" * named, spec) for spec in specs):
        raise SecurityError("it has a format with a width above 9,999 or a computed width")


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter or a test with checks of the budget."""
    skipped = int(hasattr(function, "jinja_pass_arg"))  # its first argument is the environment

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first, value, more = args[:skipped], args[skipped], [*args[skipped + 1 :], *kwargs.values()]
        value = _charged(list(value)) if isinstance(value, GeneratorType | range) else value
        if name == "format":
            _check_format(str(value), named=False)
        if name == "round" and any(isinstance(x, int) and abs(x) > 300 for x in more):
            raise SecurityError("it rounds to more than 300 digits")
        if name in GROWING:
            _check(value, more)
        return _charged(function(*first, value, *args[skipped + 1 :], **kwargs))

    return run


class _Code(CodeGenerator):
    """Compiles a template to Python that charges the budget for every iteration and every value it builds."""

    def visit_For(self, node: Any, frame: Any) -> None:
        node.iter = _called("steps", node.iter)
        super().visit_For(node, frame)

    def visit_Output(self, node: Any, frame: Any) -> None:
        # Macros and captured blocks collect their output in a list. It is charged here, since `concat` comes too late.
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
        self._charge(super().visit_Getitem, node, frame, isinstance(node.arg, Slice))

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        self._charge(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_List(self, node: Any, frame: Any) -> None:
        self._charge(super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._charge(super().visit_Dict, node, frame)

    def _charge(self, visit: Callable[..., None], node: Any, frame: Any, charged: bool = True) -> None:
        self.write("environment.charged(" * charged)
        visit(node, frame)
        self.write(")" * charged)


def _called(method: str, node: Any) -> Call:
    """A node that calls a method of the environment with the value of another node."""
    return Call(EnvironmentAttribute(method), [node], [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the limits of this module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code
    charged = staticmethod(_charged)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts = []
        for part in parts:
            _meter.get().spend(len(part))
            texts.append(part)
        return "".join(texts)

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
        return _charged(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        operands = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
        if isinstance(subject, str):
            if function.__name__ in ("format", "format_map"):
                _check_format(subject, named=True)
            _check(subject, operands)
        elif isinstance(function, FunctionType):
            _meter.get().check(256 * _size(operands))  # strftime: at most 256 characters per character of the format
        elif isinstance(function, LoopContext):  # a recursive loop
            args = (self.steps(args[0]), *args[1:])
        return _charged(super().call(context, function, *args, **kwargs))


@contextmanager
def bounded(template_variables: Any) -> Iterator[None]:
    """A context in which templates run with a new budget. A template that exceeds it raises jinja2's SecurityError.

    Args:
        template_variables: The variables of the template. The budget grows with their size.
    """
    token = _meter.set(_Meter(template_variables))
    try:
        yield
    finally:
        _meter.reset(token)


def run(source: str, template_variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a template.

    The span of a {% generation %} block inside a macro or a captured block begins at the end of the output before it,
    as in transformers.

    Args:
        source: The template.
        template_variables: Its variables.

    Returns:
        The text, and the spans (begin, end) of its {% generation %} blocks.

    Raises:
        SecurityError: The template exceeds a limit or accesses something unsafe.
        Exception: Any exception that the template raises.
    """
    with bounded(template_variables):
        output, parts = Written(), []
        token = written.set(output)
        try:
            for part in _compiled(_short(source)).generate(**template_variables):
                _meter.get().spend(len(part))
                parts.append(part)
                output.length += len(part)
        finally:
            written.reset(token)
        return "".join(parts), output.spans


@functools.lru_cache(16)
def variables(source: str) -> frozenset[str]:
    """Names of the variables that a template reads and does not set itself."""
    with bounded(None):  # jinja2 evaluates constant expressions when it parses
        return frozenset(find_undeclared_variables(_environment().parse(_short(source))))


def check_syntax(source: str) -> None:
    """Raises ValueError, with the line, for a template that is not valid."""
    try:
        variables(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None
    except SecurityError as error:
        raise ValueError(str(error)) from None


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
    environment.globals = {name: value for name, value in environment.globals.items() if name not in ABSENT} | GLOBALS
    return environment

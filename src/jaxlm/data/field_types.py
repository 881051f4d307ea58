"""Checks the fields of a configuration given in Python, which the command line checks by itself."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin


class Checked:
    """A frozen dataclass whose fields have the types of their annotations.

    A str becomes a Path, and a list, or a single item, a tuple where the annotation says so, as on the command line.

    Raises:
        TypeError: There is no such field. The message proposes one.
        ValueError: A field has another type, or is none of the choices. The message proposes a value.
    """

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        for name in fields:
            if name not in _type_hints(cls):
                raise TypeError(_unknown_field(cls, name))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _type_hints(type(self))
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _converted(f"{type(self).__name__}.{f.name}", hints[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)


def _unknown_field(cls: type, name: str) -> str:
    """Returns the message for a field that a dataclass does not have. A field of one of its groups is proposed too."""
    hints = _type_hints(cls)
    groups = {group: kind for group, kind in hints.items() if dataclasses.is_dataclass(kind)}
    ways = {field: f"{group} ({field}=…)" for group, kind in groups.items() for field in _type_hints(kind)}
    ways |= {field: field for field in hints}
    near = [ways[field] for field in difflib.get_close_matches(name, ways, 1)]
    hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(hints)}"
    return f"{cls.__name__} has no field {name!r}: {hint}"


@cache
def _type_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _converted(name: str, hint: Any, value: Any) -> Any:
    """Returns a value in the type of its annotation. Raises ValueError if it has another type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _choice(name, args, value)
    if origin in (Union, types.UnionType):  # of a type and None
        [kind] = [one for one in args if one is not type(None)]
        return None if value is None else _converted(name, kind, value)
    if origin is tuple:
        items = value if isinstance(value, tuple | list) else [value]
        return tuple(_converted(name, args[0], item) for item in items)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, bool):
        if hint is int and isinstance(value, Integral):
            return int(value)
        if hint is float and isinstance(value, Real):
            return float(value)
    if origin is Mapping and isinstance(value, Mapping):
        return value
    if type(value) is hint or (dataclasses.is_dataclass(hint) and isinstance(value, hint)):
        return value
    kind = _KINDS.get(hint, f"a {(origin or hint).__name__}")
    raise ValueError(f"{name} is {value!r}, which is not {kind}{_proposal(hint, value)}")


_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "True or False", Path: "a path"}


def _choice(name: str, choices: tuple[str, ...], value: Any) -> Any:
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, 1)
    known = f"one of {', '.join(map(repr, choices))}"
    hint = f"did you mean {near[0]!r}? It must be {known}" if near else f"it must be {known}"
    raise ValueError(f"{name} is {value!r}: {hint}")


def _proposal(hint: Any, value: Any) -> str:
    """Returns what was probably meant, for the end of a message."""
    if hint is bool and str(value).lower() in ("true", "false", "1", "0", "yes", "no"):
        return f": write {str(value).lower() in ('true', '1', 'yes')}"
    if hint is str and isinstance(value, int | float):
        return f": write {str(value)!r}"
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return f": write {hint.__name__}({', '.join(f'{key}={item!r}' for key, item in value.items())})"
        return f": write {hint.__name__}(...)"
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            return ""
        if not math.isfinite(number):
            return ""
        if hint is float or number.is_integer():
            return f": write {hint(number)}"
        return f": write {round(number)}"
    return ""

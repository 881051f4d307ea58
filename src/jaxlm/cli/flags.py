"""Reads the flags of a command from the fields of its dataclass, as tyro does."""

import dataclasses
import inspect
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument."""

    name: str
    """`--max-tokens`, `--optimizer.lr`; the metavar of a positional argument."""
    aliases: tuple[str, ...]
    """Other names, such as `-m`."""
    types: tuple[Any, ...]
    """Types of its values; none for a switch, two for a mapping."""
    repeats: bool
    """Whether it takes a list or a mapping, and may be repeated."""
    positional: bool
    metavar: str
    default: Any
    owner: type
    """The dataclass of the field: the command or a nested dataclass."""
    field: str
    """Name of the field."""

    @property
    def group(self) -> str:
        """`optimizer` for --optimizer.lr; empty for others."""
        return "" if self.positional else self.name.removeprefix("--").rpartition(".")[0]

    def negated(self, prefix: str = "no-") -> str:
        """`--no-resume`, `--lora.no-rslora`: the name that turns a switch off."""
        group, dot, name = self.name.removeprefix("--").rpartition(".")
        return f"--{group}{dot}{prefix}{name}"


def flags_of(command: type, prefix: str = "", defaults: Any = None) -> list[Flag]:
    """All flags of a command in the order of its fields. Nested dataclasses become dotted names.

    Args:
        command: A dataclass.
        prefix: Prefix of the names, for a nested dataclass.
        defaults: An instance with the default values, for a nested dataclass.
    """
    hints = get_type_hints(command, include_extras=True)
    flags = []
    for field in dataclasses.fields(command):
        default = getattr(defaults, field.name) if defaults is not None else default_of(field)
        base, metadata = unwrap(hints[field.name])
        if dataclasses.is_dataclass(base):
            assert isinstance(base, type)
            flags += flags_of(base, f"{prefix}{field.name}.", default)
            continue
        repeats = get_origin(base) in (tuple, dict)
        values = tuple(t for t in get_args(base) if t is not ...) if repeats else (base,)
        positional = tyro.conf.Positional in metadata
        metavar = next((m.metavar for m in metadata if getattr(m, "metavar", None)), None)
        metavar = metavar or ("" if base is bool else " ".join(map(metavar_of, values)))
        aliases = tuple(alias for m in metadata for alias in getattr(m, "aliases", None) or ())
        name = metavar if positional else f"--{prefix}{field.name}".replace("_", "-")
        types = () if base is bool else values
        flags.append(Flag(name, aliases, types, repeats, positional, metavar, default, command, field.name))
    return flags


def default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without Annotated and without None, and the metadata of Annotated."""
    metadata: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        metadata = tuple(rest)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(t for t in get_args(hint) if t is not type(None))
    return hint, metadata


def metavar_of(value: Any) -> str:
    """`INT`, or the choices of a Literal."""
    if get_origin(value) is Literal:
        return "{" + ",".join(map(str, get_args(value))) + "}"
    return METAVARS[value]


def defining_classes(owner: type, field: str) -> list[type]:
    """The classes that declare a field, the most derived one first."""
    return [cls for cls in owner.__mro__ if field in inspect.get_annotations(cls)]

"""The pickle in a torch.save file, read as a description of tensors and never executed.

A pickle is a program from an untrusted source. Here a stack machine interprets only the opcodes and names that
torch.save writes for a dict of tensors, and refuses any other.
"""

import io
import pickletools
import struct
from typing import Any, NamedTuple

from jaxlm.checkpoint.safetensors import DTYPES

DEPTH = 10_000  # values on the stack; torch.save leaves 2,000 at most
STORAGES = {"torch FloatStorage": "F32", "torch BFloat16Storage": "BF16", "torch HalfStorage": "F16"}
TENSOR, PARAMETER, ORDERED = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)
_CONSTANTS = {"EMPTY_TUPLE": (), "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = "PROTO EMPTY_DICT MARK TUPLE GLOBAL BINPERSID REDUCE SETITEM SETITEMS BUILD STOP BINPUT LONG_BINPUT BINGET"
_ADMITTED = {*_CONSTANTS, *_LITERALS, *_TUPLES, *_OTHERS.split(), "LONG_BINGET"}
_OPCODES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
# The argument, or its length.
_NUMBERS = {"PROTO": "<B", "BINPUT": "<B", "LONG_BINPUT": "<I", "BINGET": "<B", "LONG_BINGET": "<I", "BININT": "<i",
            "BININT1": "<B", "BININT2": "<H", "LONG1": "<B", "BINUNICODE": "<I"}  # fmt: skip
_MARK = object()


class _Name(NamedTuple):
    """The name of a class or function in the pickle. It is never imported."""

    text: str


class Storage(NamedTuple):
    """A block of elements of one type: its number among the file's, and its length in elements."""

    dtype: str
    number: str
    length: int


class View(NamedTuple):
    """A tensor as the pickle describes it. Its numbers are unchecked integers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_table(data: bytes) -> dict[str, View]:
    """The dict of tensors that a pickle describes; ValueError at the first opcode that describes anything else."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    stream = io.BytesIO(data)
    while len(stack) <= DEPTH:
        name, arg = _next(stream)
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(arg)
        elif name == "GLOBAL":
            stack.append(_named(arg))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple(_pop(stack, _TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = _pop(stack)[0]
            stack.append(memo[arg])
        elif name in ("BINGET", "LONG_BINGET"):
            if arg not in memo:
                raise ValueError("data.pkl refers to a value that is not in its memo")
            stack.append(memo[arg])
        elif name == "BINPERSID":
            stack.append(_storage(_pop(stack)[0]))
        elif name == "REDUCE":
            stack.append(_call(*_pop(stack, 2)))
        elif name == "STOP":
            return _table(_pop(stack)[0])
        elif name != "PROTO":
            _fill(stack, name)
    raise ValueError(f"data.pkl puts more than {DEPTH:,} values on the stack")


def _next(stream: io.BytesIO) -> tuple[str, Any]:
    """An opcode's name and argument. Opcodes that are not admitted are refused before their argument is read."""
    code = _take(stream, 1)
    name = _OPCODES.get(code, repr(code))
    if name not in _ADMITTED:
        raise ValueError(f"data.pkl has {name}, which no table of tensors needs")
    arg = _argument(stream, name)
    if name == "PROTO" and arg != 2:
        raise ValueError(f"data.pkl has pickle protocol {arg}, torch.save writes 2")
    return name, arg


def _argument(stream: io.BytesIO, name: str) -> Any:
    if name == "GLOBAL":
        lines = [stream.readline() for _ in range(2)]
        return " ".join(line.decode("ascii", "replace").removesuffix("\n") for line in lines)
    if name not in _NUMBERS:
        return None
    (number,) = struct.unpack(_NUMBERS[name], _take(stream, struct.calcsize(_NUMBERS[name])))
    if name == "BINUNICODE":
        return _take(stream, number).decode("utf-8", "replace")
    return int.from_bytes(_take(stream, number), "little", signed=True) if name == "LONG1" else number


def _take(stream: io.BytesIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("data.pkl is truncated")
    return data


def _named(text: str) -> _Name:
    if text not in (TENSOR, PARAMETER, ORDERED, *STORAGES):
        kinds = f" (tensors must be {', '.join(DTYPES)})" if text.endswith("Storage") else ""
        raise ValueError(f"data.pkl names {text.replace(' ', '.')[:80]!r}, which no table of tensors needs{kinds}")
    return _Name(text)


def _pop(stack: list[Any], count: int = 1) -> list[Any]:
    if len(stack) < count or any(value is _MARK for value in stack[-count:]):
        raise ValueError("data.pkl pops values that are not on the stack")
    values = stack[-count:]
    del stack[-count:]
    return values


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    values = []
    while stack and stack[-1] is not _MARK:
        values.append(stack.pop())
    if not stack:
        raise ValueError("data.pkl pops values that are not on the stack")
    stack.pop()
    return values[::-1]


def _fill(stack: list[Any], name: str) -> None:
    """SETITEM, SETITEMS, and BUILD, which adds the metadata of a state_dict; it is dropped."""
    values = _pop_to_mark(stack) if name == "SETITEMS" else _pop(stack, 2 if name == "SETITEM" else 1)
    [target] = _pop(stack)
    if type(target) is not dict:
        raise ValueError("data.pkl sets items of something that is not a dict")
    stack.append(target)
    if name == "BUILD":
        return
    keys = values[::2]
    named = all(type(key) is str and key not in target for key in keys)
    if len(values) % 2 or not named or len(set(keys)) < len(keys):
        raise ValueError("data.pkl has a dict whose keys are not distinct names")
    target.update(zip(keys, values[1::2]))


def _storage(key: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, number, device, elements)."""
    known = type(key) is tuple and [type(x) for x in key] == [str, _Name, str, str, int]
    if not known or key[0] != "storage" or key[1].text not in STORAGES:
        raise ValueError("data.pkl has a persistent id that is not a storage")
    return Storage(STORAGES[key[1].text], key[2], key[4])


def _call(function: Any, args: Any) -> Any:
    """The description of what a function of torch would return: a View, or an empty dict."""
    if type(function) is _Name and type(args) is tuple:
        kinds = [type(x) for x in args]
        if function.text == ORDERED and not args:
            return {}
        if function.text == PARAMETER and kinds == [View, bool, dict]:
            return args[0]
        if function.text == TENSOR and kinds == [Storage, int, tuple, tuple, bool, dict]:
            return View(*args[:4])
    raise ValueError("data.pkl calls a function in another way than torch.save does")


def _table(value: Any) -> dict[str, View]:
    if type(value) is not dict:
        raise ValueError(f"data.pkl holds a {type(value).__name__.strip('_')} instead of a dict of tensors")
    if others := [name for name, view in value.items() if type(view) is not View]:
        raise ValueError(f"{others[0][:80]!r} is not a tensor")
    return value

"""The GGUF format (llama.cpp), versions 2 and 3: metadata, and the location of every tensor.

The header is read through a memory map and checked before a byte of a tensor is read. Tensors are read like those of
other formats, not through the map: mapped pages would count as resident memory in addition to the weights.
Source: docs/gguf.md in ggml-org/ggml.
"""

import itertools
import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.checkpoint.gguf_types import BY_NAME, TYPES, dequantize
from jaxlm.checkpoint.safetensors import Tensor, aligned, listed, quoted, read_into

HEADER = 200_000_000  # bytes; those of a vocabulary of 262,144 tokens take 8 million
ITEMS = 4_000_000  # strings and nested arrays, which take more memory than in the file
ENTRIES = 200_000  # keys, and tensors
DEPTH = 4  # levels of nested arrays
AXES = 4  # of a tensor, as in ggml
ALIGNMENT = 32  # bytes, without general.alignment
# Types of metadata, by number.
_NUMBERS = dict(enumerate("BbHhIif", 0)) | {10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Gguf(NamedTuple):
    """The contents of a GGUF file, or of all files of a split model.

    Attributes:
        path: the file; of a split model, the first one.
        metadata: value by key. Arrays of numbers are numpy arrays, other arrays are lists.
        tensors: tensor by name, with axes in numpy's order. `dtype` is the name of a type in gguf_types.TYPES.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path) -> Gguf:
    """Reads the headers of a GGUF file, or of all files of the split model that it belongs to.

    Raises:
        ValueError: a file is damaged, or the files do not belong together.
        FileNotFoundError: a file of a split model is missing.
    """
    paths = parts(path)
    files = [read_header(part) for part in paths]
    tensors: dict[str, Tensor] = {}
    for number, file in enumerate(files):
        count, index = (integer(file.metadata, key, 0) for key in ("split.count", "split.no"))
        if (count, index) != (len(paths), number) and max(count, len(paths)) > 1:
            raise ValueError(
                f"{file.path} says that it is part {index} (from 0) of {count} of a split model, unlike its name: "
                "name the parts MODEL-00001-of-00003.gguf and so on"
            )
        if twice := [name for name in file.tensors if name in tensors]:
            raise ValueError(f"{file.path} repeats {listed(twice)} of another part: download all parts again")
        tensors |= file.tensors
    metadata = files[0].metadata
    if (total := integer(metadata, "split.tensors.count", len(tensors))) != len(tensors):
        raise ValueError(f"{paths[0]} and its other parts hold {len(tensors)} tensors instead of {total}: "
                         "download all parts again")  # fmt: skip
    return Gguf(paths[0], metadata, tensors)


def integer(metadata: Mapping[str, Any], key: str, default: int) -> int:
    """A value that is an integer; the default if it is absent or of another type."""
    value = metadata.get(key)
    return value if type(value) is int else default


def eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of the tokens that end a text, a turn or a message."""
    ids = (integer(metadata, f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot", "eom"))
    return sorted({token_id for token_id in ids if token_id >= 0})


def parts(path: Path) -> list[Path]:
    """All files of the model that a file belongs to. FileNotFoundError if one is missing."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {listed(missing)} of {len(paths)} parts: download them")
    return paths


def part_names(name: str) -> list[str]:
    """The names of all files of the model that a file of this name belongs to, in order."""
    match = _PART.fullmatch(name)
    if match is None or int(match[3]) == 0:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]


def read_header(path: Path) -> Gguf:
    """The metadata and tensors of one file. Every length and offset is checked."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(8)
        _check_magic(path, first)
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _Header(data, size).read(path)
        except _Corrupt as error:
            raise ValueError(f"{path} is truncated or corrupt ({error}): download it again") from None
    return Gguf(path, metadata, tensors)


def _check_magic(path: Path, first: bytes) -> None:
    if first == b"version ":
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if first[:4] != b"GGUF" or len(first) < 8:
        raise ValueError(f"{path} is not a GGUF file, or is truncated: it begins with {first[:4]!r}")
    (version,) = struct.unpack("<I", first[4:])
    if version & 0xFFFF == 0:
        raise ValueError(f"{path} is big-endian; jaxlm reads little-endian GGUF only: convert it")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; jaxlm reads 2 and 3: convert it with a newer llama.cpp")


class _Corrupt(Exception):
    """What is wrong with a file."""


class _Header:
    """Reads the header from the beginning of a file. `at` is the next byte."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.at, self.items = data, size, 8, 0

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        num_tensors, num_keys = self.numbers("QQ")
        if max(num_tensors, num_keys) > ENTRIES:
            raise _Corrupt(f"{num_tensors:,} tensors and {num_keys:,} keys, more than {ENTRIES:,}")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("a key of the metadata")
            if key in metadata:
                raise _Corrupt(f"it has the key {quoted(key)} twice")
            (kind,) = self.numbers("I")
            metadata[key] = self.value(kind, key)
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Corrupt("general.alignment is not a power of two")
        start = -(-self.at // alignment) * alignment
        return metadata, _located(entries, path, start, self.size, alignment)

    def take(self, nbytes: int) -> int:
        """Where the next bytes begin. They are skipped."""
        if nbytes > min(self.size, HEADER) - self.at:
            what = f"its header exceeds {HEADER:,} bytes" if self.size > HEADER else "the file ends within its header"
            raise _Corrupt(what)
        self.at += nbytes
        return self.at - nbytes

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Numbers of the types of the module struct."""
        layout = struct.Struct("<" + kinds)
        return layout.unpack_from(self.data, self.take(layout.size))

    def string(self, what: str) -> str:
        (length,) = self.numbers("Q")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError:
            raise _Corrupt(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A value of the metadata."""
        if kind in _NUMBERS:
            (number,) = self.numbers(_NUMBERS[kind])
            return float(str(np.float32(number))) if kind == 6 else number  # 1e-6 as in config.json
        if kind == _BOOL:
            return self.numbers("B") != (0,)
        if kind == _STRING:
            return self.string(quoted(key))
        if kind != _ARRAY:
            raise _Corrupt(f"{quoted(key)} has the unknown type {kind}")
        kind, count = self.numbers("IQ")
        if kind in _NUMBERS or kind == _BOOL:
            dtype = np.dtype(_NUMBERS.get(kind, "?")).newbyteorder("<")
            begin = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[begin : self.at], dtype)
        self.items += count
        if depth == DEPTH or self.items > ITEMS:
            limit = f"more than {DEPTH} levels" if depth == DEPTH else f"more than {ITEMS:,} strings"
            raise _Corrupt(f"{quoted(key)} has {limit}")
        return self.strings(count, key) if kind == _STRING else [self.value(kind, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> list[str]:
        """The strings of an array. A vocabulary has half a million: this is `string` without its calls."""
        found, data, at, end = [], self.data, self.at, min(self.size, HEADER)
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                begin = at + 8
                (length,) = unpack(data, at)
                at = begin + length
                if at > end:
                    raise struct.error
                found.append(data[begin:at].decode())
        except struct.error:
            self.take(HEADER + 1)
        except UnicodeDecodeError:
            raise _Corrupt(f"an item of {quoted(key)} is not UTF-8") from None
        self.at = at
        return found

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor: name, shape, number of its type, and offset in the data."""
        name = self.string("the name of a tensor")
        (axes,) = self.numbers("I")
        if axes > AXES:
            raise _Corrupt(f"{quoted(name)} has {axes:,} axes, more than {AXES}")
        shape = self.numbers("Q" * axes)[::-1]
        return name, shape, *self.numbers("IQ")


def _located(
    entries: Iterable[tuple[str, tuple[int, ...], int, int]], path: Path, start: int, size: int, alignment: int
) -> dict[str, Tensor]:
    """Tensors by name. They are inside the file and do not overlap."""
    tensors: dict[str, Tensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise _Corrupt(f"it has the tensor {quoted(name)} twice")
        if (block := TYPES.get(number)) is None:
            raise _Corrupt(f"{quoted(name)} has the unknown type {number}")
        if (shape or (1,))[-1] % block.elements:
            raise _Corrupt(f"rows of {quoted(name)} are not whole blocks of {block.name}: shape {list(shape)}")
        nbytes = math.prod(shape) // block.elements * block.nbytes
        if offset % alignment or start + offset + nbytes > size:
            raise _Corrupt(f"{quoted(name)} of type {block.name} and shape {list(shape)} cannot begin at {offset:,}")
        tensors[name] = Tensor(name, path, block.name, shape, start + offset, nbytes)
    places = sorted((t.offset, t.nbytes, t.name) for t in tensors.values() if t.nbytes)
    for (begin, nbytes, name), (following, _, other) in itertools.pairwise(places):
        if begin + nbytes > following:
            raise _Corrupt(f"{quoted(name)} and {quoted(other)} overlap")
    return tensors


def read_values(tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int], width: int) -> np.ndarray:
    """Reads a block of a tensor with an `encoding`. A row is stored as blocks of elements, which are read whole.

    Args:
        tensor: the tensor, seen as a matrix.
        rows, columns: first index and number.
        width: number of columns of the tensor.

    Returns:
        [rows,columns] float32.
    """
    block, (row, height), (column, wanted) = BY_NAME[tensor.encoding], rows, columns
    first, end = column // block.elements, -(-(column + wanted) // block.elements)
    step = width // block.elements * block.nbytes
    raw = aligned(height * (end - first) * block.nbytes).reshape(height, -1)
    runs = raw.reshape(1, -1) if raw.shape[1] == step else raw
    read_into(runs, tensor, row * step + first * block.nbytes, step)
    values = dequantize(tensor.encoding, raw)[:, column - first * block.elements :][:, :wanted]
    return values + np.float32(tensor.shift) if tensor.shift else values

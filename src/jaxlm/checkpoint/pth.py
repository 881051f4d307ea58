"""Reads torch.save's files (.pth) of named tensors without torch.

Such a file is a zip of uncompressed entries: data.pkl, a pickle that describes the tensors (torch_pickle.py), and
data/N, the bytes of storage N.
"""

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxlm.checkpoint.safetensors import DTYPES, Tensor
from jaxlm.checkpoint.torch_pickle import View, read_table

LIMIT = 1 << 20  # bytes of data.pkl and of the zip's table; those of a 405B model take a third of it


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Everything but their bytes is checked, and nothing in the file is executed.

    Raises:
        ValueError: the file is damaged, or holds anything but a dict of float32, bfloat16 and float16 tensors.
    """
    size = path.stat().st_size
    try:
        with _Zip(path) as file:
            entries = _entries(file, size)
            tables = [name for name in entries if name.endswith("/data.pkl")]
            if len(tables) != 1:
                raise ValueError(f"it holds {len(tables)} data.pkl instead of 1")
            folder = tables[0].removesuffix("data.pkl")
            if (order := _content(file, entries, f"{folder}byteorder")) not in (None, b"little"):
                raise ValueError(f"its byte order is {order[:10]!r}; only little is supported")
            table = read_table(_content(file, entries, tables[0]) or b"")
        tensors = {
            name: _tensor(path, name, view, entries.get(f"{folder}data/{view.storage.number}"))
            for name, view in table.items()
        }
        _refuse_overlaps(tensors.values())
    # zipfile raises NotImplementedError for a compression that it lacks.
    except (ValueError, zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); nothing in it was executed. {_hint(path)}") from None
    return tensors


def _hint(path: Path) -> str:
    with open(path, "rb") as file:
        first = file.read(8)
    if first == b"version ":
        return "It is a git-lfs pointer, not the weights: run `git lfs pull`"
    if first[:2] == b"\x80\x02":
        return "It has the format of PyTorch before 1.6, without a zip: torch.load and torch.save it in a newer version"
    return "If you trust its source, download it again, or use the model as safetensors"


class _Zip(io.FileIO):
    """A file with bounded reads: zipfile trusts the length of the table that the file states."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LIMIT:
            raise ValueError(f"the zip's table has {size:,} bytes, more than {LIMIT:,}")
        return super().read(-1 if size is None else size)


class _Entry(NamedTuple):
    """First byte and length of an entry's data."""

    offset: int
    nbytes: int


def _entries(file: _Zip, size: int) -> dict[str, _Entry]:
    """The location of each entry of the zip, checked: uncompressed, inside the file, no two overlapping."""
    entries, at = {}, 0
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    for info in infos:
        name = repr(info.filename[:80])
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted, which torch.save never does")
        if info.header_offset < at:
            raise ValueError(f"{name} overlaps another entry")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"{name} is not where the zip's table says")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        at = begin + info.file_size
        if at > size or info.compress_size != info.file_size:
            raise ValueError(f"{name} has {info.file_size:,} bytes, but the file ends before them")
        if info.filename in entries:
            raise ValueError(f"{name} is in it twice")
        entries[info.filename] = _Entry(begin, info.file_size)
    return entries


def _content(file: _Zip, entries: Mapping[str, _Entry], name: str) -> bytes | None:
    """A small entry's bytes, None if there is no such entry."""
    if name not in entries:
        return None
    file.seek(entries[name].offset)
    return file.read(entries[name].nbytes)


def _tensor(path: Path, name: str, view: View, place: _Entry | None) -> Tensor:
    """The tensor that a view describes, checked to be contiguous and inside its storage."""
    (dtype, number, length), offset, shape, strides = view
    width, label = DTYPES[dtype].itemsize, name[:80]
    if place is None:
        raise ValueError(f"it has no data/{number[:20]}, the storage of {label!r}")
    if length * width != place.nbytes:
        raise ValueError(f"data/{number[:20]} has {place.nbytes:,} bytes, not {length:,} elements of type {dtype}")
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise ValueError(f"the shape of {label!r} is invalid")
    count = math.prod(shape)
    packed = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if len(strides) != len(shape) or (count and any(n > 1 and s != p for n, s, p in zip(shape, strides, packed))):
        raise ValueError(f"{label!r} is not contiguous: save it from tensor.contiguous()")
    if offset + count > length:
        raise ValueError(f"{label!r} of shape {list(shape)[:9]} does not fit into data/{number[:20]}")
    return Tensor(name, path, dtype, shape, place.offset + offset * width, count * width)


def _refuse_overlaps(tensors: Iterable[Tensor]) -> None:
    """Two tensors may share all of their bytes (a tied head) or none."""
    places = sorted({(t.offset, t.nbytes): t for t in tensors if t.nbytes}.items())
    for ((a, nbytes), first), ((b, _), second) in itertools.pairwise(places):
        if a + nbytes > b:
            raise ValueError(f"{first.name[:80]!r} and {second.name[:80]!r} share a part of their bytes")

"""Writes files in the format of torch.save (.pth) without torch. Meta's original checkpoints are such files.

A .pth file is a zip of uncompressed entries: data.pkl, a pickle that describes the tensors, and data/N, the bytes of
storage N.
"""

import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.safetensors import DTYPES
from jaxlm.checkpoint.torch_pickle import ORDERED, STORAGES, TENSOR

ALIGNMENT = 64  # bytes


def write_pth(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]]) -> None:
    """Writes tensors, each (name, "F32" "BF16" or "F16", shape, chunks of its bytes).

    The table is written last, so that no tensor is held in memory. torch.load opens the file, also with weights_only
    and mmap.
    """
    written: list[tuple[str, str, tuple[int, ...]]] = []
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, dtype, shape, chunks in tensors:
            _add(archive, file, f"data/{len(written)}", chunks, math.prod(shape) * DTYPES[dtype].itemsize)
            written.append((name, dtype, tuple(shape)))
        if len({name for name, _, _ in written}) < len(written):
            raise ValueError(f"{path}: two tensors have the same name")
        for entry, data in (("data.pkl", write_table(written)), ("byteorder", b"little"), ("version", b"3\n")):
            _add(archive, file, entry, [data], len(data))


def _add(archive: zipfile.ZipFile, file: Any, name: str, chunks: Iterable[Any], nbytes: int) -> None:
    """One entry whose data begins at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = nbytes
    long = nbytes > 1 << 30  # zipfile must know before the data; the header then has 20 bytes more
    padding = -(file.tell() + 30 + len(info.filename) + 4 + 20 * long) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=long) as out:
        written = sum(out.write(chunk) for chunk in chunks)
    if written != nbytes:
        raise ValueError(f"{archive.filename}: {name} got {written:,} of {nbytes:,} bytes")


def write_table(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The pickle of a dict of contiguous tensors (name, type, shape): the first in storage 0, and so on."""
    rows = (_text(name) + _tensor(str(i), dtype, shape) + b"s" for i, (name, dtype, shape) in enumerate(tensors))
    return b"\x80\x02}" + b"".join(rows) + b"."  # PROTO 2, EMPTY_DICT, a SETITEM per tensor, STOP


def _tensor(key: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """The opcodes that build a contiguous tensor from one storage."""
    kind = next(name for name, ours in STORAGES.items() if ours == dtype)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = b"(" + _text("storage") + _global(kind) + _text(key) + _text("cpu") + _number(math.prod(shape)) + b"tQ"
    hooks = _global(ORDERED) + b")R"
    return _global(TENSOR) + b"(" + storage + b"K\0" + _numbers(shape) + _numbers(strides) + b"\x89" + hooks + b"tR"


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    """BININT, or LONG1 from 2**31 on."""
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"

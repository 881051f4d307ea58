"""The safetensors format and a checkpoint folder's index: the location of every tensor, and its bytes.

The whole header is checked before a byte of a tensor is read. Files are read, not memory-mapped: mapped pages would
count as resident memory in addition to the weights.
"""

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.checkpoint.errors import explain_errors

FILES = ("model.safetensors", "model.safetensors.index.json")
SLICE = 8 << 20  # bytes read at a time
HUGE_PAGE = 2 << 20  # bytes
HEADER = 100_000_000  # bytes: the format's limit
NAME = 100  # characters of a name in a message
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# Bits per element of every type of the format (safetensors 0.8).
BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
        "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # fmt: skip


class Tensor(NamedTuple):
    """Location of a tensor: name, file, type as the file names it, shape, first byte and length.

    Of a tensor in a GGUF file that is not stored as numbers of a type in DTYPES, `dtype` is the type that it is loaded
    in, and `encoding` the type in the file (gguf_types.py). `shift` is added to its elements.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    encoding: str = ""
    shift: float = 0.0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    with _named(path):
        data = path.read_bytes()
    with explain_errors(f"{path} is not valid JSON", "download it again", (ValueError, RecursionError)):
        value = _parse(data)
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}: download it again")
    return value


def _parse(data: bytes) -> Any:
    """Strict JSON: ValueError for what Python's parser accepts beyond the standard (NaN, duplicate keys)."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            [(name, _)] = Counter(name for name, _ in items).most_common(1)
            raise ValueError(f"duplicate key {quoted(name)}")
        return table

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON value")

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file to an OSError: the error of a failed read does not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Every length and offset is checked; together they must fill the file."""

    def broken(why: str) -> ValueError:
        return ValueError(f"{path} is truncated or corrupt ({why}): download it again")

    with open(path, "rb") as file, _named(path):
        size, first = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
        if size < 8 or length > min(size - 8, HEADER):
            raise broken(f"its header should have {length:,} bytes, the file has {size:,}" if first else "it is empty")
        data = file.read(length)
    damaged = f"{path} is truncated or corrupt: its header is not JSON"
    with explain_errors(damaged, "download it again", (ValueError, RecursionError)):
        header = _parse(data)
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        kind, shape, begin, end = _entry(entry, size) or (None, (), 0, 0)
        if kind is None:
            raise broken(f"the entry of {quoted(name)} is invalid")
        if kind not in BITS:
            what = f"{path}: tensor {quoted(name)} has type {quoted(kind)}"
            raise ValueError(f"{what}, which jaxlm cannot read: convert it to BF16")
        if (end - begin) * 8 != math.prod(shape) * BITS[kind]:
            raise broken(f"{quoted(name)} of type {kind} and shape {list(shape)} cannot have {end - begin:,} bytes")
        tensors[name] = Tensor(name, path, kind, shape, 8 + length + begin, end - begin)
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise broken(f"{quoted(tensor.name)} begins at byte {tensor.offset:,} instead of {at:,}")
        at += tensor.nbytes
    if at != size:
        raise broken(f"its tensors end at byte {at:,}, the file at {size:,}")
    return tensors


def _entry(entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int] | None:
    """Type, shape, begin and end of a tensor from its entry in a header, or None if the entry is invalid."""
    if not isinstance(entry, dict):
        return None
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return None
    # An element has at least 4 bits, which bounds the axes. 64 axes are numpy's limit.
    if len(shape) > 64 or not all(type(n) is int and 0 <= n <= 2 * size for n in (*shape, *offsets)):
        return None
    return kind, tuple(shape), *offsets


def read_index(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder: model.safetensors, or else the shards that its index names (the order of
    transformers)."""
    single, index = (folder / name for name in FILES)
    if single.exists():
        return read_header(single)
    if index.exists():
        return read_shards(folder, index, ".safetensors", read_header)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    holds = f" It has {', '.join(others[:5])}{', …' if others[5:] else ''}." if others else ""
    if any(name.endswith(".safetensors") for name in others):
        hint = "Download the index too, or rename a single file"
    else:
        hint = (
            "jaxlm reads safetensors (from_pretrained, then save_pretrained), pytorch_model.bin, GGUF and Meta's files"
        )
    raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}.{holds} {hint}.")


def read_shards(folder: Path, index: Path, suffix: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of the shards that an index names. Their names must have the suffix; `read` reads one."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{index} has no valid weight_map: download it again")
    shards = sorted(set(where.values()))
    for shard in shards:
        path = PurePosixPath(shard)
        if path.suffix != suffix or path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise ValueError(f"{index} names {quoted(shard)}, which is not a {suffix[1:]} file in the folder: refused")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {listed(missing)} of its {len(shards)} shards: download them again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        header = read(folder / shard)
        if twice := [name for name in header if name in tensors]:
            raise ValueError(f"{folder / shard} repeats {listed(twice)} of another shard: download both again")
        tensors |= header
    paths = {shard: folder / shard for shard in shards}
    absent = [name for name, shard in where.items() if name not in tensors or tensors[name].file != paths[shard]]
    if absent:
        raise ValueError(
            f"{index} names tensors that are not in the shards it says: {listed(absent)}. Index and shards are of "
            "different revisions: download both again"
        )
    return tensors


def listed(names: Collection[str], shown: int = 10) -> str:
    some = ", ".join(name[:NAME] for name in list(names)[:shown])
    return f"{len(names)} ({some}{', …' if len(names) > shown else ''})"


def quoted(name: str) -> str:
    """A name in quotes, cut to the length of a message."""
    return repr(name[:NAME] + "…" * (len(name) > NAME))


def chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, SLICE at a time, in a buffer that is reused."""
    buffer = aligned(min(SLICE, tensor.nbytes))
    for begin in range(0, tensor.nbytes, SLICE):
        part = buffer[: min(SLICE, tensor.nbytes - begin)]
        read_into(part, tensor, begin)
        yield part


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialized bytes on a 64-byte boundary: on CPU jax uses them as an array's memory without a copy.

    From HUGE_PAGE bytes on they begin at a huge page, and as many as fit are used: to touch fresh memory in small pages
    takes longer than to read into it. The rest has small pages, because a huge one would exceed the array.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.empty(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes]
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(pages, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    return raw[start : start + nbytes]


def read_into(buffer: np.ndarray, tensor: Tensor, begin: int, step: int = 0) -> None:
    """Fills a buffer with the bytes of a tensor from `begin` on. The rows of a 2-D buffer are `step` bytes apart in the
    file."""
    with open(tensor.file, "rb", buffering=0) as file, _named(tensor.file):
        for i, row in enumerate(np.atleast_2d(buffer)):
            file.seek(tensor.offset + begin + i * step)
            done = 0
            while done < row.nbytes:
                got = file.readinto(row.data[done:])
                if not got:
                    raise ValueError(
                        f"{tensor.file} ends within {tensor.name}: it has become shorter. Download it again"
                    )
                done += got

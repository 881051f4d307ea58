"""Hugging Face checkpoints: safetensors files read tensor by tensor straight into their final type and place.

Files are read, not memory-mapped: mapped pages would count as resident memory beside the weights made from them. On
CPU the buffer that is read into becomes the array itself. A few threads read and convert slices side by side: one
alone is held up by the first touch of fresh memory and by the conversion (twice as slow on two cores).
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm import params

SLICE = 8 << 20  # bytes read and converted at a time
READERS = 4
AHEAD = 64 << 20  # bytes that may be read ahead of the tensor that is being placed
PIECE = 64 << 20  # bytes sent to an accelerator at a time
HEADER = 100_000_000  # bytes: the format's limit
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Bits of an element of every type that the format has (safetensors 0.8).
BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
        "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # fmt: skip
# Buffers that some checkpoints carry and that follow from the config.
IGNORABLE = (".rotary_emb.inv_freq",)


class Tensor(NamedTuple):
    """Where a tensor lies: name, file, type as the file names it, shape, first byte and length."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    with _named(path):
        data = path.read_bytes()
    try:
        value = _parse(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}: download it again")
    return value


def _parse(data: bytes) -> Any:
    """Strict JSON: what Python's parser takes beyond the standard (NaN, a key twice) is a ValueError."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            names = [name for name, _ in items]
            raise ValueError(f"the key {next(n for n in table if names.count(n) > 1)!r} stands in it twice")
        return table

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON value")

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A read that fails says only why: adds the file to the OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Every length and offset is checked, and that they fill the file."""

    def broken(why: str) -> ValueError:
        return ValueError(f"{path} is truncated or corrupt ({why}): download it again")

    with open(path, "rb") as file, _named(path):
        size, first = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise ValueError(f"{path} is a pointer of git-lfs, not the weights themselves: run `git lfs pull`")
        if size < 8 or length > min(size - 8, HEADER):
            raise broken(f"its header should have {length:,} bytes, the file has {size:,}" if first else "it is empty")
        data = file.read(length)
    try:
        header = _parse(data)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise broken("its header is no table")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        kind, shape, begin, end = _entry(entry, size) or (None, (), 0, 0)
        if kind is None:
            raise broken(f"the entry of {name!r} makes no sense")
        if kind not in BITS:
            raise ValueError(f"{path}: tensor {name!r} has type {kind!r}, which jaxlm cannot read: convert it to BF16")
        if (end - begin) * 8 != math.prod(shape) * BITS[kind]:
            raise broken(f"{name!r} of type {kind} and shape {list(shape)} cannot have {end - begin:,} bytes")
        tensors[name] = Tensor(name, path, kind, shape, 8 + length + begin, end - begin)
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise broken(f"{tensor.name!r} begins at byte {tensor.offset:,} instead of {at:,}")
        at += tensor.nbytes
    if at != size:
        raise broken(f"its tensors end at byte {at:,}, the file at {size:,}")
    return tensors


def _entry(entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int] | None:
    """Type, shape, begin and end of a tensor from its entry in a header, or None where it makes no sense."""
    if not isinstance(entry, dict):
        return None
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return None
    # A longer axis, or more of them than numpy has, cannot lie in the file; the product stays small enough to compute.
    if len(shape) > 32 or not all(type(n) is int and 0 <= n <= size for n in (*shape, *offsets)):
        return None
    return kind, tuple(shape), *offsets


def read_index(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder: model.safetensors, or else the shards that its index names (the order of
    transformers)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return read_header(single)
    if index.exists():
        return _read_shards(folder, index)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    found = f" It has {', '.join(others[:5])}{', …' if others[5:] else ''}." if others else ""
    if any(name.endswith(".safetensors") for name in others):
        way_out = "download the index too, or rename a single file"
    else:
        way_out = "jaxlm reads safetensors only, which transformers' from_pretrained and then save_pretrained write"
    raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}.{found} Way out: {way_out}.")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{index} has no sound weight_map: download it again")
    shards = sorted(set(where.values()))
    for shard in shards:
        path = PurePosixPath(shard)
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise ValueError(f"{index} names {shard!r}, which is no safetensors file inside the folder: refused")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {_listed(missing)} of its {len(shards)} shards: download them again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        header = read_header(folder / shard)
        if twice := [name for name in header if name in tensors]:
            raise ValueError(f"{folder / shard} has {_listed(twice)} again from another shard: download both again")
        tensors |= header
    absent = [name for name, shard in where.items() if name not in tensors or tensors[name].file != folder / shard]
    if absent:
        raise ValueError(
            f"{index} names tensors that are not where it says: {_listed(absent)}. It and the shards are not of one "
            "revision: download both again"
        )
    return tensors


def _listed(names: Collection[str]) -> str:
    return f"{len(names)} ({', '.join(list(names)[:10])}{', …' if len(names) > 10 else ''})"


def match(
    table: params.Table, cfg: Any, tensors: Mapping[str, Tensor], unread: Collection[str] = ()
) -> tuple[list[tuple[params.Row, Tensor]], list[str]]:
    """Each row with its one tensor, and the names that are known but not read. All misfits are reported together."""
    left, pairs, faults = dict(tensors), [], []
    missing = []
    for row in params.rows(table, cfg):
        found = [name for name in row.names if name in left]
        if len(found) > 1:
            faults.append(f"{row.path} is there {len(found)} times: {', '.join(found)}")
        if not found:
            missing.append(row.names[0])
            continue
        tensor = left.pop(found[0])
        if tensor.shape != row.stored:
            faults.append(f"{found[0]} has shape {list(tensor.shape)}, expected {list(row.stored)}")
        elif tensor.dtype not in DTYPES:
            faults.append(f"{found[0]} has type {tensor.dtype}; jaxlm reads {', '.join(DTYPES)} (quantised checkpoints are not supported)")
        pairs.append((row, tensor))
    if cfg.tied:
        _check_tied_head(table, left, dict((row.path, tensor) for row, tensor in pairs), faults)
    passed = [n for n in left if n.startswith(tuple(unread)) or n.endswith(IGNORABLE)]
    unexpected = [n for n in left if n not in set(passed)]
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            faults.append(f"{len(names)} {what}: {', '.join(names[:10])}" + (", …" if len(names) > 10 else ""))
    if faults:
        raise ValueError("the checkpoint does not fit its config.json: " + "; ".join(faults[:20]))
    return pairs, passed


def _check_tied_head(
    table: params.Table, left: dict[str, Tensor], pairs: Mapping[str, Tensor], faults: list[str]
) -> None:
    """A head stored beside the embedding that it is tied to must be the same bytes: else it was trained apart."""
    for name in [n for n in table["head"][1:] if n in left]:
        head, embed = left.pop(name), pairs.get("embed")
        if embed is None:
            continue
        same = (head.dtype, head.shape) == (embed.dtype, embed.shape)
        if not same or any(a.tobytes() != b.tobytes() for a, b in zip(_chunks(head), _chunks(embed))):
            faults.append(f"{name} differs from the embedding although config.json ties them (tie_word_embeddings)")


def _chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, SLICE at a time, in a buffer that is used again."""
    buffer = aligned(min(SLICE, tensor.nbytes))
    with open(tensor.file, "rb", buffering=0) as file:
        for begin in range(0, tensor.nbytes, SLICE):
            part = buffer[: min(SLICE, tensor.nbytes - begin)]
            read_into(file.fileno(), part, tensor.offset + begin, tensor.file)
            yield part


def aligned(nbytes: int) -> np.ndarray:
    """Empty bytes on a 64-byte boundary, which jax takes as an array's memory without a copy on CPU."""
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def read_into(fd: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    done = 0
    while done < buffer.nbytes:
        got = os.preadv(fd, [memoryview(buffer)[done:]], offset + done)
        if not got:
            raise ValueError(f"{path} ends at byte {offset + done:,}, in the middle of a tensor: download it again")
        done += got


def read_tensor(tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, advance: Callable[[int], None]) -> np.ndarray:
    """A tensor in host memory, converted SLICE by SLICE where the type differs."""
    source = DTYPES[tensor.dtype]
    elements = tensor.nbytes // source.itemsize
    out = aligned(elements * dtype.itemsize)
    if source == dtype:
        with open(tensor.file, "rb", buffering=0) as file:
            for begin in range(0, tensor.nbytes, SLICE):
                part = out[begin : begin + SLICE]
                read_into(file.fileno(), part, tensor.offset + begin, tensor.file)
                advance(part.nbytes)
        return out.view(dtype).reshape(shape)
    flat, at = out.view(dtype), 0
    for part in _chunks(tensor):
        values = part.view(source)
        flat[at : at + values.size] = values.astype(dtype)
        at += values.size
        advance(part.nbytes)
    return flat.reshape(shape)


def place(value: np.ndarray, device: jax.Device) -> jax.Array:
    """Host memory to a device: no copy on CPU; slice by slice elsewhere, so that no second copy is staged."""
    if device.platform == "cpu" or value.nbytes <= 4 * SLICE:
        return jax.device_put(value, device)
    rows = max(1, SLICE * len(value) // value.nbytes)
    with jax.default_device(device):
        out = jnp.zeros(value.shape, value.dtype)
        for begin in range(0, len(value), rows):
            out = _fill(out, jax.device_put(value[begin : begin + rows], device), begin)
    return out


_fill = jax.jit(
    lambda out, part, begin: jax.lax.dynamic_update_slice_in_dim(out, part, begin, axis=0), donate_argnums=0
)


def load_weights(
    pairs: list[tuple[params.Row, Tensor]],
    kept: Callable[[np.dtype], np.dtype],
    device: jax.Device,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Any]:
    """Reads every tensor into its place, in the type that `kept` gives for the stored one. `advance` hears of bytes
    as they are read."""
    weights: dict[str, Any] = {}
    # In the order of the files: a slow disk is read from front to back.
    for row, tensor in sorted(pairs, key=lambda pair: (pair[1].file, pair[1].offset)):
        value = read_tensor(tensor, row.shape, kept(DTYPES[tensor.dtype]), advance)
        params.put(weights, row.path, place(value, device))
    return weights

"""Hugging Face checkpoints: safetensors files read tensor by tensor straight into their final type and place.

Files are read, not memory-mapped: mapped pages would count as resident memory beside the weights made from them. On
CPU the buffer that is read into becomes the array itself.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm import params

SLICE = 64 << 20  # bytes read, converted or sent at a time
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
         "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
# Buffers that some checkpoints carry and that follow from the config.
IGNORABLE = ("rotary_emb.inv_freq",)


class Tensor(NamedTuple):
    """Where a tensor lies: file, type as the file names it, shape, first byte and length."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Every length and offset is checked against the file's size."""
    size = path.stat().st_size

    def broken(why: str) -> ValueError:
        return ValueError(f"{path} is truncated or corrupt ({why}): download it again")

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise broken(f"its header should have {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise broken("its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken("its header is no table")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and isinstance(kind, str)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise broken(f"the entry of {name!r} makes no sense")
        if kind not in SIZES:
            raise ValueError(f"{path}: tensor {name!r} has type {kind!r}, which jaxlm cannot read")
        elements = 1
        for n in shape:
            elements *= n
        if end - begin != elements * SIZES[kind]:
            raise broken(f"{name!r} of shape {list(shape)} does not have {end - begin:,} bytes")
        if 8 + length + end > size:
            raise broken(f"{name!r} ends at byte {8 + length + end:,}, the file at {size:,}")
        tensors[name] = Tensor(path, kind, shape, 8 + length + begin, end - begin)
    return tensors


def read_index(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder: the shards that its index names, or model.safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _read_shards(folder, index)
    if single.exists():
        return read_header(single)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
    found = f" It has {', '.join(others[:5])}, but jaxlm reads safetensors only: convert it." if others else ""
    raise FileNotFoundError(f"{folder} holds no model.safetensors and no model.safetensors.index.json.{found}")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) and Path(v).name == v for v in where.values()):
        raise ValueError(f"{index} has no sound weight_map: download it again")
    shards = sorted(set(where.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:8])}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    absent = [name for name in where if name not in tensors]
    if absent:
        raise ValueError(f"{index} names {len(absent)} tensors that its shards lack: {', '.join(absent[:8])}")
    return tensors


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

"""Writing checkpoints: tensors slice by slice into safetensors files.

A tensor is an `Entry`: its row of the file's header, and a function that yields its bytes. Beside the arrays that are
written, no more than a slice is in memory.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.hf import pieces_of, read_block
from jaxlm.checkpoint.meta import ConcatTensor
from jaxlm.checkpoint.quantized_layout import AnyTensor
from jaxlm.checkpoint.safetensors import BITS, DTYPES, Tensor, chunks, listed

SLICE = 8 << 20  # bytes of an array at a time
SPREAD = 2 << 20  # the same for an array on several devices: each of them makes a wider copy
SHARD = 5 * 10**9  # maximum bytes of a file, unless one tensor is larger
KINDS: dict[np.dtype[Any], str] = {dtype: kind for kind, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to write: name, type as a file names it, shape, and a function that yields its bytes in chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]
    spread: bool = False  # over several processes: all of them must call `chunks`

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


class LazyRows(ABC):
    """What takes the place of an array that is written: rows of the leading axis are read when they are needed.

    Attributes:
        shape: The shape of the array.
        dtype: Its dtype.
        nbytes: Its bytes in host memory.
        spread: Whether it is sharded over several processes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    spread: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read_rows(self, begin: int, count: int) -> np.ndarray:
        """Rows of the leading axis [count,...]."""


class LazyTensor(LazyRows):
    """A tensor on disk in place of an array, in the model's shape and row order."""

    def __init__(self, tensor: AnyTensor, shape: tuple[int, ...]):
        self.tensor: AnyTensor = tensor
        self.shape: tuple[int, ...] = shape
        # What a file stores in another type than it is loaded in is rounded once, when it is written.
        parts = tensor.parts if isinstance(tensor, ConcatTensor) else (tensor,)
        self.dtype: np.dtype[Any] = DTYPES["F32" if any(part.encoding for part in parts) else tensor.dtype]
        self.nbytes: int = math.prod(shape) * self.dtype.itemsize

    def read_rows(self, begin: int, count: int) -> np.ndarray:
        """Rows of the leading axis [count,...]."""
        out = np.empty((count, *self.shape[1:]), self.dtype)
        each = math.prod(self.tensor.shape) // len(self)  # elements per row
        height = 1 if len(self.tensor.shape) == 1 else out.size // math.prod(self.tensor.shape[1:])
        row, column = (0, begin * each) if len(self.tensor.shape) == 1 else (begin * height // count, 0)
        for piece in pieces_of(self.tensor, out.reshape(height, -1), row, column):
            read_block(*piece)
        return out


def array_entry(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> Entry:
    """An array as a tensor of `shape` (axes joined as in a file). ValueError if float16 cannot hold its values."""
    entry = Entry(name, KINDS[dtype], shape, partial(array_bytes, name, value, dtype), is_spread(value))
    if dtype == np.float16 and value.dtype != dtype:
        for _ in entry.chunks():  # converts all of it once, to check it before anything is written
            pass
    return entry


def is_spread(value: Any) -> bool:
    """Whether an array is sharded over several processes."""
    if isinstance(value, LazyRows):
        return value.spread
    return isinstance(value, jax.Array) and not value.is_fully_addressable


def copied_entry(tensor: Tensor) -> Entry:
    """A tensor of another checkpoint, byte for byte."""
    return Entry(tensor.name, tensor.dtype, tensor.shape, partial(chunks, tensor))


def array_bytes(name: str, value: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The bytes of an array in a type, about SLICE at a time, in whole rows of the leading axis."""
    for part in row_slices(value):
        yield np.ascontiguousarray(converted(name, part, dtype)).reshape(-1).view(np.uint8)


def row_slices(value: Any) -> Iterator[np.ndarray]:
    """An array in slices of about SLICE bytes, in whole rows of the leading axis."""
    size = SPREAD if isinstance(value, jax.Array) and len(value.sharding.device_set) > 1 else SLICE
    rows = max(1, size * len(value) // value.nbytes)
    for begin in range(0, len(value), rows):
        yield _read_rows(value, begin, min(rows, len(value) - begin))


def _read_rows(value: Any, begin: int, count: int) -> np.ndarray:
    """Rows of an array in host memory: a view if the array is in host memory."""
    if isinstance(value, LazyRows):
        return value.read_rows(begin, count)
    # np.asarray of an array on other devices would copy all of it, and jax would cache the copy.
    if isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
        return gather_rows(value, begin, count)
    if isinstance(value, jax.Array) and next(iter(value.devices())).platform != "cpu":
        return np.asarray(_cut(value, begin, count))
    return np.asarray(value)[begin : begin + count]


_cut = jax.jit(lambda value, begin, count: jax.lax.dynamic_slice_in_dim(value, begin, count), static_argnums=2)


def converted(name: str, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in another type. ValueError if float16 cannot hold them."""
    if part.dtype == dtype:
        return part
    with np.errstate(all="ignore"):
        out = part.astype(dtype)
    if dtype == np.float16 and (np.isinf(out) & np.isfinite(part)).any():
        raise ValueError(
            f"{name} has values beyond float16's 65,504: choose another type (--dtype bfloat16, or --type bf16 in GGUF)"
        )
    return out


# Files


def in_files(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The tensors of each file, in the order in which they are written."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > SHARD:
            groups.append([])
        groups[-1].append(entry)
    # As the safetensors library sorts them: wide types first, because a reader may rely on alignment.
    return [sorted(group, key=lambda entry: (-BITS[entry.dtype], entry.name)) for group in groups]


def write_weights(folder: Path, entries: Sequence[Entry], advance: Callable[[int], None]) -> None:
    """Writes model.safetensors, or shards with an index, named as by transformers."""
    groups = in_files(entries)
    if len(groups) == 1:
        with open(folder / "model.safetensors", "wb") as whole:
            return write_safetensors(whole, groups[0], advance)
    where: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        with open(folder / file, "wb") as shard:
            write_safetensors(shard, group, advance)
        where |= dict.fromkeys((entry.name for entry in group), file)
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(file: IO[bytes], entries: Sequence[Entry], advance: Callable[[int], None]) -> None:
    """Writes the content of one file. `advance` is called with the number of bytes, as they are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    at = 0
    for entry in entries:
        offsets = [at, at + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        written = sum(file.write(part.data) for part in counted(entry.chunks(), advance))
        if written != entry.nbytes:  # the entry's shape is wrong; every later tensor would be displaced
            raise AssertionError(f"{entry.name} has {written} bytes instead of {entry.nbytes}")


def counted(parts: Iterable[np.ndarray], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for part in parts:
        yield part
        advance(part.nbytes)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Folders


def check_target(
    out: Path,
    sources: Iterable[Path],
    force: bool,
    configs: Collection[str] = ("config.json", "params.json"),
    what: str = "a checkpoint",
) -> None:
    """FileExistsError for a folder that must not be replaced.

    Args:
        out: the folder to write, with links resolved.
        sources: folders and files that are read while `out` is written, with links resolved.
        force: allow to replace a checkpoint: a folder with weights and one of `configs`. Nothing else is replaced.
        configs: names of config files.
        what: the kind of folder, for messages.
    """
    if any(out == path or out in path.parents for path in sources):
        raise FileExistsError(f"{out} holds the files that this model was loaded from: choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose a folder, or a name that ends in .gguf")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    weights = any(name.endswith((".safetensors", ".pth")) for name in names)
    if not (weights and set(configs) & set(names)):
        raise FileExistsError(f"{out} exists and is not {what}, it holds {listed(names)}: choose another folder")
    if not force:
        raise FileExistsError(f"{out} is {what} already: --force (force=True) replaces the whole folder")


def gather_rows(x: jax.Array, begin: int, count: int) -> np.ndarray:
    """Rows of the leading axis, in host memory, the same in every process. All processes must call it. No device and no
    process holds more of a sharded array than these rows."""
    bits = np.asarray(_gather_rows(x.sharding, count)(x, begin))
    return bits.astype(f"u{x.dtype.itemsize}").view(x.dtype)


@lru_cache(maxsize=16)
def _gather_rows(where: NamedSharding, count: int) -> Callable[[jax.Array, int], jax.Array]:
    """The rows as 32-bit integers, summed over the devices: rows that a device does not hold count as 0."""
    first, *rest = (*where.spec, None)

    def local(part: jax.Array, begin: jax.Array) -> jax.Array:
        index = begin + jnp.arange(count)
        if first is not None:
            index -= lax.axis_index(first) * part.shape[0]
        whole = jnp.uint32 if part.dtype.itemsize == 4 else jnp.uint16
        out = (
            lax.bitcast_convert_type(part, whole).at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        )
        out = out.astype(jnp.uint32)
        out = out if first is None else lax.psum(out, first)
        for axis, over in enumerate(rest, 1):
            out = out if over is None else lax.all_gather(out, over, axis=axis, tiled=True)
        return out

    specs = (where.spec, PartitionSpec())
    return jax.jit(jax.shard_map(local, mesh=where.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))

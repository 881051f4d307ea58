"""Weights of quantized checkpoints: the tensors that make one, and its numbers in the layout of nn.quantized.Quantized.

A format (quantized_formats.py, gguf_packed.py) reads some output channels at a time, so that no second copy of a large
tensor exists. Nothing becomes a float on the way.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.meta import ConcatTensor
from jaxlm.checkpoint.safetensors import DTYPES, Tensor, aligned, read_into
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized_cpu import BLOCK

ELEMENTS = 1 << 24  # weights that are read at a time
# Output channels that are transposed at a time: the lines of the cache that they share stay in it.
CHANNELS = 2048
ALIGNMENT = 32  # output channels that are read at a time are a multiple of it: that of formats and of `tile`
INTEGERS: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64), "F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    **DTYPES,
}  # fmt: skip


class Reader(partial):
    """A function with options. Unlike a `partial`, it equals another one of the same, such as its pickled copy."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reader) and (self.func, self.keywords) == (other.func, other.keywords)

    def __hash__(self) -> int:
        return hash(self.func)


class Packed(NamedTuple):
    """A weight of a quantized checkpoint, in place of its Tensor.

    Attributes:
        name: name of the weight that it stands for.
        dtype: type of the dequantized weight, as in safetensors.
        shape: shape of the weight, as a matrix [F,D].
        encoding: its type, for messages ("int4").
        parts: the tensors that it is stored as.
        read: function of this, the first and the last output channel to a flat Quantized of numpy arrays. In groups,
            its q is by channels [F,I,s].
        bits: bits of a number in a Quantized.
        in_rows: whether the numbers are read as they are stored (layout channels): all of them at once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    parts: tuple[Tensor, ...]
    read: Callable[["Packed", int, int], Quantized]
    bits: int = 8
    in_rows: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def loaded_nbytes(self) -> int:
        """About the bytes of the Quantized."""
        return max(self.nbytes, math.prod(self.shape) * self.bits // 8)

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    def part(self, end: str) -> Tensor | None:
        """The part whose name ends like this."""
        return next((part for part in self.parts if part.name.endswith(end)), None)


AnyTensor = Tensor | ConcatTensor | Packed


def read_rows(tensor: Tensor, begin: int, end: int) -> np.ndarray:
    """Rows of a tensor, in its type."""
    dtype = INTEGERS[tensor.dtype]
    each = tensor.nbytes // tensor.shape[0]
    raw = aligned((end - begin) * each)
    read_into(raw, tensor, begin * each)
    return raw.view(dtype).reshape(end - begin, *tensor.shape[1:])


def read_columns(tensor: Tensor, begin: int, end: int) -> np.ndarray:
    """Columns of a matrix, in its type."""
    dtype, (rows, columns) = INTEGERS[tensor.dtype], tensor.shape
    raw = aligned(rows * (end - begin) * dtype.itemsize).reshape(rows, -1)
    read_into(raw, tensor, begin * dtype.itemsize, columns * dtype.itemsize)
    return raw.view(dtype)


def read_all(tensor: Tensor) -> np.ndarray:
    """A small tensor."""
    raw = aligned(tensor.nbytes)
    read_into(raw, tensor, 0)
    return raw.view(INTEGERS[tensor.dtype]).reshape(tensor.shape)


def in_blocks(codes: np.ndarray, kind: str) -> np.ndarray:
    """Numbers [F,D] in blocks of inputs, [F,I,BLOCK], of which those of 4 bits are packed as in Quantized.q."""
    codes = codes.reshape(len(codes), -1, BLOCK)
    if kind not in ("int4", "mxfp4"):
        return codes
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << np.uint8(4)


def whole(packed: Packed, tile: int) -> Quantized:
    """All output channels of a weight, as a flat Quantized of numpy arrays. tile: channels of a tile of q; 0: none."""
    channels, width = packed.shape
    if packed.in_rows:
        return packed.read(packed, 0, channels)
    step = max(ELEMENTS // width // ALIGNMENT * ALIGNMENT, ALIGNMENT)
    out: dict[str, np.ndarray] = {}
    part: Any = None
    for begin in range(0, channels, step):
        part = packed.read(packed, begin, min(begin + step, channels))
        tiles = part.q.reshape(-1, tile or len(part.q), *part.q.shape[1:]).transpose(2, 0, 3, 1)
        q = tiles if tile else tiles[:, 0].reshape(-1, tiles.shape[-1])
        arrays = {**part.arrays(), "q": q}
        for name, a in arrays.items():
            each = tile if tile and name == "q" else 1
            if begin == 0:
                raw = aligned(a.size // a.shape[1] * channels // each * a.itemsize)
                out[name] = raw.view(a.dtype).reshape(a.shape[0], channels // each, *a.shape[2:])
            for i in range(0, a.shape[1], CHANNELS // each):
                some = a[:, i : i + CHANNELS // each]
                out[name][:, begin // each + i :][:, : some.shape[1]] = some
    if not tile:
        out["q"] = out["q"].reshape(-1, part.q.shape[-1], channels)
    return replace(part, **out)


def dense_into(packed: Packed, out: np.ndarray, row: int, column: int) -> None:
    """Fills `out` [...,columns] with a block of the dequantized weight, some output channels at a time."""
    columns = out.shape[-1]
    rows, width = out.size // columns, packed.shape[1]
    flat = out.reshape(rows, columns)  # a view, or a copy
    step = max(ELEMENTS // 4 // width // ALIGNMENT * ALIGNMENT, ALIGNMENT)
    for begin in range(row // ALIGNMENT * ALIGNMENT, row + rows, step):
        first, end = max(begin, row), min(begin + step, row + rows)
        stop = min(-(-end // ALIGNMENT) * ALIGNMENT, packed.shape[0])
        values = dense(packed.read(packed, begin, stop))
        flat[first - row : end - row] = values[first - begin : end - begin, column : column + columns]
    if not np.shares_memory(flat, out):
        out[...] = flat.reshape(out.shape)


def dense(w: Quantized) -> np.ndarray:
    """The dequantized weight [F,D] float32. Blocks of inputs are by channels."""
    w = replace(w, q=w.q.swapaxes(0, 1)[..., None]) if w.grouped else w
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_dense(replace(w, dtype=jnp.float32)))


_dense = jax.jit(lambda w: w.dense())

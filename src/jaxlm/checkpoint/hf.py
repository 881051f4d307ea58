"""Hugging Face checkpoints: tensors matched with a family's PARAMS, and read straight onto their devices.

On CPU the buffer that is read into becomes the array. A few threads read and convert slices concurrently: a single one
waits for the first touch of fresh memory and for the conversion (half as fast on two cores). Small tensors share a task
and a call of device_put: a task and a call for each would take as long as reading them.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm.checkpoint import gguf
from jaxlm.checkpoint.meta import ConcatTensor, in_pairs
from jaxlm.checkpoint.quantized_layout import AnyTensor, Packed, dense_into
from jaxlm.checkpoint.safetensors import DTYPES, SLICE, Tensor, aligned, chunks, listed, read_into
from jaxlm.checkpoint.safetensors import read_header as read_header
from jaxlm.checkpoint.safetensors import read_json as read_json
from jaxlm.checkpoint.weight_files import read_index as read_index
from jaxlm.devices import mesh
from jaxlm.nn import params

READERS = 4
AHEAD = 256 << 20  # bytes that may be read ahead of the tensors that are being put on their devices
CONVERTED = 1 << 20  # bytes converted at a time: they stay in the CPU's cache
PIECE = 64 << 20  # bytes sent to an accelerator at a time
# A stored head is compared with the embedding in this many blocks, evenly spaced from the first to the last bytes (the
# rows of special tokens are often there), of this many bytes each.
SAMPLES, SAMPLE = 64, 64 << 10
# Buffers in some checkpoints that follow from the config.
IGNORABLE = (".rotary_emb.inv_freq",)


class MatchResult(NamedTuple):
    """The tensors of a checkpoint, matched with the rows of PARAMS.

    Attributes:
        pairs: each row with its tensor.
        heads: stored heads that config.json ties to the embedding, and that are like it (`alike`).
        ignored: tensors that are known and not used.
        no_weights: why there are no tensors; empty if there are (jaxlm.loading.resolving.match_tensors, headers_only).
    """

    pairs: list[tuple[params.TensorSpec, AnyTensor]]
    heads: list[Tensor]
    ignored: list[Tensor]
    no_weights: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """The files that a model was read from, and their contents other than weights.

    Attributes:
        folder: the checkpoint's folder.
        config: contents of config.json; for Meta's format, the config.json that params.json stands for.
        generation_config: contents of generation_config.json.
        tensors: the tensors, under the names in the files.
        format: "hf" or "meta".
        params: contents of Meta's params.json.
        tokenizer: folder or tokenizer.model of the tokenizer, if it is not in `folder`.
        adapter: a peft.Adapter, if one was loaded with the model.
        notes: what the user should know about how the files were read.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: MatchResult
    format: str = "hf"
    params: dict[str, Any] | None = None
    tokenizer: Path | None = None
    adapter: Any = None
    notes: tuple[str, ...] = ()


def match(
    table: params.Table,
    cfg: Any,
    tensors: Mapping[str, Any],
    ignored_prefixes: Collection[str] = (),
    faults: Mapping[str, list[str]] | None = None,
    config: str = "config.json",
    headers_only: bool = False,
) -> MatchResult:
    """Matches the tensors of a checkpoint with the rows of PARAMS. All misfits are reported in one ValueError.

    Args:
        table: the family's PARAMS.
        cfg: the family's Config.
        tensors: Tensor, ConcatTensor or Packed by name.
        ignored_prefixes: prefixes of tensor names that are known and not used.
        faults: misfits found before (what is wrong: names), to report with the others.
        config: name of the file that the sizes are from, for messages.
        headers_only: do not read from a stored head to compare it with the embedding that it is tied to.
    """
    left, pairs = dict(tensors), []
    missing, duplicate, misshapen, unreadable = [], [], [], []
    for row in params.tensors(table, cfg):
        found = [left.pop(name) for name in row.names if name in left]
        missing += row.names[:1] if not found else []
        duplicate += [" and ".join(t.name for t in found)] if len(found) > 1 else []
        if not found:
            continue
        tensor = found[0]
        if tensor.dtype not in DTYPES:
            unreadable.append(f"{tensor.name} {tensor.dtype}")
        elif tensor.shape != row.stored_shape:
            misshapen.append(f"{tensor.name} {list(tensor.shape)} instead of {list(row.stored_shape)}")
        pairs.append((row, tensor))
    embed = next((tensor for row, tensor in pairs if row.path == "embed"), None)
    heads = [left.pop(name) for name in table.get("head", ("",))[1:] if name in left] if cfg.tied else []
    differ = [] if headers_only or embed is None else [head.name for head in heads if not alike(head, embed)]
    passed = {
        name: t for name, t in left.items() if name.startswith(tuple(ignored_prefixes)) or name.endswith(IGNORABLE)
    }
    faults = {
        **(faults or {}),
        "missing": missing,
        "unexpected": [name for name in left if name not in passed],
        "misshapen": misshapen,
        f"of an unsupported type (supported: {', '.join(DTYPES)}; config.json names no quantization)": unreadable,
        "stored under two names": duplicate,
        f"unlike the embedding that {config} ties them to (to use them, set tie_word_embeddings to false)": differ,
    }
    _report(faults, config)
    return MatchResult(pairs, heads, list(passed.values()))


def _report(faults: Mapping[str, list[str]], config: str) -> None:
    report = [f"{what}: {listed(names)}" for what, names in faults.items() if names]
    if report:
        hint = ". Are both files of the same model and revision?" if config.endswith(".json") else ""
        raise ValueError(f"the weights do not match {config}. {'; '.join(report)}{hint}")


def alike(head: Any, embed: Any) -> bool:
    """Whether a stored head is the embedding that config.json ties it to, by SAMPLES of both.

    Both would take as long to read as the embedding takes twice, and the head is not needed. A head that was trained
    apart differs in almost every row, because each step of training changes all of them.
    """
    if (head.dtype, head.shape) != (embed.dtype, embed.shape):
        return False
    if isinstance(head, Packed) or isinstance(embed, Packed):
        same_kind = type(head) is type(embed) and len(head.parts) == len(embed.parts)
        return same_kind and all(map(alike, head.parts, embed.parts))
    a, b = (aligned(min(SAMPLE, head.nbytes)) for _ in range(2))
    for begin in sorted({(head.nbytes - a.nbytes) * i // (SAMPLES - 1) for i in range(SAMPLES)}):
        read_into(a, head, begin)
        read_into(b, embed, begin)
        if not np.array_equal(a, b):
            return False
    return True


def same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same bytes. All of them are compared, because nothing in Meta's files ties the head:
    one that differs in a few rows is a head of its own. A head in the embedding's storage is not read."""
    if isinstance(a, ConcatTensor) and isinstance(b, ConcatTensor):
        return a.axis == b.axis and len(a.parts) == len(b.parts) and all(map(same, a.parts, b.parts))
    if (a.dtype, a.shape) != (b.dtype, b.shape) or isinstance(a, ConcatTensor) or isinstance(b, ConcatTensor):
        return False
    if (a.file, a.offset) == (b.file, b.offset):
        return True
    return all(np.array_equal(x, y) for x, y in zip(chunks(a), chunks(b)))


Index = tuple[slice, ...]  # a block of an array: one slice per axis
Piece = tuple[Tensor | Packed, np.ndarray, int, int]  # the arguments of `read_block`


def new_block(
    tensor: AnyTensor, shape: tuple[int, ...], index: Index, dtype: np.dtype
) -> tuple[np.ndarray, Iterator[Piece]]:
    """Allocates a block of a tensor in host memory.

    Args:
        tensor: the tensor in its file.
        shape: its shape in the model, of which `index` selects a block.
        index: the block.
        dtype: type of the result.

    Returns:
        The block, and the pieces that fill it.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    out = aligned(math.prod(stop - start for start, stop in bounds) * dtype.itemsize).view(dtype)
    rows = _matrix(tensor.shape)[0]
    inner = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) * rows == math.prod(shape))
    (row, height), (column, width) = _run(bounds[:inner], shape[:inner]), _run(bounds[inner:], shape[inner:])
    return out.reshape([stop - start for start, stop in bounds]), pieces_of(
        tensor, out.reshape(height, width), row, column
    )


def _run(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> tuple[int, int]:
    """Begin and length of a block along axes that the file stores as one. Only the first of them may be divided."""
    if any((start, stop) != (0, n) for (start, stop), n in zip(bounds[1:], shape[1:])):
        raise AssertionError(f"the block {bounds} of {shape} is not contiguous in its file")
    start, stop = bounds[0] if bounds else (0, 1)
    each = math.prod(shape[1:])
    return start * each, (stop - start) * each


def pieces_of(tensor: AnyTensor, out: np.ndarray, row: int, column: int) -> Iterator[Piece]:
    """The pieces, of about SLICE bytes (CONVERTED if they are not only read), that fill `out` with the block of a
    tensor that begins at a row and a column, the tensor seen as a matrix."""
    if isinstance(tensor, Packed):
        yield tensor, out, row, column
        return
    joined = (
        tensor if isinstance(tensor, ConcatTensor) else ConcatTensor(tensor.name, tensor.dtype, tensor.shape, (tensor,))
    )
    for i, part in enumerate(joined.parts):
        height, width = _matrix(part.shape)
        above, beside = (0, i * width) if joined.axis else (i * height, 0)
        # The rows and columns of `out` that come from this part.
        top, left = max(row, above), max(column, beside)
        whole = out[top - row : max(above + height - row, 0), left - column : max(beside + width - column, 0)]
        if not whole.size:
            continue
        plain = not joined.H and not part.encoding
        direct = plain and out.dtype == DTYPES[part.dtype] and whole.flags.c_contiguous
        nbytes = SLICE if direct else min(SLICE, CONVERTED)
        step = max(1, nbytes // (whole.shape[1] * DTYPES[part.dtype].itemsize))
        if joined.H:
            step = max(step // joined.H, 1) * joined.H
        for begin in range(0, len(whole), step):
            block = whole[begin : begin + step]
            block = in_pairs(block, joined.H) if joined.H else block
            yield part, block, top - above + begin, left - beside


def read_block(tensor: Tensor | Packed, out: np.ndarray, row: int = 0, column: int = 0) -> int:
    """Fills `out` with the block of a tensor that begins at a row and a column, the tensor seen as a matrix.

    out has any type and strides. Its last axis is the block's columns, the others together are its rows. Returns the
    number of bytes of the elements in `tensor.dtype`.
    """
    if isinstance(tensor, Packed):
        dense_into(tensor, out, row, column)
        return out.size * DTYPES[tensor.dtype].itemsize
    source, width, columns = DTYPES[tensor.dtype], _matrix(tensor.shape)[1], out.shape[-1]
    direct = source == out.dtype and out.flags.c_contiguous and not tensor.encoding
    if tensor.encoding:
        values = gguf.read_values(tensor, (row, out.size // columns), (column, columns), width)
    else:
        raw = out.reshape(-1).view(np.uint8) if direct else aligned(out.size * source.itemsize)
        runs = 1 if columns == width else out.size // columns
        read_into(raw.reshape(runs, -1), tensor, (row * width + column) * source.itemsize, width * source.itemsize)
        values = raw.view(source)
    if not direct:
        with np.errstate(all="ignore"):
            out[...] = values.reshape(out.shape)
    if out.dtype == np.float16 and values.dtype != np.float16 and np.isinf(out).any():
        raise ValueError(f"{tensor.file}: {tensor.name} has values beyond float16's 65,504: use another dtype")
    return out.size * source.itemsize


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def place(values: list[np.ndarray], devices: list[Any]) -> list[jax.Array]:
    """Moves arrays from host memory, each to its device: on CPU without a copy, elsewhere large ones in pieces, to
    stage no copy."""
    large = [devices[0].platform != "cpu" and value.nbytes > 4 * PIECE for value in values]
    small = [i for i, is_large in enumerate(large) if not is_large]
    placed = dict(zip(small, jax.device_put([values[i] for i in small], [devices[i] for i in small])))
    return [placed[i] if i in placed else _place_pieces(values[i], devices[i]) for i in range(len(values))]


def _place_pieces(value: np.ndarray, device: Any) -> jax.Array:
    rows = max(1, PIECE * len(value) // value.nbytes)
    with jax.default_device(device):
        out = jnp.zeros(value.shape, value.dtype)
        for begin in range(0, len(value), rows):
            # Without waiting, all pieces would be on the device at once.
            out = _fill(out, jax.device_put(value[begin : begin + rows], device), begin).block_until_ready()
    return out


_fill = jax.jit(
    lambda out, part, begin: jax.lax.dynamic_update_slice_in_dim(out, part, begin, axis=0), donate_argnums=0
)


def load_weights(
    pairs: list[tuple[params.TensorSpec, AnyTensor]],
    loaded_dtype: Callable[[np.dtype], np.dtype],
    where: Callable[[params.TensorSpec], Any],
    advance: Callable[[int], None] = lambda nbytes: None,
    convert: Callable[[params.TensorSpec, jax.Array], Any] = lambda row, array: array,
    ahead: int | None = None,
) -> dict[str, Any]:
    """Reads every tensor onto its devices. A process reads the blocks that its devices hold, each once.

    Args:
        pairs: rows of PARAMS with their tensors.
        loaded_dtype: the type to load a type of the file in.
        where: the sharding of a row's array.
        advance: called with the number of bytes, as they are read.
        convert: called with each array; returns the weight, such as a quantized one.
        ahead: bytes that may be read ahead. Default: AHEAD.

    Returns:
        The weights, layers listed.
    """
    weights: dict[str, Any] = {}
    reading: deque[tuple[list[Block], list[Future[int]]]] = deque()
    placed: list[jax.Array] = []  # the blocks of the current tensor
    limit = (AHEAD if ahead is None else ahead) // 2

    def finish() -> None:
        blocks, futures = reading.popleft()
        for row, array in _placed(blocks, futures, advance):
            sharding = where(row)
            placed.append(array)
            if len(placed) == len(sharding.addressable_devices):
                if not isinstance(sharding, SingleDeviceSharding):
                    array = jax.make_array_from_single_device_arrays(row.shape, sharding, placed)
                params.put(weights, row.path, convert(row, array))
                placed.clear()

    pool = ThreadPoolExecutor(READERS, "jaxlm-read")
    try:
        for blocks in _grouped(_blocks(pairs, loaded_dtype, where), lambda block: block.value.nbytes, limit):
            pieces = (piece for block in blocks for piece in block.pieces)
            tasks = _grouped(pieces, lambda piece: piece[1].nbytes, SLICE)
            reading.append((blocks, [pool.submit(_read_pieces, task) for task in tasks]))
            if len(reading) == 2:
                finish()
        while reading:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)  # stop reading after Ctrl-C or an error
    return weights


class Block(NamedTuple):
    """A block of a row's array in host memory, the devices that hold it, and the pieces that fill it."""

    row: params.TensorSpec
    devices: list[Any]
    value: np.ndarray
    pieces: Iterator[Piece]


def _blocks(
    pairs: list[tuple[params.TensorSpec, AnyTensor]],
    loaded_dtype: Callable[[np.dtype], np.dtype],
    where: Callable[[params.TensorSpec], Any],
) -> Iterator[Block]:
    """The blocks that this process reads, in file order: a slow disk is read sequentially."""
    for row, tensor in sorted(pairs, key=lambda pair: (pair[1].file, pair[1].offset)):
        dtype = loaded_dtype(DTYPES[tensor.dtype])
        for index, devices in mesh.local_blocks(where(row), row.shape):
            yield Block(row, devices, *new_block(tensor, row.shape, index, dtype))


def _grouped(items: Iterable[Any], nbytes: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Consecutive items in groups, each of which ends with the item that brings it to `limit` bytes."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += nbytes(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def _read_pieces(pieces: list[Piece]) -> int:
    return sum(read_block(*piece) for piece in pieces)


def _placed(
    blocks: list[Block], futures: list[Future[int]], advance: Callable[[int], None]
) -> Iterator[tuple[params.TensorSpec, jax.Array]]:
    """Each block on each of its devices. While they are copied, the next blocks are read."""
    for future in futures:
        advance(future.result())
    copies = [(block, device) for block in blocks for device in block.devices]
    arrays = place([block.value for block, _ in copies], [device for _, device in copies])
    return zip((block.row for block, _ in copies), jax.block_until_ready(arrays))

"""Hugging Face checkpoints: tensors matched with a family's PARAMS, and read straight into their final type and place.

On CPU the buffer that is read into becomes the array itself. A few threads read and convert slices side by side: one
alone is held up by the first touch of fresh memory and by the conversion (half as fast on two cores).
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import params
from jaxlm.checkpoint.safetensors import DTYPES, SLICE, Tensor, aligned, chunks, listed, read_into
from jaxlm.checkpoint.safetensors import read_header as read_header
from jaxlm.checkpoint.safetensors import read_index as read_index
from jaxlm.checkpoint.safetensors import read_json as read_json

READERS = 4
AHEAD = 64 << 20  # bytes that may be read ahead of the tensor that is being placed
PIECE = 64 << 20  # bytes sent to an accelerator at a time
# Buffers that some checkpoints carry and that follow from the config.
IGNORABLE = (".rotary_emb.inv_freq",)


class Matched(NamedTuple):
    """The tensors of a checkpoint, sorted by what they are to a model."""

    pairs: list[tuple[params.Row, Tensor]]  # each row with its one tensor
    heads: list[Tensor]  # copies of the embedding, stored although config.json ties the head to it
    unread: list[Tensor]  # known and not used


@dataclass(frozen=True)
class Checkpoint:
    """Where a model came from: the folder, the contents of its config files, and its tensors."""

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Matched


def match(table: params.Table, cfg: Any, tensors: Mapping[str, Tensor], unread: Collection[str] = ()) -> Matched:
    """Finds the one tensor of each row; `unread` are beginnings of names that may be left. All misfits are reported
    together."""
    left, pairs = dict(tensors), []
    missing, twice, misshapen, unreadable = [], [], [], []
    for row in params.rows(table, cfg):
        found = [left.pop(name) for name in row.names if name in left]
        if not found:
            missing.append(row.names[0])
            continue
        tensor = found[0]
        if len(found) > 1:
            twice.append(" and ".join(t.name for t in found))
        if tensor.dtype not in DTYPES:
            unreadable.append(f"{tensor.name} {tensor.dtype}")
        elif tensor.shape != row.stored:
            misshapen.append(f"{tensor.name} {list(tensor.shape)} instead of {list(row.stored)}")
        pairs.append((row, tensor))
    embed = next((tensor for row, tensor in pairs if row.path == "embed"), None)
    heads = [left.pop(name) for name in table.get("head", ("",))[1:] if name in left] if cfg.tied else []
    untied = [head.name for head in heads if embed is not None and not _same(head, embed)]
    passed = {name: t for name, t in left.items() if name.startswith(tuple(unread)) or name.endswith(IGNORABLE)}
    faults = {
        "missing": missing,
        "unexpected": [name for name in left if name not in passed],
        "misshapen": misshapen,
        f"of a type that is not read (it must be {', '.join(DTYPES)}; quantised checkpoints are not)": unreadable,
        "stored in two spellings": twice,
        "unlike the embedding although config.json ties them (to use it, set tie_word_embeddings to false)": untied,
    }
    report = [f"{what}: {listed(names)}" for what, names in faults.items() if names]
    if report:
        raise ValueError(
            f"the weights do not fit config.json. {'; '.join(report)}. Are both files of the same model and revision?"
        )
    return Matched(pairs, heads, list(passed.values()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes: a head stored beside its embedding may have been trained apart."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(np.array_equal(x, y) for x, y in zip(chunks(a), chunks(b)))


def read_tensor(
    tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, list[Future[int]]]:
    """A tensor in host memory, in the type wanted, filled when the futures are done: each gives the bytes it read."""
    source = DTYPES[tensor.dtype]
    flat = aligned(tensor.nbytes // source.itemsize * dtype.itemsize).view(dtype)

    def read(begin: int) -> int:
        nbytes = min(SLICE, tensor.nbytes - begin)
        part = flat[begin // source.itemsize : (begin + nbytes) // source.itemsize]
        if source == dtype:
            read_into(part.view(np.uint8), tensor, begin)
            return nbytes
        raw = aligned(nbytes)
        read_into(raw, tensor, begin)
        with np.errstate(all="ignore"):
            part[:] = raw.view(source)
        if dtype == np.float16 and np.isinf(part).any():
            raise ValueError(f"{tensor.file}: {tensor.name} has values beyond float16's 65,504: use another dtype")
        return nbytes

    return flat.reshape(shape), [pool.submit(read, begin) for begin in range(0, tensor.nbytes, SLICE)]


def place(value: np.ndarray, device: Any) -> jax.Array:
    """Host memory to a device: no copy on CPU; piece by piece elsewhere, so that no second copy is staged."""
    if device.platform == "cpu" or value.nbytes <= 4 * PIECE:
        return jax.device_put(value, device)
    return _place_pieces(value, device)


def _place_pieces(value: np.ndarray, device: Any) -> jax.Array:
    rows = max(1, PIECE * len(value) // value.nbytes)
    with jax.default_device(device):
        out = jnp.zeros(value.shape, value.dtype)
        for begin in range(0, len(value), rows):
            # Waiting keeps a single piece on the way: dispatch alone would put them all on the device at once.
            out = _fill(out, jax.device_put(value[begin : begin + rows], device), begin).block_until_ready()
    return out


_fill = jax.jit(
    lambda out, part, begin: jax.lax.dynamic_update_slice_in_dim(out, part, begin, axis=0), donate_argnums=0
)


def load_weights(
    pairs: list[tuple[params.Row, Tensor]],
    kept: Callable[[np.dtype], np.dtype],
    device: Any,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Any]:
    """Reads every tensor into its place, in the type that `kept` gives for the stored one. `advance` hears of bytes
    as they are read."""
    weights: dict[str, Any] = {}
    reading: deque[tuple[str, np.ndarray, list[Future[int]]]] = deque()
    placed = None

    def finish() -> None:
        nonlocal placed
        path, value, futures = reading.popleft()
        for future in futures:
            advance(future.result())
        jax.block_until_ready(placed)  # an accelerator copies while the next tensor is read, and no more than that
        placed = place(value, device)
        params.put(weights, path, placed)

    pool = ThreadPoolExecutor(READERS, "jaxlm-read")
    try:
        # In the order of the files: a slow disk is read from front to back.
        for row, tensor in sorted(pairs, key=lambda pair: (pair[1].file, pair[1].offset)):
            reading.append((row.path, *read_tensor(tensor, row.shape, kept(DTYPES[tensor.dtype]), pool)))
            while sum(value.nbytes for _, value, _ in reading) > AHEAD:
                finish()
        while reading:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error no more is read
    return weights

"""Reads the weights of a quantized checkpoint onto their devices, each as a whole."""

import math
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.checkpoint import hf
from jaxlm.checkpoint.quantized_layout import Packed, whole
from jaxlm.devices import mesh
from jaxlm.nn import params
from jaxlm.nn.quantized import Quantized, tile

AHEAD = 2  # weights that are read ahead of the one that is put on its devices


def bytes_per_device(row: params.TensorSpec, tensor: Packed, where: Callable[[params.TensorSpec], Any]) -> int:
    """About the bytes that a weight takes on one device. On CPU, devices share the memory of the machine."""
    sharding = where(row)
    share = math.prod(sharding.shard_shape(row.shape)) / math.prod(row.shape)
    copies = len(sharding.addressable_devices) if mesh.platform(sharding) == "cpu" else 1
    return round(tensor.loaded_nbytes * share * copies)


def load_weights(
    weights: dict[str, Any],
    pairs: Collection[tuple[params.TensorSpec, Packed]],
    loaded_dtype: Callable[[np.dtype], np.dtype],
    where: Callable[[params.TensorSpec], Any],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Reads quantized weights onto their devices, each as a whole, and adds them to the tree `weights`.

    Args:
        weights: weights by path, layers listed.
        pairs: rows of PARAMS with their Packed.
        loaded_dtype: the type that a weight of a type of the file represents.
        where: the sharding of a row's array.
        advance: called with the number of bytes, as they are read.
    """
    waiting: deque[tuple[params.TensorSpec, Packed, Future[Quantized]]] = deque()

    def finish() -> None:
        row, tensor, future = waiting.popleft()
        flat = future.result()
        flat = replace(flat, dtype=loaded_dtype(flat.dtype))
        params.put(weights, row.path, placed(flat, row, where(row)))
        advance(tensor.nbytes)

    pool = ThreadPoolExecutor(AHEAD, "jaxlm-read")
    try:
        for row, tensor in sorted(pairs, key=lambda pair: (pair[1].file, pair[1].offset)):
            waiting.append(
                (row, tensor, pool.submit(whole, tensor, tile(_axes(row)[0][-1], mesh.platform(where(row)))))
            )
            if len(waiting) > AHEAD:
                finish()
        while waiting:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)


def placed(flat: Quantized, row: params.TensorSpec, sharding: Any) -> Quantized:
    """A flat Quantized of numpy arrays with the axes of a row, on the devices of the sharding of the row's array."""
    kept, summed = _axes(row)
    own = flat.arrays()
    if flat.grouped:
        q = own.pop("q")
        own = {name: a.reshape(-1, *kept) for name, a in own.items()}
        tiled = (*kept[:-1], kept[-1] // q.shape[-1], *q.shape[2:]) if flat.tiled else (q.shape[1], *kept)
        own["q"] = q.reshape(q.shape[0], *tiled)
    else:
        own = {"q": flat.q.reshape(row.shape), "scale": flat.scale.reshape(kept)}
    shaped = replace(flat, **own, inputs=summed)
    leaves, tree = jax.tree.flatten(shaped)
    if not isinstance(sharding, NamedSharding):
        [device] = sharding.device_set
        return tree.unflatten(hf.place(leaves, [device] * len(leaves)))
    letters = jax.tree.leaves(shaped.letters(row.letters))
    assert isinstance(sharding.mesh, Mesh)
    over = [mesh.sharding(name, a.shape, sharding.mesh) for name, a in zip(letters, leaves, strict=True)]
    return tree.unflatten(
        jax.make_array_from_callback(a.shape, each, lambda index, a=a: a[index]) for a, each in zip(leaves, over)
    )


def _axes(row: params.TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the axes of output channels and of inputs."""
    split = len(row.shape) - len(params.summed_letters(row.letters))
    return row.shape[:split], row.shape[split:]

"""Models with a LoRA adapter: read beside their weights, told, and fused into them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm.checkpoint import peft
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.writer import LazyTensor
from jaxlm.model import Model, Weights
from jaxlm.nn import lora, params

Where = Callable[[params.TensorSpec], Any]


def adapted(weights: Weights, checkpoint: Checkpoint, wanted: Callable[[np.dtype, str], Any], where: Where) -> Weights:
    """The weights with the adapter that was found with a checkpoint, if one was. wanted: the type to keep a tensor in,
    from the stored one and the platform."""
    if checkpoint.adapter is None:
        return weights
    platform = next(iter(weights["embed"].sharding.device_set)).platform
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda stored: wanted(stored, platform), where)
    return lora.join(weights, tree)


def placed(leaf: Any, row: params.TensorSpec, where: Where) -> Any:
    """A weight in any form moved to where a row's letters say."""
    if not lora.is_lora(leaf):
        return jax.device_put(leaf, where(row))
    halves = (where(half) for half in lora.halves(row, leaf.a.shape[0]))
    a, b = (jax.device_put(array, place) for array, place in zip((leaf.a, leaf.b), halves))
    return replace(leaf, w=jax.device_put(leaf.w, where(row)), a=a, b=b)


def fuse(model: Model) -> Model:
    """The model with its adapter added into the weights, which keep their type and their places. ValueError where it
    has none, or one of which a part is not read."""
    if not lora.count(model.weights):
        raise ValueError(f"{model.source} has no adapter to fuse: load it with one (adapter=)")
    whole = None if model.checkpoint is None else without_adapter(model.checkpoint)
    weights = jax.tree.map(_merged, model.weights, is_leaf=lora.is_lora)
    return replace(model, weights=weights, checkpoint=whole)


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """As a fused model's stands; ValueError if the adapter changes what is copied from the source unread."""
    if checkpoint.adapter is not None and checkpoint.adapter.ignored:
        raise ValueError(
            f"{checkpoint.adapter.folder} also adapts the half of the model that sees, which is not read yet: to fuse "
            "that too, use PEFT's merge_and_unload"
        )
    return replace(checkpoint, adapter=None)


def _merged(leaf: Any) -> Any:
    if not lora.is_lora(leaf):
        return leaf
    return jax.jit(lora.fused, out_shardings=leaf.w.sharding)(leaf)


def fused_on_disk(weights: Weights, checkpoint: Checkpoint) -> Weights:
    """Weights that are `Stored`, those that a checkpoint's adapter changes merged with it as they are read."""
    if checkpoint.adapter is None:
        return weights
    here = SingleDeviceSharding(jax.local_devices()[0])
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda stored: stored, lambda row: here)
    for path, leaf in lora.leaves(tree):
        params.put(weights, path, Fused(params.get(weights, path), leaf))
    return weights


class Fused(LazyTensor):
    """A tensor on the disk and an adapter beside it: its rows are merged, in float32, when they are asked for."""

    def __init__(self, stored: LazyTensor, leaf: lora.Lora):
        super().__init__(stored.tensor, stored.shape)
        self.leaf, self.dtype, self.nbytes = leaf, np.dtype(np.float32), 4 * math.prod(stored.shape)

    def read_rows(self, begin: int, count: int) -> np.ndarray:
        leaf = replace(self.leaf, w=super().read_rows(begin, count), b=self.leaf.b[begin : begin + count])
        return np.asarray(leaf.merged())

"""LoRA adapters: read with a model's weights, moved with them, and merged into them."""

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
    """The weights with the checkpoint's adapter, if it has one. wanted: the type to load a tensor in, from its type in
    the file and the platform."""
    if checkpoint.adapter is None:
        return weights
    platform = next(iter(weights["embed"].sharding.device_set)).platform
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda file_dtype: wanted(file_dtype, platform), where)
    return lora.join(weights, tree)


def placed(leaf: Any, row: params.TensorSpec, where: Where) -> Any:
    """A weight, with or without an adapter, moved to the devices that its row's letters select."""
    if not lora.is_lora(leaf):
        return jax.device_put(leaf, where(row))
    halves = (where(half) for half in lora.halves(row, leaf.a.shape[0]))
    a, b = (jax.device_put(array, place) for array, place in zip((leaf.a, leaf.b), halves))
    return replace(leaf, w=jax.device_put(leaf.w, where(row)), a=a, b=b)


def fuse(model: Model) -> Model:
    """The model with its adapter merged into the weights, which keep their type and sharding.

    Raises:
        ValueError: the model has no adapter, or the adapter also changes tensors that are not loaded (vision).
    """
    if not lora.count(model.weights):
        raise ValueError(f"{model.source} has no adapter: load it with one (adapter=)")
    whole = None if model.checkpoint is None else without_adapter(model.checkpoint)
    weights = jax.tree.map(_merged, model.weights, is_leaf=lora.is_lora)
    return replace(model, weights=weights, checkpoint=whole)


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of a merged model. ValueError if the adapter changes tensors that are copied and not loaded."""
    if checkpoint.adapter is not None and checkpoint.adapter.ignored:
        raise ValueError(
            f"{checkpoint.adapter.folder} also adapts the vision tower, which is not loaded yet: merge it with PEFT's "
            "merge_and_unload"
        )
    return replace(checkpoint, adapter=None)


def _merged(leaf: Any) -> Any:
    if not lora.is_lora(leaf):
        return leaf
    return jax.jit(lora.fused, out_shardings=leaf.w.sharding)(leaf)


def fused_on_disk(weights: Weights, checkpoint: Checkpoint) -> Weights:
    """LazyTensors; those that the checkpoint's adapter changes are merged with it as they are read."""
    if checkpoint.adapter is None:
        return weights
    here = SingleDeviceSharding(jax.local_devices()[0])
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda file_dtype: file_dtype, lambda row: here)
    for path, leaf in lora.leaves(tree):
        params.put(weights, path, FusedTensor(params.get(weights, path), leaf))
    return weights


class FusedTensor(LazyTensor):
    """A tensor on disk with its adapter. Rows are merged, in float32, when they are read."""

    def __init__(self, base: LazyTensor, leaf: lora.Lora):
        super().__init__(base.tensor, base.shape)
        self.leaf, self.dtype, self.nbytes = leaf, np.dtype(np.float32), 4 * math.prod(base.shape)

    def read_rows(self, begin: int, count: int) -> np.ndarray:
        leaf = replace(self.leaf, w=super().read_rows(begin, count), b=self.leaf.b[begin : begin + count])
        return np.asarray(leaf.merged())

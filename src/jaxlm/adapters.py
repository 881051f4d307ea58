"""LoRA adapters: loading onto a model's weights, placement on devices, and merging (fusing)."""

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
    """Loads the adapter of a checkpoint, if it has one, onto the weights.

    Args:
        weights: The weights of the base model.
        checkpoint: The checkpoint.
        wanted: Function of a tensor's dtype in the file and the platform to the dtype to load it in.
        where: The sharding of the array of a TensorSpec.

    Returns:
        The weights. Adapted ones are nn.lora.Lora.
    """
    if checkpoint.adapter is None:
        return weights
    platform = next(iter(weights["embed"].sharding.device_set)).platform
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda file_dtype: wanted(file_dtype, platform), where)
    return lora.join(weights, tree)


def placed(leaf: Any, row: params.TensorSpec, where: Where) -> Any:
    """Moves a weight, with or without an adapter, to the devices of its sharding."""
    if not lora.is_lora(leaf):
        return jax.device_put(leaf, where(row))
    shardings = (where(half) for half in lora.halves(row, leaf.a.shape[0]))
    a, b = (jax.device_put(array, sharding) for array, sharding in zip((leaf.a, leaf.b), shardings))
    return replace(leaf, w=jax.device_put(leaf.w, where(row)), a=a, b=b)


def fuse(model: Model) -> Model:
    """Merges the adapter of a model into its weights, which keep their dtype and sharding.

    Raises:
        ValueError: The model has no adapter, or the adapter also changes tensors that are not loaded (vision).
    """
    if not lora.count(model.weights):
        raise ValueError(f"{model.source} has no adapter: load it with one (adapter=)")
    checkpoint = None if model.checkpoint is None else without_adapter(model.checkpoint)
    weights = jax.tree.map(_merged, model.weights, is_leaf=lora.is_lora)
    return replace(model, weights=weights, checkpoint=checkpoint)


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of a merged model. Raises ValueError if the adapter changes tensors that are not loaded."""
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
    """Replaces LazyTensors that the checkpoint's adapter changes by FusedTensors, which merge it when they are read."""
    if checkpoint.adapter is None:
        return weights
    local = SingleDeviceSharding(jax.local_devices()[0])
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda file_dtype: file_dtype, lambda row: local)
    for path, leaf in lora.leaves(tree):
        params.put(weights, path, FusedTensor(params.get(weights, path), leaf))
    return weights


class FusedTensor(LazyTensor):
    """A tensor on disk with its adapter. Rows are merged in float32 when they are read."""

    def __init__(self, base: LazyTensor, leaf: lora.Lora):
        super().__init__(base.tensor, base.shape)
        self.leaf, self.dtype, self.nbytes = leaf, np.dtype(np.float32), 4 * math.prod(base.shape)

    def read_rows(self, begin: int, count: int) -> np.ndarray:
        leaf = replace(self.leaf, w=super().read_rows(begin, count), b=self.leaf.b[begin : begin + count])
        return np.asarray(leaf.merged())

"""LoRA adapters: loading onto a model's weights, placement on devices, and merging (fusing)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxlm.checkpoint import peft
from jaxlm.checkpoint.hf import Checkpoint
from jaxlm.checkpoint.writer import LazyTensor
from jaxlm.devices import mesh as meshes
from jaxlm.model import Model, Weights, require_model
from jaxlm.nn import lora, multi_lora, params
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import eos_ids

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
    platform = next(iter(jax.tree.leaves(weights["embed"])[0].sharding.device_set)).platform
    tree = peft.read(checkpoint.adapter, len(weights["layers"]), lambda file_dtype: wanted(file_dtype, platform), where)
    return lora.join(weights, tree)


def choose_tokenizer(
    base: Tokenizer | None, checkpoint: Checkpoint, config: Any, ends: list[int]
) -> tuple[Tokenizer | None, Checkpoint]:
    """Chooses the tokenizer and chat template in the folder of the adapter, which belong to it, over those of the base.
    Tools save them when the base is trained on conversations of a template that it does not have.

    Args:
        base: The tokenizer of the base model.
        checkpoint: The checkpoint of the base model, with the adapter.
        config: The config of the base model.
        ends: The EOS ids of the base model.

    Returns:
        The tokenizer, and the checkpoint with its folder and with a note if it is not that of the base.

    Raises:
        ValueError: The adapter's tokenizer has tokens that the base model does not have.
    """
    folder = checkpoint.adapter.folder
    tokenizer = Tokenizer.load(folder, {"eos_token_id": ends}, {})
    if tokenizer is None:
        template = folder / "chat_template.jinja"
        if base is None or not template.is_file() or (text := template.read_text("utf-8")) == base.hf.chat_template:
            return base, checkpoint
        base.hf.chat_template = text
        note = f"using the chat template beside the adapter ({folder}): the base model's is another"
        return base, replace(checkpoint, notes=(*checkpoint.notes, note))
    if base is not None and tokenizer.hf.chat_template is None:
        tokenizer.hf.chat_template = base.hf.chat_template
    if tokenizer.vocab_size > config.V and base is not None and _extends(base, tokenizer):
        # No text needs the added tokens, such as one for padding, and the model does not have them.
        base.hf.chat_template = tokenizer.hf.chat_template
        extra = tokenizer.vocab_size - base.vocab_size
        note = f"using the base model's tokenizer, without {extra:,} tokens that the adapter's ({folder}) adds"
        return base, replace(checkpoint, notes=(*checkpoint.notes, note))
    if tokenizer.vocab_size > config.V:
        raise ValueError(
            f"the tokenizer beside the adapter ({folder}) has {tokenizer.vocab_size:,} tokens, and the base model has "
            f"{config.V:,}: it was trained with another base or with added tokens; pass the base's tokenizer to use it "
            "(--tokenizer FOLDER)"
        )
    differs = []
    if base is None or base.hf.get_vocab() != tokenizer.hf.get_vocab():
        differs.append("tokenizer")
    if base is None or base.hf.chat_template != tokenizer.hf.chat_template:
        differs.append("chat template")
    if differs:
        whose = "the base model has none" if base is None else "the base model's differs"
        note = f"using the {' and the '.join(differs)} beside the adapter ({folder}): {whose}"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return tokenizer, replace(checkpoint, tokenizer=folder)


def _extends(base: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the tokens of the base with the same ids, and a chat template that uses no others."""
    ours, theirs = base.hf.get_vocab(), tokenizer.hf.get_vocab()
    added = theirs.keys() - ours.keys()
    template = str(tokenizer.hf.chat_template or "")
    return ours.items() <= theirs.items() and not any(token in template for token in added)


def placed(leaf: Any, row: params.TensorSpec, where: Where) -> Any:
    """Moves a weight, an array or a WeightForm, to the devices of its sharding."""

    def put(array: jax.Array, letters: str) -> jax.Array:
        return jax.device_put(array, where(row._replace(letters=letters, shape=array.shape)))

    return jax.tree.map(put, leaf, params.letters_of(leaf, row.letters))


def fuse(model: Model) -> Model:
    """Merges the adapter of a model into its weights, which keep their dtype and sharding.

    Quantized weights that the adapter changes are dequantized: the sum is an array in the dtype of the activations, so
    that nothing is rounded to few bits a second time. The others stay quantized.

    Raises:
        ValueError: The model has no adapter, or the adapter also changes tensors that are not loaded (vision).
    """
    require_model(model, "fuse")
    if not lora.count(model.weights):
        raise ValueError(f"{model.source} has no adapter: load it with one (adapter=)")
    checkpoint = None if model.checkpoint is None else without_adapter(model.checkpoint)
    merge = partial(_merged, model.family.PARAMS)
    weights = jax.tree_util.tree_map_with_path(merge, model.weights, is_leaf=lora.is_lora)
    return with_stop_ids(replace(model, weights=weights, checkpoint=checkpoint))


def with_stop_ids(model: Model) -> Model:
    """Returns the model with every stop token id in the `eos_token_id` of its generation_config.

    A model that was trained on conversations ends its answers with the token that ends a turn in its chat template,
    which the files of a base model do not name. Without it, other tools would not stop there.
    """
    if model.tokenizer is None:
        return model
    config = model.generation_config
    known = eos_ids(config)
    ends = sorted({*known, *model.tokenizer.stop_ids})
    return model if ends == known else replace(model, generation_config={**config, "eos_token_id": ends})


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of a merged model. Raises ValueError if the adapter changes tensors that are not loaded."""
    if checkpoint.adapter is not None and checkpoint.adapter.ignored:
        raise ValueError(
            f"{checkpoint.adapter.folder} also adapts the vision tower, which is not loaded yet: merge it with PEFT's "
            "merge_and_unload"
        )
    return replace(checkpoint, adapter=None)


def _merged(table: params.Table, path: Any, leaf: Any) -> Any:
    if not lora.is_lora(leaf):
        return leaf
    where = leaf.a.sharding  # on one device, that of every array
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        shape = jax.eval_shape(lora.fused, leaf).shape
        where = meshes.sharding("".join(params.own_letters(table, path)), shape, where.mesh)
    return jax.jit(lora.fused, out_shardings=where)(leaf)


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


def combine(model: Model, adapted: Sequence[Model]) -> Model:
    """Combines a model with the adapters of others, from which each row of a batch chooses (nn.multi_lora).

    Args:
        model: The base.
        adapted: Models that `load_adapter` made of it.

    Raises:
        ValueError: The model has an adapter itself, or one of the others has another base.
    """
    if not adapted:
        return model
    if lora.count(model.weights):
        raise ValueError(f"{model.source} has an adapter itself: load the base without it")
    for each in adapted:
        leaves = jax.tree.leaves(each.weights, is_leaf=lora.is_lora)
        bases = jax.tree.leaves([leaf.w if lora.is_lora(leaf) else leaf for leaf in leaves])
        if any(one is not other for one, other in zip(bases, jax.tree.leaves(model.weights), strict=True)):
            raise ValueError(f"{each.source} is not an adapter of this model: load it with load_adapter(model, …)")
    return replace(model, weights=multi_lora.combine(model.weights, [each.weights for each in adapted]))

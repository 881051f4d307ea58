"""Tiny models whose weights are quantized, and the same with the dequantized weights."""

from dataclasses import replace
from functools import cache

import jax

from helpers.tiny_models import tiny
from jaxlm import Model
from jaxlm.nn import params
from jaxlm.nn.quantize import quantizer
from jaxlm.nn.quantized import is_quantized

# With int4, most weights are in groups of 32 inputs; `down`, of 72 inputs, is int8, as embedding and head are.
SIZES = {"hidden_size": 64, "intermediate_size": 72, "head_dim": 16}


@cache
def quantized(family: str, type: str) -> tuple[Model, Model]:
    """A quantized model, and the same model with arrays in place of its weights."""
    model = tiny(family, **SIZES)
    weights: dict = {}
    for row in params.tensors(model.family.PARAMS, model.config):
        params.put(weights, row.path, quantizer(type)(row, params.get(model.weights, row.path)))
    return replace(model, weights=weights), replace(model, weights=dense(weights))


def dense(weights: dict) -> dict:
    """Weights with arrays in the place of quantized ones."""
    return jax.tree.map(lambda leaf: leaf.dense() if is_quantized(leaf) else leaf, weights, is_leaf=is_quantized)

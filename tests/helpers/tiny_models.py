"""Tiny jaxlm models with the weights of helpers.random_weights, without a checkpoint and without torch."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import pytest

from helpers.random_weights import draw
from jaxlm import Model, models
from jaxlm.nn import params

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 20},
    "olmo2": {"model_type": "olmo2", **SIZES},
    "olmo3": {"model_type": "olmo3", **SIZES, "sliding_window": 5, "layer_types": [SLIDING, FULL]},
    "smollm3": {"model_type": "smollm3", **SIZES, "no_rope_layers": [1, 0]},
    "gemma3": {
        "model_type": "gemma3_text",
        **SIZES,
        "head_dim": 20,
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "layer_types": [SLIDING, FULL],
    },
}
FAMILIES = tuple(CONFIGS)
UNIFORM = ("llama3", "qwen3", "olmo2")  # families whose layers are all of one type
DISTINCT = (*UNIFORM, "gemma3")  # they have all operations; the others combine these in other ways


def families(*quick: str) -> list[Any]:
    """All families as parameters of a test. Those that are not among `quick` are slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def layers(family: str, count: int) -> dict[str, Any]:
    """Fields for this many layers. Types of layers take turns, as in CONFIGS."""
    lists = {key: value for key, value in CONFIGS[family].items() if isinstance(value, list)}
    return {"num_hidden_layers": count, **{key: (value * count)[:count] for key, value in lists.items()}}


def from_config(config: Mapping[str, Any], seed: int = 0, dtype: Any = jnp.float32) -> Model:
    """A model of this config.json."""
    family = models.family_of(config["model_type"])
    cfg = family.Config.from_hf(config)
    weights: dict[str, Any] = {}
    for row in params.tensors(family.PARAMS, cfg):
        value = draw(row.names[0], row.stored_shape, seed, family.NORM_IDENTITY).reshape(row.shape)
        params.put(weights, row.path, jnp.asarray(value, dtype))
    return Model(family, cfg, weights)


def tiny(family: str, seed: int = 0, dtype: Any = jnp.float32, **fields: Any) -> Model:
    """A model of a family, with these fields of config.json changed."""
    return from_config({**CONFIGS[family], **fields}, seed, dtype)

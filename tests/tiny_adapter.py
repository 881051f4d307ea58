"""Small LoRA adapters with drawn values, for models of tests."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import Model, lora


def drawn(model: Model, targets: tuple[str, ...] = ("all-linear",), rank: int = 3, scale: float = 0.75) -> Any:
    """An adapter's tree that changes a model's text: products of about half the deviation of the weights."""
    rows = lora.targets(model.family.PARAMS, model.config, targets)
    tree = lora.init(rows, model.config.L, rank, scale, jax.random.key(3))
    keys = iter(jax.random.split(jax.random.key(5), 1000))
    return jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, jnp.float32) * 0.5 * a.shape[-1] ** -0.5, tree)


def beside(model: Model, tree: Any) -> Model:
    """The model with an adapter."""
    return Model(
        model.family, model.config, lora.join(model.weights, tree), model.tokenizer, checkpoint=model.checkpoint
    )

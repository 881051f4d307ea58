"""Small LoRA adapters with drawn values, for models of tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import Model
from jaxlm.nn import lora


def drawn(model: Model, targets: tuple[str, ...] = ("all-linear",), rank: int = 3, scale: float = 0.75) -> Any:
    """An adapter's tree that changes a model's text: products of about half the deviation of the weights."""
    rows = lora.targets(model.family.PARAMS, model.config, targets)
    tree = jax.eval_shape(lambda key: lora.init(rows, model.config.L, rank, scale, key), jax.random.key(3))
    random = np.random.default_rng(5)
    return jax.tree.map(
        lambda a: jnp.asarray(random.standard_normal(a.shape, np.float32) * 0.5 * a.shape[-1] ** -0.5, a.dtype), tree
    )


def beside(model: Model, tree: Any) -> Model:
    """The model with an adapter."""
    return Model(
        model.family, model.config, lora.join(model.weights, tree), model.tokenizer, checkpoint=model.checkpoint
    )

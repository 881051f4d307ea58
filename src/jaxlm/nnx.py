"""A model as a Flax NNX module, for use with Flax's optimizers, transformations and checkpoints.

    module = jaxlm.nnx.Module(jaxlm.load("Qwen/Qwen3-0.6B"))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-5), wrt=nnx.Param)
    …
    jaxlm.export(module.to_model(), "out")

The module shares the arrays of the model and calls the forward function of its family.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from jaxlm.devices import mesh
from jaxlm.model import Model, Weights
from jaxlm.nn import kv_cache as caches

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"jaxlm.nnx needs {error.name}: pip install 'jaxlm[flax]'", name=error.name) from None


class Module(nnx.Module):
    """A model whose weights are nnx.Param.

    The tree is that of `model.weights`: `module.layers[3]["q"]`, or `layers.3.q` as a path of nnx.state. The arrays a
    and b of an adapter (jaxlm.nn.lora) are nnx.LoRAParam. To train only the adapter, use
    `nnx.DiffState(0, nnx.LoRAParam)` for the gradient and `wrt=nnx.LoRAParam` for the optimizer.
    """

    def __init__(self, model: Model):
        for name, part in jax.tree_util.tree_map_with_path(_param, model.weights).items():
            setattr(self, name, nnx.data(part))
        # A static attribute for NNX. It has only the shapes of the weights, because the arrays would stay in memory
        # after training has replaced them.
        self._model = replace(model, weights=jax.eval_shape(lambda weights: weights, model.weights))

    @property
    def weights(self) -> Weights:
        """The arrays as a plain tree like `model.weights`. Nothing is copied."""
        variables = {name: getattr(self, name) for name in self._model.weights}
        return jax.tree.map(lambda param: param[...], variables, is_leaf=_is_param)

    def __call__(
        self, tokens: Any, kv: caches.KVCache | None = None, pos: Any = None
    ) -> tuple[jax.Array, caches.KVCache | None]:
        """Computes logits [B,T,V] float32 and the updated KV cache; see `Model.forward`."""
        weights = self.weights
        with _on_mesh(weights):
            return self._model.forward(tokens, weights, kv, pos)

    def init_kv(self, batch: int, length: int, **options: Any) -> caches.KVCache:
        """Creates an empty KV cache; see `Model.init_kv`.

        Raises:
            ValueError: It is called within nnx.jit, where the devices are not known.
        """
        if mesh.traced(jax.tree.leaves(self.weights)[0]):
            raise ValueError("init_kv cannot be called within nnx.jit or nnx.grad: create the KV cache outside, and "
                             "pass it in")  # fmt: skip
        return self.to_model().init_kv(batch, length, **options)

    def to_model(self) -> Model:
        """Returns a Model with the current arrays, and the tokenizer and other attributes of the original model."""
        return replace(self._model, weights=self.weights)


def _param(path: Any, array: jax.Array) -> nnx.Param:
    is_adapter = isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("a", "b")
    return nnx.LoRAParam(array) if is_adapter else nnx.Param(array)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _on_mesh(weights: Weights) -> AbstractContextManager[Any]:
    """Within nnx.jit and nnx.grad, a context with the mesh of the weights, unless jax.set_mesh has set one. Without a
    mesh, the shardings of activations and caches would be left to the compiler."""
    leaf = jax.tree.leaves(weights)[0]
    if not mesh.traced(leaf) or mesh.active():
        return nullcontext()
    return jax.sharding.use_abstract_mesh(jax.typeof(leaf).sharding.mesh)

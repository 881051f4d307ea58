"""A model as a Flax NNX module, for programs that are written for Flax: its optimizers, transformations, checkpoints.

    module = jaxlm.nnx.Module(jaxlm.load("Qwen/Qwen3-0.6B"))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-5), wrt=nnx.Param)
    …
    jaxlm.export(module.to_model(), "out")

The module is a view: it holds the model's arrays, and computes with the family's own forward function.
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
    """A model whose weights are nnx.Param, in the tree that `model.weights` has: `module.layers[3]["q"]`, and
    `layers.3.q` as a path of nnx.state. Of an adapter (jaxlm.nn.lora), a and b are nnx.LoRAParam: with
    `nnx.DiffState(0, nnx.LoRAParam)` for the gradient and `wrt=nnx.LoRAParam` for the optimizer it is trained alone.
    """

    def __init__(self, model: Model):
        for name, part in jax.tree_util.tree_map_with_path(_param, model.weights).items():
            setattr(self, name, nnx.data(part))
        # What NNX is to keep as it is. Shapes alone: the arrays would stay in memory when training has replaced them.
        self._model = replace(model, weights=jax.eval_shape(lambda weights: weights, model.weights))

    @property
    def weights(self) -> Weights:
        """The arrays as a plain tree, as `model.weights` is, for functions that take one. Nothing is copied."""
        held = {name: getattr(self, name) for name in self._model.weights}
        return jax.tree.map(lambda param: param[...], held, is_leaf=_is_param)

    def __call__(
        self, tokens: Any, kv: caches.KVCache | None = None, pos: Any = None
    ) -> tuple[jax.Array, caches.KVCache | None]:
        """tokens [B,T] int32 -> logits [B,T,V] float32, and the cache with these tokens in it: `Model.forward`."""
        weights = self.weights
        with _on_mesh(weights):
            return self._model.forward(tokens, weights, kv, pos)

    def init_kv(self, batch: int, length: int, **options: Any) -> caches.KVCache:
        """An empty cache: `Model.init_kv`. ValueError within nnx.jit, where the devices are not known."""
        if mesh.traced(self.weights["embed"]):
            raise ValueError("init_kv within nnx.jit or nnx.grad: make the cache outside, and pass it in")
        return self.to_model().init_kv(batch, length, **options)

    def to_model(self) -> Model:
        """A Model of the arrays that the parameters hold now, with the tokenizer and all that the first one had."""
        return replace(self._model, weights=self.weights)


def _param(path: Any, array: jax.Array) -> nnx.Param:
    of_adapter = isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("a", "b")
    return nnx.LoRAParam(array) if of_adapter else nnx.Param(array)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _on_mesh(weights: Weights) -> AbstractContextManager[Any]:
    """What is traced within nnx.jit and nnx.grad runs on the mesh of the weights, also where no jax.set_mesh says so:
    without it, activations and caches would lie where the compiler likes."""
    if not mesh.traced(weights["embed"]) or mesh.active():
        return nullcontext()
    return jax.sharding.use_abstract_mesh(jax.typeof(weights["embed"]).sharding.mesh)

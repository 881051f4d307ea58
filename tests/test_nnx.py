"""The NNX view against the model and against our own tree: the same bits, on one device; on a mesh the same places."""

import gc
import importlib
import sys
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.tiny_adapter import beside, drawn
from helpers.tiny_models import CONFIGS, DISTINCT, families, layers, tiny

import jaxlm
import jaxlm.nnx
from jaxlm import Model
from jaxlm.data.packing import Batch
from jaxlm.devices import mesh
from jaxlm.loading import spread
from jaxlm.training import step
from jaxlm.training.loss import loss

TOKENS = np.arange(96, dtype=np.int32).reshape(8, 12)
RULE = optax.adamw(1e-2)
ON_MESH = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 200}


def small(family: str = "llama3", **fields: Any) -> Model:
    return tiny(family, **{**layers(family, 1), **fields})


def nats(logits: jax.Array) -> jax.Array:
    """The mean loss of each next token of TOKENS."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def module_nats(module: jaxlm.nnx.Module) -> jax.Array:
    return nats(module(TOKENS)[0])


@nnx.jit
def train(module: jaxlm.nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
    value, gradient = nnx.value_and_grad(module_nats)(module)
    optimizer.update(module, gradient)
    return value


def plain_step(model: Model) -> Any:
    """The same loss and step on our own tree."""

    @jax.jit
    def run(weights: Any, moments: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda w: nats(model.forward(TOKENS, w)[0]))(weights)
        updates, moments = RULE.update(gradient, moments, weights)
        return value, optax.apply_updates(weights, updates), moments

    return run(model.weights, jax.jit(RULE.init)(model.weights))


def same(a: Any, b: Any) -> None:
    """Equal trees, to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_logits_are_the_models(family: str) -> None:
    model = tiny(family) if family == "gemma3" else small(family)
    module = jaxlm.nnx.Module(model)
    logits, kv = module(TOKENS)
    assert (logits.dtype, kv) == (jnp.float32, None)
    same(logits, model.forward(TOKENS, model.weights)[0])
    same(nnx.jit(lambda module: module(TOKENS)[0])(module), logits)
    same(jax.jit(lambda module: module(TOKENS)[0])(module), logits)  # a module is a pytree


def test_parameters_stand_in_the_tree_of_the_weights() -> None:
    model = tiny("llama3")
    module = jaxlm.nnx.Module(model)
    paths = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module))}
    assert {type(param) for param in paths.values()} == {nnx.Param}
    assert set(paths) == {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(model.weights)
    }
    assert paths["layers.1.q"][...] is model.weights["layers"][1]["q"]
    assert module.layers[1]["q"][...] is model.weights["layers"][1]["q"]


def test_the_model_comes_back() -> None:
    """With the same arrays, and with all else that it had."""
    first = small()
    rest: tuple[Any, ...] = (object(), {"temperature": 0.5}, "a name", object())
    model = Model(first.family, first.config, first.weights, *rest)
    graph, state = nnx.split(jaxlm.nnx.Module(model))
    for module in (jaxlm.nnx.Module(model), nnx.merge(graph, state)):
        again = module.to_model()
        assert all(a is b for a, b in zip(jax.tree.leaves(again.weights), jax.tree.leaves(model.weights), strict=True))
        assert (again.tokenizer, again.generation_config, again.source, again.checkpoint) == rest
        assert (again.family, again.config) == (model.family, model.config)
    assert repr(model) in repr(graph)


def test_split_and_merge() -> None:
    """Weights of another seed in the same graph; the shapes alone serve what restores a checkpoint."""
    graph, state = nnx.split(jaxlm.nnx.Module(small()))
    other = small(seed=1)
    _, state_of_other = nnx.split(jaxlm.nnx.Module(other))
    same(nnx.merge(graph, state_of_other)(TOKENS)[0], other.forward(TOKENS, other.weights)[0])
    shapes = nnx.state(nnx.eval_shape(lambda: jaxlm.nnx.Module(other)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)


def test_gradients_are_those_of_our_tree() -> None:
    model = small("gemma3", layer_types=["sliding_attention"])
    found = nnx.jit(nnx.grad(module_nats))(jaxlm.nnx.Module(model))
    expected = jax.jit(jax.grad(lambda w: nats(model.forward(TOKENS, w)[0])))(model.weights)
    for path, gradient in nnx.to_flat_state(found):
        of_ours = expected
        for key in path:
            of_ours = of_ours[key]
        np.testing.assert_array_equal(gradient[...], of_ours)
        assert np.abs(np.asarray(of_ours)).max() > 0
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(expected))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_is_optax_on_our_tree(dtype: Any) -> None:
    model = small(dtype=dtype)
    module = jaxlm.nnx.Module(model)
    optimizer = nnx.Optimizer(module, RULE, wrt=nnx.Param)
    first = train(module, optimizer)
    loss, weights, moments = plain_step(model)
    same((first, module.weights), (loss, weights))
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(nnx.state(optimizer.opt_state)), jax.tree.leaves(moments)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(module.weights)} == {np.dtype(dtype)}
    assert module(TOKENS)[0].dtype == jnp.float32
    assert train(module, optimizer) < first


def test_a_step_is_the_training_loops() -> None:
    model = small()
    pos = np.tile(np.arange(11, dtype=np.int32), (8, 1))
    batch = jax.tree.map(jnp.asarray, Batch(TOKENS[:, :-1], TOKENS[:, 1:], pos, pos > 3))
    module = jaxlm.nnx.Module(model)
    optimizer = nnx.Optimizer(module, RULE, wrt=nnx.Param)

    @nnx.jit
    def run(module: jaxlm.nnx.Module, optimizer: nnx.Optimizer) -> None:
        def mean(module: jaxlm.nnx.Module) -> jax.Array:
            sums = loss(model.family, model.config, module.weights, batch)
            return sums.loss / sums.tokens

        optimizer.update(module, nnx.grad(mean)(module))

    run(module, optimizer)
    state = jax.jit(partial(step.init_state, RULE))(model.weights)
    state, _ = jax.jit(step.make_step(model.family, model.config, RULE))(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), module.weights, state.weights)


def test_token_by_token_is_what_generate_writes() -> None:
    """Past the window of Gemma's sliding layer, 5 tokens."""
    model = tiny("gemma3")
    module = jaxlm.nnx.Module(model)
    forward = nnx.jit(lambda module, tokens, kv: module(tokens, kv))
    prompt = [[5, 9, 2, 77]]
    logits, kv = forward(module, np.array(prompt), module.init_kv(1, 16))
    tokens = [int(np.asarray(logits)[0, -1].argmax())]
    while len(tokens) < 12:
        logits, kv = forward(module, np.array([tokens[-1:]]), kv)
        tokens.append(int(np.asarray(logits)[0, -1].argmax()))
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    assert jaxlm.generate(model, prompt[0], **options).tokens == tokens
    assert jaxlm.generate(module.to_model(), prompt[0], **options).tokens == tokens
    with pytest.raises(ValueError, match=r"pass module\.to_model\(\)"):
        jaxlm.generate(module, prompt[0], **options)
    same(module([[1]], module.init_kv(1, 8), 3)[0], model.forward([[1]], model.weights, model.init_kv(1, 8), 3)[0])


def test_a_trained_module_is_exported(tmp_path) -> None:
    module = jaxlm.nnx.Module(small())
    train(module, nnx.Optimizer(module, RULE, wrt=nnx.Param))
    jaxlm.export(module.to_model(), tmp_path / "out", config={**CONFIGS["llama3"], "num_hidden_layers": 1})
    again = jaxlm.load(tmp_path / "out", device=jax.devices()[0])
    same(again.forward(TOKENS, again.weights)[0], module(TOKENS)[0])
    assert np.abs(np.asarray(again.weights["embed"]) - np.asarray(small().weights["embed"])).max() > 1e-3


def test_on_a_mesh() -> None:
    """Weights and moments stay where they lie, and a compiled call runs there without being told."""
    model = small(**ON_MESH)
    there = spread(model, "data=2,model=4")
    module = jaxlm.nnx.Module(there)
    kv = module.init_kv(8, 16)
    assert kv.layers[0]["k"].sharding.spec == jax.sharding.PartitionSpec("data", "model")
    logits, kv = nnx.jit(lambda module, kv: module(TOKENS, kv))(module, kv)
    assert kv.layers[0]["k"].sharding.spec == jax.sharding.PartitionSpec("data", "model")
    expected = np.asarray(model.forward(TOKENS, model.weights)[0])
    assert np.abs(np.asarray(logits) - expected).max() < 2e-5 * expected.std()
    assert logits.sharding.spec == mesh.spec("BTV", logits.shape, there.mesh)
    assert logits.sharding.spec == jax.sharding.PartitionSpec("data", None, "model")
    optimizer = nnx.Optimizer(module, RULE, wrt=nnx.Param)
    train(module, optimizer)
    for new, old in zip(jax.tree.leaves(module.weights), jax.tree.leaves(there.weights), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        assert np.abs(np.asarray(new) - np.asarray(old)).max() > 0
    moment = optimizer.opt_state[0].mu.layers[0]["q"][...]
    assert moment.sharding.is_equivalent_to(there.weights["layers"][0]["q"].sharding, 3)


def test_an_adapter_is_trained_alone() -> None:
    """Its leaves are nnx.LoRAParam, at their places in the tree; the base stays as it is."""
    model = small()
    model = beside(model, drawn(model, ("q", "down")))
    module = jaxlm.nnx.Module(model)
    same(module(TOKENS)[0], model.forward(TOKENS, model.weights)[0])
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))]
    assert paths == ["layers.0.down.a", "layers.0.down.b", "layers.0.q.a", "layers.0.q.b"]
    optimizer = nnx.Optimizer(module, RULE, wrt=nnx.LoRAParam)

    @nnx.jit
    def run(module: jaxlm.nnx.Module, optimizer: nnx.Optimizer) -> None:
        of_adapter = nnx.grad(module_nats, argnums=nnx.DiffState(0, nnx.LoRAParam))
        optimizer.update(module, of_adapter(module))

    run(module, optimizer)
    new, old = module.to_model().weights, model.weights
    assert jax.tree.structure(new) == jax.tree.structure(old)
    q, before = new["layers"][0]["q"], old["layers"][0]["q"]
    same((q.w, new["embed"]), (before.w, old["embed"]))
    assert min(np.abs(np.asarray(x - y)).max() for x, y in ((q.a, before.a), (q.b, before.b))) > 1e-3
    assert not np.array_equal(jaxlm.fuse(module.to_model()).weights["layers"][0]["q"], before.w)


def test_weights_that_were_replaced_are_given_up() -> None:
    model = small()
    module, first = jaxlm.nnx.Module(model), weakref.ref(model.weights["embed"])
    del model
    module.embed[...] = jnp.zeros(module.embed.shape)
    gc.collect()
    assert first() is None


def test_a_cache_is_made_outside() -> None:
    module = jaxlm.nnx.Module(small())
    with pytest.raises(ValueError, match="create the KV cache outside"):
        nnx.jit(lambda module: module.init_kv(1, 8))(module)


def test_without_flax(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "jaxlm.nnx")
    with pytest.raises(ModuleNotFoundError, match=r"^jaxlm\.nnx needs flax: pip install 'jaxlm\[flax\]'$"):
        importlib.import_module("jaxlm.nnx")

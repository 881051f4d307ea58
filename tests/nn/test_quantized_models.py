"""Whole models with quantized weights: their logits and texts, and all that walks over weights."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized_models import dense, quantized
from helpers.tiny_models import families

import jaxlm
from jaxlm import adapters
from jaxlm.devices import mesh
from jaxlm.inference.saved_prefixes import weights_digest
from jaxlm.loading import spread
from jaxlm.model import Model
from jaxlm.nn import lora, params
from jaxlm.nn.quantize import shapes
from jaxlm.nn.quantized import is_quantized, without_rounding

TOKENS = np.random.default_rng(0).integers(0, 199, (1, 9)).astype(np.int32)


def logits_of(model: Model, weights: Any) -> tuple[jax.Array, jax.Array]:
    """Logits of a prefill of eight tokens, and of a decoding step, which has other products."""
    kv = model.init_kv(1, 16)
    prefill, kv = model.forward(TOKENS[:, :8], weights, kv, 0)
    return prefill, model.forward(TOKENS[:, 8:], weights, kv, 8)[0]


@pytest.mark.parametrize("type", ["int8", "int4", pytest.param("fp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", families("llama3"))
def test_logits_equal_those_of_the_dequantized_weights(family: str, type: str) -> None:
    """But for the order of sums in float32. With inputs rounded to 8 bits, the difference is a few percent of the
    logits' standard deviation: each of a dozen products in a row adds an error of up to 0.4 % of its largest input."""
    model, same = quantized(family, type)
    exact = logits_of(same, same.weights)
    for found, expected in zip(logits_of(model, without_rounding(model.weights)), exact):
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.std()))
    if type != "fp8":
        differences = [jnp.abs(a - b).max() / b.std() for a, b in zip(logits_of(model, model.weights), exact)]
        assert 1e-4 < max(map(float, differences)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("type", ["int8-weights", "int4"])
@pytest.mark.parametrize("family", families())
def test_texts_states_and_activations_equal_those_of_the_dequantized_weights(family: str, type: str) -> None:
    model, same = quantized(family, type)
    model = replace(model, weights=without_rounding(model.weights))
    prompts = [[1, 5, 9], [3, 3]]
    assert jaxlm.generate(model, prompts, max_tokens=8, temperature=0) == jaxlm.generate(
        same, prompts, max_tokens=8, temperature=0
    )
    for a, b in zip(model.hidden_states(TOKENS), same.hidden_states(TOKENS), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(b.std()))
    names = ["layers.1.q", "layers.0.mlp"]
    found, expected = (each.activations(TOKENS, names, patch={"layers.0.attention": 0})[1] for each in (model, same))
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5 * float(expected[name].std()))


def test_on_a_mesh() -> None:
    """Every field has the sharding of its letters. Logits equal those of one device."""
    model, _ = quantized("llama3", "int4")
    model = replace(model, weights=without_rounding(model.weights))
    there = spread(model, "data=2,model=2")
    names = params.letters(model.family.PARAMS, there.weights)
    for letters, leaf in zip(jax.tree.leaves(names), jax.tree.leaves(there.weights), strict=True):
        assert leaf.sharding == mesh.sharding(letters, leaf.shape, there.mesh), letters
    assert not there.weights["layers"][0]["q"].q.is_fully_replicated
    tokens = TOKENS.repeat(2, 0)
    expected = model.forward(tokens, model.weights)[0]
    np.testing.assert_allclose(there.forward(tokens, there.weights)[0], expected, atol=2e-5 * float(expected.std()))


def adapter_of(model: Model, rank: int, seed: int) -> Any:
    """An adapter whose b is not zero."""
    rows = lora.targets(model.family.PARAMS, model.config, ("q", "down"))
    made = lora.init(rows, model.config.L, rank, 0.5, jax.random.key(seed))
    return jax.tree.map(lambda leaf: replace(leaf, b=leaf.b + 0.1), made, is_leaf=lora.is_lora)


def test_fused_weights_are_arrays() -> None:
    """w + s b a of the dequantized w, in its dtype. Weights without an adapter stay quantized. Stacked layers too, and
    on a mesh with the sharding of the weight."""
    model, same = quantized("llama3", "int4")
    adapted, expected = (
        replace(each, weights=lora.join(each.weights, adapter_of(model, 2, 0))) for each in (model, same)
    )
    expected = jaxlm.fuse(expected).weights["layers"][1]
    fused = jaxlm.fuse(adapted).weights["layers"][1]
    assert is_quantized(fused["k"])
    for name in ("q", "down"):  # in groups; in channels
        np.testing.assert_allclose(fused[name], expected[name], atol=1e-6)
    stacked = lora.fused(lora.join(params.stack(model.weights), params.stack(adapter_of(model, 2, 0))))
    np.testing.assert_allclose(stacked["layers"]["stacked"][0]["q"][1], expected["q"], atol=1e-6)
    there = jaxlm.fuse(spread(adapted, "data=2,model=2"))
    assert there.weights["layers"][1]["q"].sharding == mesh.sharding("NHD", fused["q"].shape, there.mesh)
    np.testing.assert_allclose(there.weights["layers"][1]["q"], expected["q"], atol=1e-6)


def test_several_adapters_share_a_quantized_base() -> None:
    model, same = quantized("llama3", "int4")
    both = []
    for each in (model, same):
        weights = without_rounding(each.weights)
        base = replace(each, weights=weights)
        adapted = [replace(base, weights=lora.join(weights, adapter_of(model, rank, rank))) for rank in (2, 3)]
        with pytest.raises(ValueError, match="is not an adapter of this model"):
            adapters.combine(base, [replace(adapted[0], weights=copy.deepcopy(adapted[0]).weights)])
        combined = adapters.combine(base, adapted)
        rows = adapters.multi_lora.for_rows(combined.weights, jnp.array([0, 1, -1]))
        both.append(base.forward(TOKENS.repeat(3, 0), rows)[0])
    np.testing.assert_allclose(both[0], both[1], atol=2e-5 * float(both[1].std()))


def test_copies_and_other_weights() -> None:
    """A repr names type and memory; shapes are checked, of stacked layers too."""
    model, same = quantized("llama3", "int4")
    assert f", int4 in {params.nbytes(model.weights) / 1e6:.1f} MB, float32)" in repr(model)
    assert "int4" in model._repr_html_()
    assert "int8-weights in" in repr(replace(model, weights=without_rounding(quantized("llama3", "int8")[0].weights)))
    assert "int" not in repr(same)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert jax.tree.structure(other.weights) == jax.tree.structure(model.weights)
        for a, b in zip(jax.tree.leaves(other.weights), jax.tree.leaves(model.weights)):
            np.testing.assert_array_equal(a, b)
    replace(model, weights=params.stack(model.weights))
    first, second = model.weights["layers"]
    wrong = {**model.weights, "layers": [{**first, "q": first["k"]}, second]}
    for weights in (wrong, params.stack({**wrong, "layers": [wrong["layers"][0]] * 2})):
        with pytest.raises(ValueError, match=r"layers\.0\.q has the shape \[2, 16, 64\], not \[4, 16, 64\]"):
            replace(model, weights=weights)


def test_the_digest_of_weights_has_their_form() -> None:
    """Also below an adapter: int8 and int8-weights have equal arrays and other logits."""
    model, _ = quantized("llama3", "int8")
    adapter = adapter_of(model, 2, 0)
    digests = {
        weights_digest(replace(model, weights=form(weights))).tobytes()
        for weights in (model.weights, without_rounding(model.weights))
        for form in (lambda weights: weights, lambda weights: lora.join(weights, adapter))
    }
    assert len(digests) == 4


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_shapes_are_those_of_the_weights(type: str) -> None:
    model, _ = quantized("llama3", type)
    found = shapes(model.family.PARAMS, model.config, jnp.float32, type)
    assert jax.tree.structure(found) == jax.tree.structure(model.weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(model.weights)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.slow
def test_an_nnx_module_trains_an_adapter_on_a_quantized_base() -> None:
    from flax import nnx

    from jaxlm.nnx import Module

    gradients = []
    for each in quantized("llama3", "int4"):
        weights = without_rounding(each.weights)
        module = Module(replace(each, weights=lora.join(weights, adapter_of(each, 2, 0))))
        gradient = nnx.grad(lambda m: m(TOKENS)[0].astype(jnp.float32).std(), argnums=nnx.DiffState(0, nnx.LoRAParam))
        gradients.append(jax.tree.leaves(gradient(module)))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    assert len(gradients[0]) == 2 * 2 * 2


def test_gradients_of_other_weights_of_a_quantized_model() -> None:
    """Of norms, which are arrays, through quantized weights."""
    model, same = quantized("llama3", "int4")
    found, expected = (
        jax.grad(lambda norm, w=w, m=m: m.forward(TOKENS, {**w, "norm": norm})[0].std())(w["norm"])
        for m, w in ((model, without_rounding(model.weights)), (same, dense(model.weights)))
    )
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))

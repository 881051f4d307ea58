"""One forward pass computed in several ways: layers unrolled and scanned, with and without activation checkpointing, in
every dtype, with positions in every format. All must give the same numbers."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import DISTINCT, FAMILIES, FULL, SLIDING, UNIFORM, families, layers, tiny

from jaxlm import Model
from jaxlm.model import positions
from jaxlm.nn import kv_cache as caches
from jaxlm.nn import layer_types, params

TOKENS = np.random.RandomState(0).randint(0, 199, (2, 14)).astype(np.int32)
TOKENS[:, 3] = 0


def deep(family: str) -> tuple[Model, int]:
    """A model and the period of its layer types: those with two types have two periods and one remaining layer."""
    if family in UNIFORM:
        return tiny(family), 1
    return tiny(family, **layers(family, 5)), 2


stack, unstack = jax.jit(params.stack, static_argnums=1), jax.jit(params.unstack)


def close(a: Any, b: Any, limit: float = 1e-5) -> None:
    """Every leaf equal to within `limit` standard deviations of it."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= limit * (np.asarray(y).std() + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_equals_unrolled(family: str) -> None:
    model, period = deep(family)
    stacked = stack(model.weights, period)
    assert layer_types.layer_period(model.config) == period
    close(unstack(stacked), model.weights, 0)
    states = model.hidden_states(TOKENS)
    assert len(states) == model.config.L + 1
    close(model.hidden_states(TOKENS, stacked), states)
    if family == "gemma3":  # with a KV cache stacked layers are unrolled
        logits, _ = model.forward(TOKENS, stacked, model.init_kv(2, 14))
        close(logits, np.asarray(states[-1]) @ np.asarray(model.weights["embed"]).T)


WAYS = [("qwen3", "checkpointed"), ("gemma3", "scanned"), pytest.param("qwen3", "scanned", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_gradients_with_activation_checkpointing_and_scanned_layers(family: str, way: str) -> None:
    model, period = deep(family)
    tokens, pos = jnp.asarray(TOKENS), jnp.tile(jnp.arange(14, dtype=jnp.int32), (2, 1))

    @partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
    def gradient(weights: Any, remat: Any) -> Any:
        def loss(weights: Any) -> jax.Array:
            x, _ = model.family.forward(model.config, tokens, weights, None, pos, remat=remat)
            return (jax.nn.log_softmax(model.family.logits(model.config, x, weights))[:, :-1, 7] ** 2).mean()

        return jax.value_and_grad(loss)(weights)

    value, plain = gradient(model.weights, None)
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(plain))
    if way == "checkpointed":  # per layer, so one family is enough
        close(gradient(model.weights, jax.checkpoint_policies.dots_saveable), (value, plain), 1e-4)
    else:
        scanned, stacked = gradient(stack(model.weights, period), True)
        close((scanned, unstack(stacked)), (value, plain), 1e-4)


def test_stacked_layers_out_of_order_are_noticed() -> None:
    """The planted fault: a period of the wrong length mixes sliding-window and full-attention layers."""
    model, _ = deep("gemma3")
    *_, expected = model.hidden_states(TOKENS)
    swapped = [model.weights["layers"][i] for i in (1, 0, 2, 3, 4)]
    *_, out = model.hidden_states(TOKENS, {**model.weights, "layers": swapped})
    assert np.abs(np.asarray(out) - np.asarray(expected)).max() > 0.1
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        model.forward(TOKENS, stack(model.weights, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_implicit_dtype_promotion(family: str, dtype: str) -> None:
    model = tiny(family, dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        logits, _ = jax.eval_shape(model.forward, TOKENS, model.weights)
        empty = model.init_kv(2, 16, chunk=4, dtype=dtype)
        step, kv = jax.eval_shape(model.forward, TOKENS[:, :2], model.weights, empty)
        one, _ = jax.eval_shape(model.forward, TOKENS[:1, :1], model.weights, model.init_kv(1, 4))
        states = jax.eval_shape(model.hidden_states, TOKENS)
    assert {logits.dtype, step.dtype, one.dtype} == {jnp.dtype("float32")}
    assert {a.dtype for a in [*states, *(layer["k"] for layer in kv.layers)]} == {jnp.dtype(dtype)}


# Limits in standard deviations of the logits, for rounding in every layer: single tokens take another matmul path.
@pytest.mark.parametrize(
    ("dtype", "B", "kinds", "limit"),
    [
        ("float32", 2, [SLIDING], 1e-5),
        ("bfloat16", 2, [SLIDING, FULL], 0.1),
        ("bfloat16", 1, [SLIDING, FULL], 0.1),
        ("float16", 2, [FULL], 0.01),
    ],
)
def test_batched_decoding_in_every_dtype(dtype: str, B: int, kinds: list[str], limit: float) -> None:
    """Grouped-query attention over a KV cache. (XLA's CPU backend compiles bfloat16 matmuls that it cannot run.)"""
    model = tiny("gemma3", dtype=dtype, num_hidden_layers=len(kinds), layer_types=kinds)
    expected = np.asarray(model.forward(TOKENS, model.weights)[0])[:B]
    logits, kv = model.forward(TOKENS[:B, :6], model.weights, model.init_kv(B, 16, chunk=6))
    assert np.abs(np.asarray(logits) - expected[:, :6]).max() <= limit * expected.std()
    logits, kv = model.forward(TOKENS[:B, 6:7], model.weights, kv)
    assert np.abs(np.asarray(logits)[:, 0] - expected[:, 6]).max() <= limit * expected.std()


def test_positions_in_every_format() -> None:
    tokens, pos = jnp.asarray(TOKENS), np.tile(np.arange(14), (2, 1))
    for value in (None, 0, np.int64(0), jnp.int32(0), pos, jnp.asarray(pos)):
        resolved = positions(tokens, None, value)
        assert resolved.dtype == jnp.int32
        np.testing.assert_array_equal(resolved, pos)
    np.testing.assert_array_equal(positions(tokens, None, 9), pos + 9)
    empty = caches.init(2, 30, [None], 1, 2, "float32", None)
    cache, _ = jax.jit(caches.advance)(empty, np.array([[0, 1, 2], [0, -1, -1]], np.int32))
    np.testing.assert_array_equal(positions(tokens, cache, None), pos + [[3], [1]])
    for wrong in (pos[:1], pos[:, :3], pos[0]):
        with pytest.raises(ValueError, match="pos"):
            positions(tokens, None, wrong)


def test_forward_continues_after_the_cached_tokens() -> None:
    model = tiny("qwen3", num_hidden_layers=1)
    expected, none = model.forward(TOKENS.tolist(), model.weights)
    assert none is None
    expected = np.asarray(expected)
    kv = model.init_kv(2, 14)
    for half in (TOKENS[:, :7], TOKENS[:, 7:]):
        logits, kv = model.forward(half, model.weights, kv)
    close(logits, expected[:, 7:])
    other, _ = model.forward(TOKENS[:, 7:], model.weights, kv, 0)
    assert np.abs(np.asarray(other) - expected[:, 7:]).max() > 0.1


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_a_users_own_loop_compiles_once_and_donates_the_cache(family: str) -> None:
    model, _ = deep(family)
    weights, forward, init_kv, _, _ = replace(model, weights=jax.device_put(model.weights, jax.devices()[1]))
    decode = jax.jit(forward, donate_argnums=2)
    first = kv = init_kv(2, 14)
    for pos in range(5):
        logits, kv = decode(jnp.asarray(TOKENS[:, pos, None]), weights, kv, pos)
    assert decode._cache_size() == 1
    assert all(a.is_deleted() for a in jax.tree.leaves(first))
    decode = jax.jit(lambda *args: forward(*args), donate_argnums=2)  # jit(forward) would share the count above
    out, kv = forward(TOKENS[:, :3], weights, init_kv(2, 14), 0)
    for pos in range(3, 7):  # as in the README: each token is made of the logits before it
        out, kv = decode(out[:, -1:].argmax(-1), weights, kv, pos)
    assert decode._cache_size() == 1
    expected, _ = model.forward(TOKENS[:, :5], model.weights)
    close(logits[:, 0], expected[:, -1])


def test_rows_of_a_batch_are_independent_and_attention_is_causal() -> None:
    model = tiny("gemma3")

    def logits(tokens: np.ndarray) -> np.ndarray:
        return np.asarray(model.forward(tokens, model.weights)[0])

    expected, other = logits(TOKENS), logits(np.stack([TOKENS[0], TOKENS[1, ::-1]]))
    np.testing.assert_array_equal(other[0], expected[0])
    changed = TOKENS.copy()
    changed[0, 9] += 1
    later = logits(changed)
    np.testing.assert_array_equal(later[0, :9], expected[0, :9])
    assert np.abs(later[0, 9:] - expected[0, 9:]).max() > 0.1


def test_gemma_rounds_its_embedding_scale_to_the_activation_dtype() -> None:
    model = tiny("gemma3", num_hidden_layers=1, layer_types=[FULL], dtype="bfloat16")
    rows = np.asarray(model.weights["embed"])[TOKENS]
    rounded = np.sqrt(48.0).astype(rows.dtype)
    assert rounded != np.sqrt(48.0)
    first = np.asarray(model.hidden_states(TOKENS)[0])
    np.testing.assert_array_equal(first, rows * rounded)
    assert (first != (rows.astype(np.float32) * np.float32(48**0.5)).astype(rows.dtype)).any()

"""One forward pass in its forms: unrolled and scanned, with and without rematerialisation, in every type and with
positions given in every way. Each must give the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings.tiny import FULL, SLIDING, tiny

from jaxlm import Model, params

FAMILIES = ("llama3", "qwen3", "olmo2", "gemma3")
TOKENS = np.random.RandomState(0).randint(0, 199, (2, 14)).astype(np.int32)
TOKENS[:, 3] = 0


def deep(family: str, **fields: Any) -> tuple[Model, int]:
    """Five layers and the period of unlike ones: stacked, Gemma has one period and two layers that are left over."""
    if family == "gemma3":
        kinds = [SLIDING, SLIDING, FULL, SLIDING, SLIDING]
        return tiny(family, num_hidden_layers=5, layer_types=kinds, **fields), 3
    return tiny(family, num_hidden_layers=3, **fields), 1


def close(a: Any, b: Any, limit: float = 1e-5) -> None:
    """Every leaf equal to within `limit` deviations of it."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= limit * (np.asarray(y).std() + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_and_rematerialised_equal_unrolled(family: str) -> None:
    model, period = deep(family)
    stacked = params.stack(model.weights, period)
    assert len(params.period(model.config.windows)) == period
    close(params.unstack(stacked), model.weights, 0)
    expected, _ = model.forward(TOKENS, model.weights)
    close(model.forward(TOKENS, stacked)[0], expected)
    close(model.hidden_states(TOKENS, stacked), model.hidden_states(TOKENS))
    kv = model.init_kv(2, 14)
    close(model.forward(TOKENS, stacked, kv), model.forward(TOKENS, model.weights, kv))  # a cache unrolls them

    pos = jnp.tile(jnp.arange(14, dtype=jnp.int32), (2, 1))

    def loss(weights: Any, remat: Any = None) -> jax.Array:
        x, _ = model.family.forward(model.config, TOKENS, weights, None, pos, remat=remat)
        return (jax.nn.log_softmax(model.family.logits(model.config, x, weights))[:, :-1, 7] ** 2).mean()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, plain = gradient(model.weights)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    for remat in (True, jax.checkpoint_policies.dots_saveable):
        close(gradient(model.weights, remat), (value, plain), 1e-4)
    close(params.unstack(gradient(stacked, True)[1]), plain, 1e-4)


def test_stacked_layers_out_of_order_show() -> None:
    """The planted fault: a period of the wrong length mixes local with global layers."""
    model, _ = deep("gemma3")
    expected, _ = model.forward(TOKENS, model.weights)
    out, _ = model.forward(TOKENS, {**model.weights, "layers": model.weights["layers"][::-1]})
    assert np.abs(out - expected).max() > 0.1
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        model.forward(TOKENS, params.stack(model.weights, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_type_is_promoted_by_accident(family: str, dtype: str) -> None:
    model = tiny(family, dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        logits, _ = model.forward(TOKENS, model.weights)
        whole, kv = model.forward(TOKENS[:, :6], model.weights, model.init_kv(2, 16, chunk=6))
        step, kv = model.forward(TOKENS[:, 6:7], model.weights, kv)
        one, _ = model.forward(TOKENS[:1, :1], model.weights, model.init_kv(1, 4))
        states = model.hidden_states(TOKENS)
    assert logits.dtype == whole.dtype == step.dtype == one.dtype == jnp.float32
    assert {a.dtype for a in [*states, *(layer["k"] for layer in kv.layers)]} == {jnp.dtype(dtype)}
    # Products of one token run another way than products of many; in half precision both round every layer's output.
    limit = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    for ours, column in ((whole[:, -1], 5), (step[:, 0], 6), (one[:, 0], 0)):
        assert np.abs(ours - logits[: len(ours), column]).max() <= limit * logits.std()


def test_positions_in_every_form() -> None:
    model = tiny("qwen3")
    expected, none = model.forward(TOKENS, model.weights)
    assert none is None
    pos = np.tile(np.arange(14), (2, 1))
    for given in (0, np.int64(0), jnp.int32(0), pos, jnp.asarray(pos)):
        np.testing.assert_array_equal(model.forward(TOKENS, model.weights, None, given)[0], expected)
    kv = model.init_kv(2, 14)
    first, kv = model.forward(TOKENS[:, :9], model.weights, kv)
    for given in (None, 9, pos[:, 9:]):
        rest, _ = model.forward(TOKENS[:, 9:], model.weights, kv, given)
        close(np.concatenate([first, rest], axis=1), expected)
    close(model.forward(TOKENS.tolist(), model.weights)[0], expected, 0)
    for wrong in (pos[:1], pos[:, :3], pos[0]):
        with pytest.raises(ValueError, match="it must be one int or have the tokens' shape"):
            model.forward(TOKENS, model.weights, None, wrong)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = tiny("gemma3")
    expected, _ = model.forward(TOKENS, model.weights)
    other, _ = model.forward(np.stack([TOKENS[0], TOKENS[1, ::-1]]), model.weights)
    np.testing.assert_array_equal(other[0], expected[0])
    changed = TOKENS.copy()
    changed[0, 9] += 1
    later, _ = model.forward(changed, model.weights)
    np.testing.assert_array_equal(later[0, :9], expected[0, :9])
    assert np.abs(later[0, 9:] - expected[0, 9:]).max() > 0.1

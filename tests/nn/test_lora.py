"""LoRA weights against merged weights: every matmul, every family, unrolled, scanned and on a mesh."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_adapter import beside, drawn
from helpers.tiny_models import DISTINCT, FAMILIES, UNIFORM, families, layers, tiny

import jaxlm
from jaxlm import Model, nn
from jaxlm.devices import mesh
from jaxlm.loading import spread
from jaxlm.nn import layer_types, lora, params

SIZES = {"N": 6, "K": 3, "H": 5, "D": 16, "F": 20, "V": 11, "B": 2, "T": 3}
SPECS = ["BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTNH,DNH->BTD", "BTD,FD->BTF", "BTF,DF->BTD", "BTD,VD->BTV"]
TOKENS = np.arange(96, dtype=np.int32).reshape(8, 12)


def test_specs_cover_every_matmul_of_every_family() -> None:
    letters = {row.letters for name in FAMILIES for row in lora.products(*of(name))}
    assert letters == {spec.split(",")[1].split("->")[0] for spec in SPECS}


def of(name: str) -> tuple[Any, Any]:
    model = tiny(name, tie_word_embeddings=False)
    return model.family.PARAMS, model.config


def leaf_for(spec: str, dtype: Any = jnp.float32, rank: int = 4) -> lora.Lora:
    letters = spec.split(",")[1].split("->")[0]
    row = params.TensorSpec("layers.0.w", letters, tuple(SIZES[x] for x in letters), (), ())
    shapes = [row.shape, *(half.shape for half in lora.halves(row, rank))]
    random = np.random.default_rng(1)
    w, a, b = (jnp.asarray(random.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes)
    return lora.Lora(w, a, b, None, 0.7)


def inputs_of(spec: str, dtype: Any = jnp.float32, **sizes: int) -> np.ndarray:
    shape = tuple({**SIZES, **sizes}[letter] for letter in spec.split(",")[0])
    return np.random.default_rng(2).standard_normal(shape, np.float32).astype(dtype)


def merged_of(leaf: lora.Lora) -> np.ndarray:
    """W + scale * B A (eq. 3) in float64."""
    w, a, b = (np.asarray(part).astype(np.float64) for part in (leaf.w, leaf.a, leaf.b))
    return w + 0.7 * (b.reshape(-1, len(a)) @ a.reshape(len(a), -1)).reshape(w.shape)


@partial(jax.jit, static_argnums=0)
def product(spec: str, x: jax.Array, leaf: lora.Lora) -> tuple[jax.Array, jax.Array]:
    """The matmul with a Lora, and its merged weight."""
    return nn.einsum(spec, x, leaf), leaf.merged()


@pytest.mark.parametrize(("B", "T"), [(2, 3), (1, 1)])
@pytest.mark.parametrize("spec", SPECS)
def test_einsum_equals_that_of_the_merged_weight(spec: str, B: int, T: int) -> None:
    leaf, x = leaf_for(spec), inputs_of(spec, B=B, T=T)
    with jax.numpy_dtype_promotion("strict"):
        ours, merged = product(spec, x, leaf)
    expected = merged_of(leaf)
    exact = np.einsum(spec, x.astype(np.float64), expected)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6 * exact.std())
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6 * expected.std())
    assert np.abs(np.einsum(spec, x, np.asarray(leaf.w)) - exact).max() > exact.std() / 2


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_accumulates_in_float32(spec: str) -> None:
    """Three roundings: of x A, of the output, and of the merged weight."""
    leaf, x = leaf_for(spec, jnp.bfloat16), inputs_of(spec, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        ours, merged = product(spec, x, leaf)
    exact = np.einsum(spec, x.astype(np.float64), merged_of(leaf))
    assert ours.dtype == merged.dtype == jnp.bfloat16
    assert np.abs(np.asarray(ours, np.float32) - exact).max() < 3 * 2**-8 * np.abs(exact).max()


@pytest.fixture(scope="module", params=families(*DISTINCT))
def pair(request) -> tuple[Model, Model]:
    """A model with an adapter, and the fused model: two periods of layers, and an adapted untied head."""
    periods = {} if request.param in UNIFORM else layers(request.param, 4)
    model = tiny(request.param, tie_word_embeddings=False, **periods)
    adapted = beside(model, drawn(model, ("all-linear", "head")))
    return adapted, Model(model.family, model.config, jax.jit(lora.fused)(adapted.weights))


def logits(model: Model, weights: Any = None) -> np.ndarray:
    return np.asarray(model.forward(TOKENS, model.weights if weights is None else weights)[0])


def test_model_with_an_adapter_equals_the_fused_model(pair: tuple[Model, Model]) -> None:
    adapted, whole = pair
    expected = logits(whole)
    assert np.abs(logits(adapted) - expected).max() < 2e-5 * expected.std()
    bare = jax.tree.map(lambda leaf: leaf.w if lora.is_lora(leaf) else leaf, adapted.weights, is_leaf=lora.is_lora)
    assert np.abs(logits(adapted, bare) - expected).max() > expected.std()
    period = layer_types.layer_period(adapted.config)
    stacked = jax.jit(params.stack, static_argnums=1)(adapted.weights, period)
    assert np.abs(logits(adapted, stacked) - expected).max() < 2e-5 * expected.std()
    again = jax.jit(lambda weights: params.unstack(lora.fused(weights)))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), again, whole.weights)


def test_join_of_listed_and_stacked_weights() -> None:
    model = tiny("llama3")
    tree = drawn(model, ("q", "down"))
    joined = params.stack(lora.join(model.weights, tree))
    other = lora.join(params.stack(model.weights), params.stack(tree))
    assert jax.tree.structure(joined) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, joined, other)
    assert [path for path, _ in lora.leaves(lora.join(model.weights, tree))] == [
        "layers.0.down", "layers.0.q", "layers.1.down", "layers.1.q"
    ]  # fmt: skip


def test_on_a_mesh() -> None:
    """Every leaf has the sharding of its letters. Text, logits and fused weights equal those of one device."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    model = tiny("qwen3", num_hidden_layers=1, **sizes)
    model = beside(model, drawn(model, ("all-linear", "head")))
    there = spread(model, "data=2,model=4")
    letters = jax.tree.leaves(params.letters(model.family.PARAMS, there.weights))
    for own, leaf in zip(letters, jax.tree.leaves(there.weights), strict=True):
        assert leaf.sharding == mesh.sharding(own, leaf.shape, there.mesh), own
    assert {"rNH", "NHr", "KHr", "rF", "Fr"} <= set(letters)
    expected = logits(model)
    assert np.abs(logits(there) - expected).max() < 2e-5 * expected.std()
    text = [1, 5, 9, *jaxlm.generate(there, [1, 5, 9], max_tokens=9, temperature=0, ignore_eos=True).tokens]
    whole_text, _ = model.forward(np.array([text] * 8), model.weights)
    assert text[3:] == np.asarray(whole_text)[0, 2:-1].argmax(-1).tolist()
    whole = jaxlm.fuse(there)
    for own, leaf in zip(
        jax.tree.leaves(params.letters(model.family.PARAMS, whole.weights)), jax.tree.leaves(whole.weights)
    ):
        assert leaf.sharding == mesh.sharding(own, leaf.shape, there.mesh), own
    assert np.abs(logits(whole) - expected).max() < 2e-5 * expected.std()


def test_an_adapter_adds_no_collectives() -> None:
    """The all-reduces after `o` and `down` include the [B,T,r] of the adapter."""
    model = tiny("llama3", num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, vocab_size=200)
    there = spread(beside(model, drawn(model)), "data=2,model=4")
    kv, tokens = there.init_kv(4, 64, chunk=16), jnp.zeros((4, 1), jnp.int32)
    with mesh.use_mesh_of(there.weights):
        program = jax.jit(lambda w, kv, t, p: there.family.forward(there.config, t, w, kv, p), donate_argnums=1)
        text = program.lower(there.weights, kv, tokens, tokens).compile().as_text()
    found = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    assert [kind for _, kind in found] == ["all-reduce"] * 3
    assert ["f32[2,1,3]" in shapes for shapes, _ in found] == [False, True, True]


def test_a_new_adapter_does_not_change_the_model() -> None:
    model = tiny("llama3")
    rows = lora.targets(model.family.PARAMS, model.config, ["all-linear"])
    tree = lora.init(rows, 2, 8, 2.0, jax.random.key(0))
    np.testing.assert_array_equal(logits(beside(model, tree)), logits(model))
    for row in rows:
        leaf = params.get(tree, row.path)
        inputs = math.prod(leaf.a.shape[1:])
        bound = inputs**-0.5
        assert 0.9 * bound < np.abs(leaf.a).max() <= bound
        assert leaf.a.shape[0] == leaf.b.shape[-1] == 8
        assert not np.asarray(leaf.b).any()


def test_parameters_are_counted_and_in_the_repr() -> None:
    model = tiny("llama3")
    adapted = beside(model, drawn(model, ("q", "v"), rank=3))
    assert lora.count(adapted.weights) == 2 * 3 * ((48 + 48) + (48 + 24))
    assert lora.count(params.stack(adapted.weights)) == lora.count(adapted.weights)
    assert f" parameters and {2 * 3 * 168:,} of an adapter, float32)" in repr(adapted)
    assert "adapter" not in repr(jaxlm.fuse(adapted))


def test_fuse_needs_an_adapter_and_export_a_fused_model(tmp_path) -> None:
    model = tiny("llama3")
    with pytest.raises(ValueError, match="adapter"):
        jaxlm.fuse(model)
    with pytest.raises(ValueError, match="fuse"):
        jaxlm.export(beside(model, drawn(model)), tmp_path / "out")


def test_scale() -> None:
    assert lora.scale(32, 16) == 2
    assert lora.scale(32, 16, rslora=True) == 8


def targets(names: list[str], **fields: Any) -> list[str]:
    model = tiny("llama3", num_hidden_layers=1, **fields)
    return [row.path for row in lora.targets(model.family.PARAMS, model.config, names)]


def test_targets() -> None:
    assert targets(["q", "v_proj"]) == ["layers.0.q", "layers.0.v"]
    linear = [f"layers.0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert targets(["all-linear"]) == linear
    assert targets(["all-linear", "lm_head"], tie_word_embeddings=False) == [*linear, "head"]


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (["q", "query"], {}, "query: choose from q, k, v, o, gate, up, down, head, all-linear"),
        (["norm"], {}, "norm"),
        (["embed_tokens", "embed"], {}, "embed, embed_tokens"),
        (["lm_head"], {"tie_word_embeddings": True}, "tied"),
    ],
)
def test_unknown_targets_are_rejected(names: list[str], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        targets(names, **fields)
    assert message in str(error.value)


# Dropout


def test_dropout_keeps_the_mean() -> None:
    x = jnp.ones((4, 8, 512))
    y = np.asarray(lora.dropped(x, jax.random.key(0), 0.25))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.02


def test_dropout_is_on_the_input_of_the_adapter_alone() -> None:
    leaf = leaf_for("BTD,FD->BTF")
    x = jnp.asarray(inputs_of("BTD,FD->BTF"))
    [keyed] = lora.keyed([leaf], jax.random.key(7), 0.5)
    y = lora.dropped(x, keyed.key, 0.5)
    x, y = np.asarray(x), np.asarray(y)
    expected = np.einsum("BTD,FD->BTF", x, leaf.w) + 0.7 * np.einsum("BTD,rD,Fr->BTF", y, leaf.a, leaf.b)
    ours, _ = product("BTD,FD->BTF", x, keyed)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * expected.std())
    assert lora.keyed([leaf], jax.random.key(7), 0.0)[0] is leaf


def test_every_adapted_weight_has_its_own_dropout_mask() -> None:
    """So do the layers of a scan. The same key gives the same masks."""
    model = tiny("llama3", num_hidden_layers=3)
    tree = params.stack(drawn(model, ("q", "k")))
    key = jax.random.key(0)
    keys = [jax.random.key_data(leaf.key) for _, leaf in lora.leaves(lora.keyed(tree, key, 0.5))]
    flat = np.concatenate([np.asarray(k).reshape(-1, k.shape[-1]) for k in keys])
    assert len({tuple(k) for k in flat.tolist()}) == 6
    seen = [logits(model, lora.join(params.stack(model.weights), lora.keyed(tree, k, 0.5)))
            for k in (key, key, jax.random.key(1))]  # fmt: skip
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0] - seen[2]).max() > 0.1 * seen[0].std()


def test_layers_of_a_scan_have_different_dropout_masks() -> None:
    """Two layers with the same weights: with one mask for both, their outputs would be equal."""
    model = tiny("llama3", num_hidden_layers=2)
    tree = params.stack(drawn(model, ("q",)))
    [(_, leaf)] = lora.leaves(lora.keyed(tree, jax.random.key(0), 0.5))
    x = jnp.ones((1, 4, 48))

    def one(x: jax.Array, own: lora.Lora) -> tuple[jax.Array, jax.Array]:
        return x, lora.dropped(x, own.key, own.rate)

    _, masks = jax.lax.scan(one, x, leaf)
    assert 0.2 < (np.asarray(masks[0]) == np.asarray(masks[1])).mean() < 0.8

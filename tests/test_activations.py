"""Model.activations: names, values, patches and gradients, for every family."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_adapter import drawn
from helpers.tiny_models import DISTINCT, families, layers, tiny

from jaxlm import Model
from jaxlm.loading import spread
from jaxlm.nn import layer_types, lora, params, rms_norm

L = 3
TOKENS = np.random.RandomState(0).randint(0, 199, (2, 9)).astype(np.int32)
OTHER = TOKENS[:, ::-1].copy()
COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module", params=families(*DISTINCT))
def model(request: pytest.FixtureRequest) -> Model:
    return make(request.param)


@pytest.fixture(scope="module", params=["llama3", "gemma3"])
def one_of_two(request: pytest.FixtureRequest) -> Model:
    """For tests with large programs: a family whose contributions have no norm behind them, and one with norms."""
    return make(request.param)


def make(family: str, **options: Any) -> Model:
    return tiny(family, **layers(family, L), **options)


def close(a: Any, b: Any, limit: float = 1e-5) -> bool:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and np.abs(a - b).max() <= limit * b.std()


def equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def without(model: Model, layer: int, name: str) -> Model:
    """The model with a weight of zeros."""
    layers = [dict(w) for w in model.weights["layers"]]
    layers[layer][name] = jnp.zeros_like(layers[layer][name])
    return replace(model, weights={**model.weights, "layers": layers})


# Names and values


def test_names(model: Model) -> None:
    logits, acts = model.activations(TOKENS, "*")
    assert tuple(acts) == model.activation_names
    assert [name.removeprefix("layers.1.") for name in acts if name.startswith(("e", "layers.1"))] == [
        "embedding", "q", "k", "v", "o.input", "o", "gate", "up", "down.input", "down",
        "attention", "residual_mid", "mlp", "residual",
    ]  # fmt: skip
    cfg, stream = model.config, (2, 9, model.config.D)
    shapes = {"q": (2, 9, cfg.N, cfg.H), "k": (2, 9, cfg.K, cfg.H), "v": (2, 9, cfg.K, cfg.H)}
    shapes |= dict.fromkeys(("gate", "up", "down.input"), (2, 9, cfg.F)) | {"o.input": shapes["q"]}
    for name, value in acts.items():
        assert value.shape == shapes.get(name.split(".", 2)[-1], stream), name
        assert value.dtype == model.dtype
    assert close(logits, model.forward(TOKENS, model.weights)[0])


def test_patterns_select_names_without_duplicates() -> None:
    model = make("llama3")
    names = ["layers.1.mlp", "layers.*.mlp", "layers.[01].residual"]
    expected = ["layers.1.mlp", "layers.0.mlp", "layers.2.mlp", "layers.0.residual", "layers.1.residual"]
    assert list(model.activations(TOKENS, names)[1]) == expected
    assert model.activations(TOKENS)[1] == {}


def test_the_residual_stream_is_that_of_hidden_states(model: Model) -> None:
    _, acts = model.activations(TOKENS, ["embedding", "layers.*.residual"])
    states = model.hidden_states(TOKENS)
    assert len(acts) == len(states) == L + 1
    for ours, expected in zip(list(acts.values())[:-1], states[:-1], strict=True):
        assert close(ours, expected)
    offset = 1.0 if model.family.NORM_IDENTITY == 0 else 0.0
    last = acts[f"layers.{L - 1}.residual"]
    assert close(rms_norm(last, model.weights["norm"], model.config.eps, offset=offset), states[-1])


def test_embedding_and_contributions_sum_to_the_residual_stream(model: Model) -> None:
    _, acts = model.activations(TOKENS, "*")
    total = acts["embedding"]
    for i in range(L):
        total += acts[f"layers.{i}.attention"]
        assert close(total, acts[f"layers.{i}.residual_mid"], 1e-6)
        total += acts[f"layers.{i}.mlp"]
        assert close(total, acts[f"layers.{i}.residual"], 1e-6)


def test_contributions_are_projections_before_or_after_their_norm(model: Model) -> None:
    _, acts = model.activations(TOKENS, "*")
    of_olmo = ("attn_norm", "mlp_norm", 0.0)
    norms = {"olmo2": of_olmo, "olmo3": of_olmo, "gemma3": ("attn_out_norm", "mlp_out_norm", 1.0)}
    after = norms.get(model.family.__name__.split(".")[-1])
    for i, w in enumerate(model.weights["layers"]):
        for n, (projection, name) in enumerate((("o", "attention"), ("down", "mlp"))):
            y = acts[f"layers.{i}.{projection}"]
            if after:
                y = rms_norm(y, w[after[n]], model.config.eps, offset=after[2])
            assert close(y, acts[f"layers.{i}.{name}"])


def test_products_are_those_of_their_weights(model: Model) -> None:
    _, acts = model.activations(TOKENS, "layers.1.*")
    w, cfg = model.weights["layers"][1], model.config
    activation = jax.nn.silu if model.family.__name__.split(".")[-1] != "gemma3" else jax.nn.gelu
    hidden = activation(acts["layers.1.gate"]) * acts["layers.1.up"]
    assert close(hidden, acts["layers.1.down.input"])
    for spec, name in (("BTF,DF->BTD", "down"), ("BTNH,DNH->BTD", "o")):
        x = acts[f"layers.1.{name}.input"]
        assert close(jnp.einsum(spec, x, w[name], precision="highest"), acts[f"layers.1.{name}"])
    if "olmo" in model.family.__name__:  # no norm before
        x = model.activations(TOKENS, "layers.0.residual")[1]["layers.0.residual"]
        assert close(jnp.einsum("BTD,NHD->BTNH", x, w["q"], precision="highest"), acts["layers.1.q"])
    assert acts["layers.1.q"].shape[-1] == cfg.H


# Patches


def test_an_identity_patch_is_bit_identical(model: Model) -> None:
    plain = model.activations(TOKENS, "*")
    assert equal(model.activations(TOKENS, "*", patch={"*": lambda x: x}), plain)
    assert equal(model.activations(TOKENS, patch={"layers.1.o": lambda x: x})[0], plain[0])
    assert equal(model.activations(TOKENS, patch=plain[1])[0], plain[0])


@pytest.mark.parametrize("name", ["embedding", "layers.0.residual", f"layers.{L - 1}.residual"])
def test_the_residual_stream_of_another_run_gives_its_logits(model: Model, name: str) -> None:
    other, acts = model.activations(OTHER, name)
    assert equal(model.activations(TOKENS, patch={name: acts[name]})[0], other)
    assert not close(model.activations(TOKENS)[0], other, 0.1)


def test_the_contributions_of_another_run_need_its_embedding(model: Model) -> None:
    names = ["embedding", "layers.*.attention", "layers.*.mlp"]
    other, acts = model.activations(OTHER, names)
    assert equal(model.activations(TOKENS, patch=acts)[0], other)
    del acts["embedding"]
    assert not close(model.activations(TOKENS, patch=acts)[0], other, 0.1)


@pytest.mark.parametrize(("layer", "name"), [(0, "o"), (1, "down"), (2, "v"), (1, "gate")])
def test_zeroing_a_product_is_zeroing_its_weight(model: Model, layer: int, name: str) -> None:
    expected = without(model, layer, name).activations(TOKENS, "layers.*.residual")
    patched = model.activations(TOKENS, "layers.*.residual", patch={f"layers.{layer}.{name}": jnp.zeros_like})
    assert equal(patched, expected)
    assert not close(patched[0], model.activations(TOKENS)[0], 0.01)


def test_zeroing_a_head_is_zeroing_its_part_of_the_projection(model: Model) -> None:
    layers = [dict(w) for w in model.weights["layers"]]
    layers[1]["o"] = layers[1]["o"].at[:, 2].set(0)
    expected, _ = model.activations(TOKENS, weights={**model.weights, "layers": layers})
    patched, _ = model.activations(TOKENS, patch={"layers.1.o.input": lambda x: x.at[:, :, 2].set(0)})
    assert close(patched, expected)
    assert not close(patched, model.activations(TOKENS)[0], 0.01)


@pytest.mark.parametrize(("contribution", "projection"), [("attention", "o"), ("mlp", "down")])
def test_zeroing_a_contribution_is_zeroing_its_projection(model: Model, contribution: str, projection: str) -> None:
    expected = without(model, 1, projection).activations(TOKENS)[0]
    assert close(model.activations(TOKENS, patch={f"layers.1.{contribution}": 0.0})[0], expected, 1e-6)


def test_a_patch_of_one_position_leaves_earlier_ones(model: Model) -> None:
    plain, _ = model.activations(TOKENS)
    patched, _ = model.activations(TOKENS, patch={"layers.0.mlp": lambda x: x.at[:, 4].set(0)})
    assert equal(patched[:, :4], plain[:, :4])
    assert not close(patched[:, 4], plain[:, 4], 0.01)


def test_captured_values_are_those_after_the_patch() -> None:
    model = make("qwen3")
    names = ["layers.1.attention", "layers.1.residual_mid", "layers.0.residual"]
    _, plain = model.activations(TOKENS, names)
    _, acts = model.activations(TOKENS, names, patch={"layers.1.attention": lambda x: 2 * x})
    assert equal(acts["layers.1.attention"], 2 * plain["layers.1.attention"])
    assert close(acts["layers.1.residual_mid"], plain["layers.0.residual"] + 2 * plain["layers.1.attention"])


def test_the_patch_of_o_comes_before_that_of_attention() -> None:
    """In Llama both are one variable."""
    patch = {"layers.0.attention": lambda x: x + 1, "layers.0.o": lambda x: 0 * x}
    _, acts = make("llama3").activations(TOKENS, ["layers.0.o", "layers.0.attention"], patch=patch)
    assert (acts["layers.0.o"] == 0).all()
    assert (acts["layers.0.attention"] == 1).all()


# Everything that a model can be


def test_stacked_layers_give_the_same(model: Model) -> None:
    stacked = params.stack(model.weights, layer_types.layer_period(model.config))
    patch = {"layers.1.mlp": lambda x: -x}
    assert equal(
        model.activations(TOKENS, "*", weights=stacked, patch=patch), model.activations(TOKENS, "*", patch=patch)
    )


def test_within_jit(one_of_two: Model) -> None:
    @jax.jit
    def program(tokens: jax.Array, weights: Any, vector: jax.Array) -> Any:
        return one_of_two.activations(tokens, "*", weights=weights, patch={"layers.1.residual": lambda x: x + vector})

    vector = jnp.linspace(-1, 1, one_of_two.config.D)
    expected = one_of_two.activations(TOKENS, "*", patch={"layers.1.residual": lambda x: x + vector})
    found = program(TOKENS, one_of_two.weights, vector)
    assert jax.tree.all(jax.tree.map(lambda a, b: close(a, b, 1e-4), found, expected))
    assert not close(found[0], one_of_two.activations(TOKENS)[0], 0.01)


def test_gradient_of_an_activation(one_of_two: Model) -> None:
    """Attribution patching (first order): the change of the loss by a small patch is its product with the gradient."""

    def loss(change: jax.Array, scale: float = 1.0) -> jax.Array:
        logits, _ = one_of_two.activations(TOKENS, patch={"layers.1.attention": lambda x: x + scale * change})
        return jax.nn.log_softmax(logits)[:, -1, 7].sum()

    _, acts = one_of_two.activations(TOKENS, "layers.1.attention")
    zero = jnp.zeros_like(acts["layers.1.attention"])
    gradient = jax.grad(loss)(zero)
    direction = jnp.sin(jnp.arange(zero.size, dtype=jnp.float32)).reshape(zero.shape)
    slope = (loss(direction, 1e-2) - loss(direction, -1e-2)) / 2e-2
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-2)
    assert abs(slope) > 1e-2
    assert close(jax.jit(jax.grad(loss))(zero), gradient, 1e-3)


def test_gradient_of_the_weights_is_that_of_forward(one_of_two: Model) -> None:
    def loss(weights: Any, run: Any) -> jax.Array:
        return jax.nn.logsumexp(run(weights), axis=-1).mean()

    ours = jax.grad(loss)(one_of_two.weights, lambda w: one_of_two.activations(TOKENS, weights=w)[0])
    expected = jax.grad(loss)(one_of_two.weights, lambda w: one_of_two.forward(TOKENS, w)[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: close(a, b, 1e-4), ours, expected))


def test_with_a_kv_cache(model: Model) -> None:
    """Prefill and decode compute the activations of the whole text; a patch changes what the cache holds."""
    patch = {"layers.0.v": lambda x: 2 * x}
    logits, acts = model.activations(TOKENS, "layers.*", patch=patch)
    first, one, kv = model.activations(TOKENS[:, :6], "layers.*", patch=patch, kv=model.init_kv(2, 12))
    second, two, kv = model.activations(TOKENS[:, 6:], "layers.*", patch=patch, kv=kv)
    assert close(jnp.concatenate([first, second], 1), logits, 1e-4)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), one, two)
    assert jax.tree.all(jax.tree.map(lambda a, b: close(a, b, 1e-4), joined, acts))
    assert (next(iter(kv.positions.values())).max(axis=1) == 8).all()


def test_positions_and_padding(one_of_two: Model) -> None:
    pos = np.tile(np.arange(-2, 7, dtype=np.int32), (2, 1))
    pos[pos < 0] = -1
    logits, acts = one_of_two.activations(TOKENS, "layers.1.residual", pos=pos)
    expected, plain = one_of_two.activations(TOKENS[:, 2:], "layers.1.residual")
    assert close(logits[:, 2:], expected)
    assert close(acts["layers.1.residual"][:, 2:], plain["layers.1.residual"])


def test_bfloat16(one_of_two: Model) -> None:
    """A piece rounds its results to bfloat16; a whole program may keep more. Both are as far from float32."""
    half = make(one_of_two.family.__name__.split(".")[-1], dtype=jnp.bfloat16)
    logits, acts = half.activations(TOKENS, "*")
    assert {value.dtype for value in acts.values()} == {jnp.dtype("bfloat16")}
    exact, _ = half.forward(TOKENS, jax.tree.map(lambda w: w.astype(jnp.float32), half.weights))
    errors = [float(jnp.square(run - exact).mean()) for run in (logits, half.forward(TOKENS, half.weights)[0])]
    assert errors[0] < 2 * errors[1] < 1e-2 * float(exact.var())
    assert equal(half.activations(TOKENS, patch={"*": lambda x: x.astype(jnp.float32)})[0], logits)


def test_with_an_adapter(one_of_two: Model) -> None:
    adapter = drawn(one_of_two, ["q", "o", "down"])
    adapted = replace(one_of_two, weights=lora.join(one_of_two.weights, adapter))
    logits, acts = adapted.activations(TOKENS, ["layers.0.o", "layers.0.attention"])
    assert close(logits, adapted.forward(TOKENS, adapted.weights)[0])
    merged = replace(one_of_two, weights=lora.fused(adapted.weights))
    assert close(acts["layers.0.o"], merged.activations(TOKENS, "layers.0.o")[1]["layers.0.o"], 1e-4)
    assert not close(acts["layers.0.o"], one_of_two.activations(TOKENS, "layers.0.o")[1]["layers.0.o"], 0.01)


def test_on_a_mesh(one_of_two: Model) -> None:
    over = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = spread(one_of_two, over)
    patch = {"layers.1.mlp": lambda x: x.at[:, -1].set(0)}
    expected, found = (m.activations(TOKENS, "*", patch=patch) for m in (one_of_two, sharded))
    assert len(found[0].sharding.device_set) == 4
    assert jax.tree.all(jax.tree.map(lambda a, b: close(a, b, 1e-4), jax.device_get(found), expected))


def test_another_patch_compiles_nothing() -> None:
    model = make("llama3")
    names: list[str] = []

    def record(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILE:
            names.append(str(about.get("fun_name")))

    def double(scale: float) -> jax.Array:
        return model.activations(TOKENS, "layers.1.mlp", patch={"layers.0.residual": lambda x: x * scale})[0]

    double(1.0)
    jax.monitoring.register_event_duration_secs_listener(record)
    changed = [double(scale) for scale in (2.0, 3.0)]
    model.activations(TOKENS, "layers.*", patch={"layers.2.o": lambda x: x * 2.0})
    jax.monitoring.unregister_event_duration_listener(record)
    assert not close(*changed, 0.01)
    assert names == []


# Errors


@pytest.mark.parametrize(
    ("name", "suggested"),
    [("layers.1.residul", "layers.1.residual"), ("blocks.1.mlp", "layers.1.mlp"), ("layers.9.mlp", "layers.0.mlp"),
     ("layers.*.atention", "layers")],
)  # fmt: skip
def test_an_unknown_name_is_named_with_the_nearest(name: str, suggested: str) -> None:
    model = make("llama3")
    for call in ({"names": [name]}, {"patch": {name: 0.0}}):
        with pytest.raises(ValueError, match="activation_names") as error:
            model.activations(TOKENS, **call)
        assert name in str(error.value)
        assert suggested in str(error.value)


@pytest.mark.parametrize("patch", [lambda x: None, lambda x: x[:, :1], lambda x: x.sum(), np.zeros((2, 9, 47))])
def test_a_patch_of_the_wrong_shape_is_an_error(patch: Any) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*shape"):
        make("llama3").activations(TOKENS, patch={"layers.0.mlp": patch})


def test_inputs_are_checked_as_in_forward() -> None:
    model = make("llama3")
    with pytest.raises(ValueError, match="ids"):
        model.activations([[1, 199]])
    with pytest.raises(ValueError, match="KV cache"):
        model.activations(TOKENS, kv=model.init_kv(1, 20))


def test_layers_of_another_form_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose layer adds attention and MLP at once has no residual stream between them."""
    from jaxlm.models import llama3

    model = tiny("llama3", num_hidden_layers=1, vocab_size=101)  # a config of its own: programs are cached by config

    def parallel(cfg: Any, pos: Any, freqs: Any, x: Any, w: Any, cache: Any) -> Any:
        return x + (x * 0.5 + layer(cfg, pos, freqs, x, w, cache)[0]), cache

    layer = llama3.layer
    monkeypatch.setattr(llama3, "layer", parallel)
    assert set(model.activations([[1, 2]], ["layers.0.residual", "layers.0.o"])[1]) == {
        "layers.0.residual",
        "layers.0.o",
    }
    with pytest.raises(ValueError, match=r"layers\.0\.attention"):
        model.activations([[1, 2]], ["layers.0.attention"])

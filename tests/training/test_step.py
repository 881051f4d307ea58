"""The training step against its plain twins: chunks, accumulation, scans, recomputation, meshes, half precision."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings.tiny import tiny

from jaxlm import mesh, params, topology
from jaxlm.ops import attention
from jaxlm.training import optimisers, step
from jaxlm.training.batches import Batch
from jaxlm.training.config import Optimiser
from jaxlm.training.loss import loss, token_logprobs

V, B, T = 199, 4, 24


def batch(seed: int = 0) -> Batch:
    """Whole rows, packed rows, padding, and targets that do not count."""
    rng = np.random.default_rng(seed)
    pos = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    pos[1] = [*range(14), *range(10)]
    pos[2, 15:] = -1
    tokens, targets = (np.where(pos < 0, 0, rng.integers(0, V, (B, T))).astype(np.int32) for _ in range(2))
    return Batch(tokens, targets, pos, (rng.random((B, T)) < 0.8) & (pos >= 0))


@pytest.fixture(scope="module", params=["llama3", pytest.param("gemma3", marks=pytest.mark.slow)])
def model(request) -> Any:
    """Two periods of layers, so that they are scanned."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(request.param, **heads, **(kinds if request.param == "gemma3" else {}))


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny("llama3", num_hidden_layers=1)


def plain(model: Any, weights: Any, batch: Batch) -> jax.Array:
    """The loss as it is written in a book: all logits at once."""
    x, _ = model.family.forward(model.config, batch.tokens, weights, None, batch.pos)
    logprobs = jax.nn.log_softmax(model.family.logits(model.config, x, weights))
    chosen = jnp.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
    return -(chosen * batch.learned).sum() / batch.learned.sum()


@pytest.fixture(scope="module")
def expected(model) -> tuple[float, Any]:
    value, gradient = jax.jit(jax.value_and_grad(partial(plain, model)))(model.weights, batch())
    return float(value), gradient


def taken(model: Any, weights: Any, one: Batch, over: Any = None, rate: float = 1e-2, **how: Any) -> tuple[Any, Any]:
    """Weights (listed) and metrics after one step of plain descent, which shows the gradient."""
    import optax

    rule = optax.sgd(rate)
    state, run = step.start(rule, weights), step.make(model.family, model.config, rule, **how)
    if over is None:
        state, metrics = jax.jit(run)(state, one)
    else:
        state = jax.device_put(state, step.places(jax.eval_shape(lambda s: s, state), over, model.family.PARAMS))
        with jax.set_mesh(over):
            state, metrics = jax.jit(run)(state, jax.tree.map(lambda a: mesh.place(a, "BT", over), one))
    weights = state.weights
    return (params.unstack(weights) if isinstance(weights["layers"], dict) else weights), metrics


def near(model: Any, found: Any, expected: tuple[float, Any], rate: float = 1e-2, limit: float = 1e-5) -> None:
    weights, metrics = found
    assert float(metrics.loss) == pytest.approx(expected[0], rel=limit)
    assert float(metrics.tokens) == batch().learned.sum()
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(expected[1])))
    assert float(metrics.gradient) == pytest.approx(norm, rel=limit)
    for new, old, gradient in zip(*map(jax.tree.leaves, (weights, model.weights, expected[1])), strict=True):
        step_taken = (np.asarray(old) - np.asarray(new)) / rate
        assert np.linalg.norm(step_taken - np.asarray(gradient)) <= 10 * limit * np.linalg.norm(gradient) + 1e-4


@pytest.mark.parametrize(
    "how",
    [{}, {"accumulate": 2, "remat": "full"}, pytest.param({"accumulate": 4, "remat": "dots"}, marks=pytest.mark.slow)],
)
def test_listed_and_stacked_cut_and_computed_again(model, expected, how) -> None:
    stacked = params.stack(model.weights, len(params.period(model.config.windows)))
    near(model, taken(model, stacked, batch(), **how), expected)
    if not how:
        near(model, taken(model, model.weights, batch()), expected)


@pytest.mark.parametrize("spec", ["data=4,model=2", pytest.param("data=2,model=4", marks=pytest.mark.slow)])
def test_on_a_mesh(model, expected, spec) -> None:
    """Weights divided over data and model, the batch over data: the same step."""
    over = topology.make(spec, model.config.K)
    stacked = params.stack(model.weights, len(params.period(model.config.windows)))
    near(model, taken(model, stacked, batch(), over, accumulate=1), expected)
    q = step.places(jax.eval_shape(lambda: step.State(stacked, (), jnp.zeros(()))), over, model.family.PARAMS)
    assert q.weights["layers"]["stacked"][0]["q"].spec == jax.sharding.PartitionSpec(None, "model", None, "data")


def test_where_trained_weights_lie() -> None:
    """Divided over `data` once: along V where it goes, else along D; norms are whole."""
    over = jax.sharding.AbstractMesh((4, 2), ("data", "model"))

    def lies(letters: str, *shape: int) -> Any:
        return tuple(step.place(letters, shape, over).spec)

    assert lies("VD", 64, 32) == (("model", "data"),)
    assert lies("VD", 66, 32) == ("model", "data")
    assert lies("VD", 199, 32) == (None, "data")
    assert lies("LDNH", 3, 32, 8, 4) == (None, "data", "model")
    assert lies("LD", 3, 32) == ()


def test_chunks_of_logits_are_of_one_device(small) -> None:
    """Of 4 rows in chunks of 8 tokens a device alone has 2 tokens a row, each of 4 devices 8 of its row."""
    over = topology.make("data=4", small.config.K, jax.devices()[:4])
    x = jnp.ones((B, T, small.config.D))
    find = partial(token_logprobs, small.family, small.config, chunk=8)
    assert f"f32[{B},2,{V}]" in str(jax.make_jaxpr(find)(small.weights, x, batch().targets))
    with jax.set_mesh(over):
        assert f"f32[1,8,{V}]" in str(jax.make_jaxpr(find)(small.weights, x, batch().targets))


def test_masks_are_made_block_by_block(model, monkeypatch) -> None:
    """Layers of a scan share the positions: jax would make the masks of all blocks and heads before it."""
    N = model.config.N
    monkeypatch.setattr(attention, "SCORES", B * N * T * 4)
    stacked = params.stack(model.weights, len(params.period(model.config.windows)))
    text = str(jax.make_jaxpr(jax.grad(lambda w: loss(model.family, model.config, w, batch()).loss))(stacked))
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"bool\[([\d,]+)\]", text)]
    sizes = [math.prod(shape) for shape in shapes if shape[-1] == T]
    assert B * N * 4 * T in sizes
    assert max(sizes) < B * N * T * T


def test_chunks_give_what_the_whole_gives(small) -> None:
    x = jax.random.normal(jax.random.key(0), (B, T, small.config.D))

    def cut(chunk: int) -> Any:
        find = partial(token_logprobs, small.family, small.config, chunk=chunk)
        return np.asarray(jax.jit(find)(small.weights, x, batch().targets)[0])

    for chunk in (1, 20, 28, B * T):
        assert np.abs(cut(chunk) - cut(10**6)).max() < 1e-5


def test_the_logits_of_a_batch_never_exist(small) -> None:
    """No array of the compiled gradient has as many numbers as B x T x V; the plain loss has."""

    def largest(of: Any) -> int:
        text = jax.jit(jax.grad(of)).lower(small.weights, batch()).compile().as_text()
        shapes = {part.split("]")[0] for part in text.split("f32[")[1:]}
        return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)

    chunked = partial(loss, small.family, small.config, chunk=8 * B)
    assert largest(lambda w, b: chunked(w, b).loss) < B * T * V
    assert largest(lambda w, b: plain(small, w, b)) >= B * T * V


def test_z_loss_is_the_squared_log_denominator(small) -> None:
    @jax.jit
    def squared(weights: Any) -> jax.Array:
        x, _ = small.family.forward(small.config, batch().tokens, weights, None, batch().pos)
        return jnp.sum(jax.nn.logsumexp(small.family.logits(small.config, x, weights), -1) ** 2 * batch().learned)

    added = float(squared(small.weights))
    a, b = (jax.jit(partial(loss, small.family, small.config, z_loss=z))(small.weights, batch()) for z in (0.0, 1e-3))
    assert float(b.loss - a.loss) == pytest.approx(1e-3 * added, rel=1e-3)
    assert float(b.nats) == float(a.nats)


def test_bfloat16_products_keep_float32_weights(small) -> None:
    weights, metrics = taken(small, small.weights, batch(), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    assert float(metrics.loss) == pytest.approx(float(jax.jit(partial(plain, small))(small.weights, batch())), rel=0.02)


def test_a_loss_that_is_no_number_changes_nothing(small) -> None:
    broken = {**small.weights, "norm": small.weights["norm"] * jnp.nan}
    weights, metrics = taken(small, broken, batch())
    assert np.isnan(float(metrics.loss))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (weights, broken))))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion")]


@pytest.mark.parametrize("name", ["adamw", "muon", *SLOW])
def test_one_batch_is_learned_by_heart(name) -> None:
    model = tiny("llama3", num_hidden_layers=1)
    weights = params.stack(model.weights)
    rate = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 3e-2, "lion": 2e-3}[name]
    of = Optimiser(name=name, lr=rate, schedule="constant", warmup=5, weight_decay=0.0)
    rule = optimisers.make(of, 400, params.letters(model.family.PARAMS, weights))
    state, run = step.start(rule, weights), jax.jit(step.make(model.family, model.config, rule), donate_argnums=0)
    for _ in range(400):
        state, metrics = run(state, batch())
        if metrics.loss < 0.01:
            return
    raise AssertionError(f"the loss is still {float(metrics.loss)}")


def test_schedules() -> None:
    def at(of: Optimiser, *steps: int) -> list[float]:
        return [round(float(optimisers.schedule(of, 100)(n)), 6) for n in steps]

    assert at(Optimiser(lr=1.0, warmup=10, schedule="constant"), 0, 5, 10, 99) == [0.0, 0.5, 1.0, 1.0]
    assert at(Optimiser(lr=1.0, warmup=0.1, schedule="linear", final=0.1), 10, 55, 100) == [1.0, 0.55, 0.1]
    assert at(Optimiser(lr=1.0, warmup=0, schedule="cosine", final=0.0), 0, 50, 100) == [1.0, 0.5, 0.0]
    assert at(Optimiser(lr=1.0, warmup=0, schedule="wsd", decay=0.2, final=0.0), 0, 80, 90, 100) == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("family", ["llama3", "qwen3", "olmo2", "gemma3"])
def test_what_decays_and_what_is_a_matrix(family) -> None:
    """Norms do not decay, stacked or listed; every weight of every family has letters that the tables know."""
    model = tiny(family)
    for weights in (model.weights, jax.eval_shape(lambda: params.stack(model.weights, 2))):
        letters = params.letters(model.family.PARAMS, weights)
        known = {*params.NORMS, "NHD", "KHD", "DNH", "FD", "DF", "VD"}
        assert {name.lstrip("L") for name in jax.tree.leaves(letters)} <= known
        for path, decays in jax.tree_util.tree_leaves_with_path(optimisers.decaying(letters)):
            assert decays == ("norm" not in jax.tree_util.keystr(path))


def test_decay_is_of_the_weight_itself() -> None:
    weights = {"embed": jnp.ones((3, 2)), "norm": jnp.ones(2)}
    rule = optimisers.make(Optimiser(lr=1.0, warmup=0, weight_decay=0.5), 10, {"embed": "VD", "norm": "D"})
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, weights), rule.init(weights), weights)
    assert (updates["embed"] == -0.5).all()
    assert (updates["norm"] == 0).all()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_decay_follows_the_rate(name) -> None:
    """Without a gradient a matrix of a layer shrinks by rate x decay, and a norm stays."""
    model = tiny("llama3")
    rule = optimisers.make(
        Optimiser(name=name, lr=1e-2, schedule="constant", warmup=0, weight_decay=0.1, clip=0.0),
        10, params.letters(model.family.PARAMS, model.weights),
    )  # fmt: skip
    zero = jax.tree.map(jnp.zeros_like, model.weights)
    updates, _ = jax.jit(rule.update)(zero, rule.init(model.weights), model.weights)
    layer, update = model.weights["layers"][0], updates["layers"][0]
    np.testing.assert_allclose(update["q"], -1e-3 * layer["q"], rtol=1e-5)
    assert not jnp.any(update["attn_norm"])


def test_gradients_in_half_precision() -> None:
    """Each weight's is that of float32 to 6 %: a rounding of bfloat16 is 0.4 %, and sums over a thousand tokens of both
    signs are a tenth as large as what they add up."""
    model = tiny("llama3")
    tokens = np.random.default_rng(0).zipf(1.3, (8, 129)) % 199
    pos = np.broadcast_to(np.arange(128, dtype=np.int32), (8, 128))
    batch = Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), pos, np.ones((8, 128), bool))

    @partial(jax.jit, static_argnums=1)
    def gradient(weights: Any, dtype: str) -> Any:
        return jax.grad(lambda w: loss(model.family, model.config, step.whole(w, None, dtype), batch).loss)(weights)

    exact, half = gradient(model.weights, "float32"), gradient(model.weights, "bfloat16")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(half), strict=True):
        far = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert far < 0.06, (jax.tree_util.keystr(path), far)

"""The training step compared with simple implementations: chunked logits, gradient accumulation, scanned layers,
activation checkpointing, meshes, mixed precision."""

import itertools
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import FAMILIES, tiny

from jaxlm.data.packing import Batch
from jaxlm.devices import mesh, topology
from jaxlm.nn import attention_reference, layer_types, lora, params
from jaxlm.training import optimizers, step
from jaxlm.training.config import Optimizer
from jaxlm.training.loss import loss, token_logprobs

V, B, T = 199, 4, 24


def batch(seed: int = 0) -> Batch:
    """Returns a batch with whole rows, packed rows, padding, and targets outside the loss mask."""
    rng = np.random.default_rng(seed)
    pos = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    pos[1] = [*range(14), *range(10)]
    pos[2, 15:] = -1
    tokens, targets = (np.where(pos < 0, 0, rng.integers(0, V, (B, T))).astype(np.int32) for _ in range(2))
    return Batch(tokens, targets, pos, (rng.random((B, T)) < 0.8) & (pos >= 0))


@pytest.fixture(scope="module", params=["llama3", pytest.param("gemma3", marks=pytest.mark.slow)])
def model(request) -> Any:
    """Two periods of layers, so that they are scanned: of one layer each, for Gemma of two."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(request.param, **heads, **(kinds if request.param == "gemma3" else {}))


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny("llama3", num_hidden_layers=1)


def plain(model: Any, weights: Any, batch: Batch) -> jax.Array:
    """The textbook loss: all logits at once."""
    x, _ = model.family.forward(model.config, batch.tokens, weights, None, batch.pos)
    logprobs = jax.nn.log_softmax(model.family.logits(model.config, x, weights))
    chosen = jnp.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
    return -(chosen * batch.loss_mask).sum() / batch.loss_mask.sum()


@pytest.fixture(scope="module")
def textbook(model) -> Any:
    """The compiled gradient of the textbook loss."""
    return jax.jit(jax.value_and_grad(partial(plain, model))).lower(model.weights, batch()).compile()


@pytest.fixture(scope="module")
def expected(model, textbook) -> tuple[float, Any]:
    value, gradient = textbook(model.weights, batch())
    return float(value), gradient


@pytest.fixture(scope="module")
def stacked(model) -> Any:
    return jax.jit(params.stack, static_argnums=1)(model.weights, layer_types.layer_period(model.config))


@pytest.fixture(scope="module")
def descent(model) -> Any:
    """The compiled step of gradient descent on listed weights."""
    return jax.jit(descending(model))


LEARNING_RATE = 1e-2


def descending(model: Any, **how: Any) -> Any:
    """Returns a function from weights and batch to listed weights and metrics after one step of plain gradient descent,
    whose update is the gradient."""
    import optax

    tx = optax.sgd(LEARNING_RATE)
    run = step.make_step(model.family, model.config, tx, **how)

    def take(weights: Any, one: Batch) -> tuple[Any, Any]:
        state, metrics = run(step.init_state(tx, weights), one)
        weights = state.weights
        return (params.unstack(weights) if isinstance(weights["layers"], dict) else weights), metrics

    return take


def near(model: Any, found: Any, expected: tuple[float, Any], limit: float = 1e-5) -> None:
    weights, metrics = found
    assert float(metrics.loss) == pytest.approx(expected[0], rel=limit)
    assert float(metrics.tokens) == batch().loss_mask.sum()
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(expected[1])))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=limit)
    for new, old, gradient in zip(*map(jax.tree.leaves, (weights, model.weights, expected[1])), strict=True):
        step_taken = (np.asarray(old) - np.asarray(new)) / LEARNING_RATE
        assert np.linalg.norm(step_taken - np.asarray(gradient)) <= 10 * limit * np.linalg.norm(gradient) + 1e-4


# Without either: test_on_a_mesh, in the light tier.
HOW = [pytest.param({}, marks=pytest.mark.slow), {"accumulate": 2, "remat": "full"},
       pytest.param({"accumulate": 4, "remat": "dots"}, marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_stacked_weights_with_accumulation_and_remat(model, stacked, expected, how) -> None:
    near(model, jax.jit(descending(model, **how))(stacked, batch()), expected)


def test_listed_weights(model, descent, expected) -> None:
    near(model, descent(model.weights, batch()), expected)


@pytest.mark.parametrize("spec", ["data=4,model=2", pytest.param("data=2,model=4", marks=pytest.mark.slow)])
def test_on_a_mesh(model, stacked, expected, spec) -> None:
    """Weights are sharded over data and model, the batch over data. The step is the same."""
    over = topology.make(spec, model.config.K)
    where = step.weight_shardings(stacked, over, model.family.PARAMS)
    assert where["layers"]["stacked"][0]["q"].spec == jax.sharding.PartitionSpec(None, "model", None, "data")
    with jax.set_mesh(over):
        there = jax.tree.map(lambda a: mesh.place(a, "BT", over), batch())
        near(model, jax.jit(descending(model))(jax.device_put(stacked, where), there), expected)


def test_shardings_of_trained_weights() -> None:
    """Sharded over `data` once: along V if it divides, else along D. Norms are replicated."""
    over = jax.sharding.AbstractMesh((4, 2), ("data", "model"))

    def spec(letters: str, *shape: int) -> Any:
        return tuple(step.weight_sharding(letters, shape, over).spec)

    assert spec("VD", 64, 32) == (("model", "data"),)
    assert spec("VD", 66, 32) == ("model", "data")
    assert spec("VD", 199, 32) == (None, "data")
    assert spec("LDNH", 3, 32, 8, 4) == (None, "data", "model")
    assert spec("LD", 3, 32) == ()


def by_path(state: Any, over: Any, table: Any) -> Any:
    """The shardings of a state found by path: an array whose path ends with that of a weight of its shape is sharded
    like it, all else is replicated."""
    shardings = step.weight_shardings(state.weights, over, table)
    of_weights = [
        (jax.tree_util.keystr(path), weight.shape, sharding)
        for (path, weight), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.weights), jax.tree.leaves(shardings), strict=True
        )
    ]

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        matches = [where for end, shape, where in of_weights if name.endswith(end) and shape == leaf.shape]
        return matches[0] if matches else mesh.sharding("", leaf.shape, over)

    return jax.tree_util.tree_map_with_path(of, state)


# Every family and method on one mesh, every mesh with one family and method; all others are in the slow tier.
MOMENTS = [
    pytest.param(*row, marks=[] if row[2] == "data=4,model=2" or row[:2] == ("llama3", "full") else pytest.mark.slow)
    for row in itertools.product(("llama3", "gemma3"), ("full", "lora"), ("data=4,model=2", "data=8", "model=8"))
]


@pytest.mark.parametrize(("family", "method", "spec"), MOMENTS)
def test_moments_are_sharded_as_their_weights(family, method, spec) -> None:
    """For every optimizer, stacked weights and adapters, with and without gradient clipping. Matrices are large enough
    for adafactor to factor their second moments, which are replicated."""
    model = tiny(family)
    cfg, table = replace(model.config, D=256, F=512, H=32), model.family.PARAMS
    over = topology.make(spec, cfg.K)

    def weights() -> Any:
        adapter = lora.init(lora.targets(table, cfg, ("all-linear",)), cfg.L, 128, 2.0, jax.random.key(0))
        full = params.init(table, cfg, jax.random.key(0), model.family.NORM_IDENTITY)
        return params.stack(full if method == "full" else adapter, layer_types.layer_period(cfg))

    shapes = jax.eval_shape(weights)
    for name, clip in itertools.product(("adamw", "muon", "adafactor", "lion"), (1.0, 0.0)):
        tx = optimizers.make_optimizer(Optimizer(name=name, clip=clip), 10, params.letters(table, shapes))
        state = jax.eval_shape(partial(step.init_state, tx), shapes)
        found, expected = step.state_shardings(tx, state, over, table), by_path(state, over, table)
        assert jax.tree.structure(found) == jax.tree.structure(expected), name
        assert jax.tree.leaves(found) == jax.tree.leaves(expected), name
        sharded = [where for where in jax.tree.leaves(found.opt_state) if where.spec != jax.sharding.PartitionSpec()]
        assert sharded or name == "adafactor", name


def test_chunks_of_logits_are_local(small) -> None:
    """With 4 rows and chunks of 8 tokens, one device has 2 tokens per row, each of 4 devices 8 of its row."""
    over = topology.make("data=4", small.config.K, jax.devices()[:4])
    x = jnp.ones((B, T, small.config.D))
    find = partial(token_logprobs, small.family, small.config, chunk=8)
    assert f"f32[{B},2,{V}]" in str(jax.make_jaxpr(find)(small.weights, x, batch().targets))
    with jax.set_mesh(over):
        assert f"f32[1,8,{V}]" in str(jax.make_jaxpr(find)(small.weights, x, batch().targets))


def test_attention_masks_are_computed_per_block(model, stacked, monkeypatch) -> None:
    """Scanned layers share the positions, so jax could compute the masks of all blocks and heads before the scan."""
    N = model.config.N
    monkeypatch.setattr(attention_reference, "MAX_SCORE_ELEMENTS", B * N * T * 4)
    rows = jax.tree.map(jnp.asarray, batch())
    text = str(jax.make_jaxpr(jax.grad(lambda w: loss(model.family, model.config, w, rows).loss))(stacked))
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"bool\[([\d,]+)\]", text)]
    sizes = [math.prod(shape) for shape in shapes if shape[-1] == T]
    assert B * N * 4 * T in sizes
    assert max(sizes) < B * N * T * T


def test_chunks_do_not_change_the_logprobs(small) -> None:
    x = np.random.default_rng(0).standard_normal((B, T, small.config.D), np.float32)

    def cut(chunk: int) -> Any:
        find = partial(token_logprobs, small.family, small.config, chunk=chunk)
        return np.asarray(jax.jit(find)(small.weights, x, batch().targets)[0])

    whole = cut(10**6)
    for chunk in (1, 20, 28, B * T):
        assert np.abs(cut(chunk) - whole).max() < 1e-5


def test_the_logits_of_a_batch_never_exist(small, textbook) -> None:
    """No array of the compiled gradient has as many numbers as B x T x V. The textbook loss has."""

    def largest(program: Any) -> int:
        shapes = {part.split("]")[0] for part in program.as_text().split("f32[")[1:]}
        return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)

    chunked = partial(loss, small.family, small.config, chunk=8 * B)
    program = jax.jit(jax.grad(lambda w, b: chunked(w, b).loss)).lower(small.weights, batch()).compile()
    assert largest(program) < B * T * V
    assert largest(textbook) >= B * T * V


def test_z_loss_is_the_squared_log_denominator(small) -> None:
    rows = jax.tree.map(jnp.asarray, batch())

    @jax.jit
    def found(weights: Any) -> tuple[Any, Any, jax.Array]:
        x, _ = small.family.forward(small.config, rows.tokens, weights, None, rows.pos)
        squares = jax.nn.logsumexp(small.family.logits(small.config, x, weights), -1) ** 2
        a, b = (loss(small.family, small.config, weights, rows, z_loss=z) for z in (0.0, 1e-3))
        return a, b, jnp.sum(squares * rows.loss_mask)

    a, b, added = found(small.weights)
    assert float(b.loss - a.loss) == pytest.approx(1e-3 * float(added), rel=1e-3)
    assert float(b.nats) == float(a.nats)


def test_a_step_with_a_loss_of_nan_changes_nothing(model, descent) -> None:
    broken = {**model.weights, "norm": np.full_like(model.weights["norm"], np.nan)}
    weights, metrics = descent(broken, batch())
    assert np.isnan(float(metrics.loss))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (weights, broken))))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion")]


@pytest.mark.parametrize("name", ["adamw", "muon", *SLOW])
def test_overfitting_one_batch(small, name) -> None:
    weights = jax.jit(params.stack)(small.weights)
    learning_rate = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 3e-2, "lion": 2e-3}[name]
    of = Optimizer(name=name, lr=learning_rate, schedule="constant", warmup=5, weight_decay=0.0)
    tx = optimizers.make_optimizer(of, 400, params.letters(small.family.PARAMS, weights))
    state = jax.jit(partial(step.init_state, tx))(weights)
    run, one = jax.jit(step.make_step(small.family, small.config, tx), donate_argnums=0), batch()
    for _ in range(400):
        state, metrics = run(state, one)
        if float(metrics.loss) < 0.01:
            return
    raise AssertionError(f"the loss is still {float(metrics.loss)}")


def test_schedules() -> None:
    def at(of: Optimizer, *steps: int) -> list[float]:
        return [round(float(rate), 6) for rate in jax.jit(jax.vmap(optimizers.schedule(of, 100)))(np.array(steps))]

    assert at(Optimizer(lr=1.0, warmup=10, schedule="constant"), 0, 5, 10, 99) == [0.0, 0.5, 1.0, 1.0]
    assert at(Optimizer(lr=1.0, warmup=0.1, schedule="linear", final=0.1), 10, 55, 100) == [1.0, 0.55, 0.1]
    assert at(Optimizer(lr=1.0, warmup=0, schedule="cosine", final=0.0), 0, 50, 100) == [1.0, 0.5, 0.0]
    assert at(Optimizer(lr=1.0, warmup=0, schedule="wsd", decay=0.2, final=0.0), 0, 80, 90, 100) == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_do_not_decay(family) -> None:
    """Stacked or listed. Every weight of every family has known letters."""
    model = tiny(family)
    for weights in (model.weights, jax.eval_shape(lambda: params.stack(model.weights, 2))):
        letters = params.letters(model.family.PARAMS, weights)
        known = {*params.NORMS, "NHD", "KHD", "DNH", "FD", "DF", "VD"}
        assert {name.lstrip("L") for name in jax.tree.leaves(letters)} <= known
        for path, decays in jax.tree_util.tree_leaves_with_path(optimizers.decaying(letters)):
            assert decays == ("norm" not in jax.tree_util.keystr(path))


def test_weight_decay_is_decoupled() -> None:
    weights = {"embed": np.ones((3, 2), np.float32), "norm": np.ones(2, np.float32)}
    tx = optimizers.make_optimizer(Optimizer(lr=1.0, warmup=0, weight_decay=0.5), 10, {"embed": "VD", "norm": "D"})
    zero = jax.tree.map(np.zeros_like, weights)
    updates, _ = jax.jit(lambda w: tx.update(zero, tx.init(w), w))(weights)
    assert (np.asarray(updates["embed"]) == -0.5).all()
    assert (np.asarray(updates["norm"]) == 0).all()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_weight_decay_follows_the_learning_rate(small, name) -> None:
    """Without a gradient, a matrix of a layer shrinks by learning rate x weight decay, and a norm stays."""
    tx = optimizers.make_optimizer(
        Optimizer(name=name, lr=1e-2, schedule="constant", warmup=0, weight_decay=0.1, clip=0.0),
        10, params.letters(small.family.PARAMS, small.weights),
    )  # fmt: skip
    zero = jax.tree.map(np.zeros_like, small.weights)
    updates, _ = jax.jit(lambda zero, w: tx.update(zero, tx.init(w), w))(zero, small.weights)
    layer, update = small.weights["layers"][0], updates["layers"][0]
    np.testing.assert_allclose(update["q"], -1e-3 * layer["q"], rtol=1e-5)
    assert not np.any(update["attn_norm"])


def test_mixed_precision(small) -> None:
    """Weights and gradients stay float32. Each weight's gradient is within 2.5 % of that in float32: bfloat16 rounds by
    0.4 %, and sums over a thousand tokens of both signs are a tenth as large as their terms."""
    tokens = (np.random.default_rng(0).zipf(1.3, (8, 129)) % V).astype(np.int32)
    pos = np.broadcast_to(np.arange(128, dtype=np.int32), (8, 128))
    one = Batch(tokens[:, :-1], tokens[:, 1:], pos, np.ones((8, 128), bool))
    (exact, a), (half, b) = (jax.jit(descending(small, dtype=of))(small.weights, one) for of in ("float32", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert float(b.loss) == pytest.approx(float(a.loss), rel=0.02)
    for (path, old), x, y in zip(
        jax.tree_util.tree_leaves_with_path(small.weights), jax.tree.leaves(exact), jax.tree.leaves(half), strict=True
    ):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(old) - np.asarray(x))
        assert error < 0.025, (jax.tree_util.keystr(path), error)

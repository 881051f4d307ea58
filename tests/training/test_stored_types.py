"""Gradients, moments and weights stored in bfloat16: their types, stochastic rounding, memory, resume."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_models import tiny
from helpers.training_runs import Stopped, lines, run_of, stopping_at

from jaxlm.data.packing import Batch
from jaxlm.devices import mesh, topology
from jaxlm.nn import chunked_logits, params
from jaxlm.training import dry_run, loop, optimizers, step
from jaxlm.training.config import Optimizer
from jaxlm.training.setup import set_up

HALF, WIDE = jnp.bfloat16, jnp.float32
V, B, T = 199, 4, 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama3")


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
    return Batch(tokens, targets, np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), bool))


def start(
    model: Any, name: str = "adamw", weights: Any = WIDE, moments: Any = WIDE, **fields: Any
) -> tuple[Any, step.State]:
    """Returns an optimizer and its first state."""
    stacked = step.cast(jax.jit(params.stack)(model.weights), weights)
    of = Optimizer(**{"name": name, "lr": 1e-2, "schedule": "constant", "warmup": 0, **fields})
    tx = optimizers.make_optimizer(of, 10, params.letters(model.family.PARAMS, stacked))
    return tx, jax.jit(partial(step.init_state, tx, moment_dtype=moments))(stacked)


def floats(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_a_step_keeps_the_types_of_the_state(model, batch, name) -> None:
    for weights, moments in ((HALF, WIDE), (WIDE, HALF)):
        tx, state = start(model, name, weights, moments)
        assert {leaf.dtype for leaf in floats(state.weights)} == {jnp.dtype(weights)}
        constants = optax.tree.get_all_with_path(state.opt_state, "ns_coeffs")
        assert [leaf.dtype for _, leaf in constants] == [jnp.dtype(WIDE)] * (name == "muon")
        found = [leaf.dtype for leaf in floats(state.opt_state)]
        assert found.count(jnp.dtype(moments)) >= len(found) - len(constants)
        new, metrics = jax.eval_shape(step.make_step(model.family, model.config, tx), state, batch)
        assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, state)
        assert {value.dtype for value in metrics} == {jnp.dtype(WIDE)}


def test_two_steps_are_those_of_float32(model, batch) -> None:
    """The change of all weights is within 2 %: bfloat16 rounds by up to 0.4 %, at two steps of three arrays.

    eps is large, so that an update is proportional to its gradient. Adam's first updates would have the sign alone,
    which rounding turns where the gradient is small.
    """

    def run(weights: Any, moments: Any, gradients: Any) -> tuple[Any, Any]:
        tx, state = start(model, "adamw", weights, moments, lr=10.0, eps=1.0)
        take, before = jax.jit(step.make_step(model.family, model.config, tx, grad_dtype=gradients)), state.weights
        for _ in range(2):
            state, metrics = take(state, batch)
        change = jax.tree.map(lambda a, b: np.ravel(a.astype(WIDE) - b.astype(WIDE)), state.weights, before)
        return np.concatenate(jax.tree.leaves(change)), metrics

    exact, plain = run(WIDE, WIDE, WIDE)
    half, metrics = run(HALF, HALF, HALF)
    assert float(metrics.loss) == pytest.approx(float(plain.loss), rel=1e-2)
    error = np.linalg.norm(exact - half) / np.linalg.norm(exact)
    assert error < 0.02, error


@pytest.mark.parametrize("dtype", [HALF, WIDE])
def test_gradients_are_summed_in_their_type(model, batch, dtype) -> None:
    tx, state = start(model)
    run = step.make_step(model.family, model.config, tx, accumulate=4, dtype=HALF, grad_dtype=dtype)
    [scan] = [e for e in jax.make_jaxpr(run)(state, batch).eqns if e.primitive.name == "scan"]
    carried = [v.aval for v in scan.outvars if getattr(v.aval, "shape", ()) == (V, model.config.D)]
    assert [aval.dtype for aval in carried] == [jnp.dtype(dtype)] * 2  # embedding and head


def test_gradients_of_a_whole_batch_have_their_type(model, batch) -> None:
    """Nothing else in a float32 step is bfloat16."""
    tx, state = start(model)
    for dtype in (HALF, WIDE):
        run = step.make_step(model.family, model.config, tx, grad_dtype=dtype)
        casts = [e.outvars[0].aval for e in jax.make_jaxpr(run)(state, batch).eqns if "convert" in e.primitive.name]
        halves = [aval.shape for aval in casts if aval.dtype == HALF]
        assert sorted(halves) == sorted(a.shape for a in jax.tree.leaves(state.weights)) * (dtype == HALF)


def test_rounding_is_to_a_neighbor_and_right_on_average() -> None:
    """The mean of n values that round up with probability p is exact to 4 sqrt(p (1 - p) / n) of their distance."""
    x = jnp.array([1.0, 1 + 2**-10, -3.3, 0.0, 1e-20, jnp.inf], WIDE)
    keys = jax.random.split(jax.random.key(0), 4096)
    found = np.asarray(jax.jit(jax.vmap(lambda key: step.stochastic_round(x, key)))(keys).astype(WIDE), np.float64)
    assert [len(set(column)) for column in found.T] == [1, 2, 2, 1, 2, 1]
    for column, value in zip(found.T[1:3], np.asarray(x, np.float64)[1:3], strict=True):
        low, high = sorted(set(column))
        assert low < value < high
        assert abs(column.mean() - value) < 4 * 0.5 / np.sqrt(len(keys)) * (high - low)


def test_rounding_is_right_on_average_over_a_matrix() -> None:
    """Neighbors in a row round independently: the mean over a matrix is as exact as over keys, and so is each row's."""
    x = jnp.full((64, 1024), 1 + 2**-9, WIDE)
    up = np.asarray(jax.jit(step.stochastic_round)(x, jax.random.key(1)).astype(WIDE)) > 1
    assert abs(up.mean() - 0.25) < 4 * 0.433 / np.sqrt(up.size)
    assert np.abs(up.mean(1) - 0.25).max() < 5 * 0.433 / np.sqrt(up.shape[1])
    both = (up[:, 1:] & up[:, :-1]).mean()
    assert abs(both - 0.25**2) < 5 * 0.242 / np.sqrt(up.size)
    assert step.stochastic_round(jnp.float32(2.0), jax.random.key(1)) == 2.0


def test_small_updates_are_not_lost() -> None:
    """400 updates of 2**-11, of which 1.0 in bfloat16 has 16 in the distance to the next value."""

    def descend(round_: Any) -> float:
        def body(i: Any, x: jax.Array) -> jax.Array:
            return round_(x.astype(WIDE) + 2**-11, jax.random.fold_in(jax.random.key(0), i))

        x = jax.jit(lambda x: jax.lax.fori_loop(0, 400, body, x))(jnp.ones((64, 64), HALF))
        return float(x.astype(WIDE).mean())

    assert descend(step.stochastic_round) == pytest.approx(1 + 400 * 2**-11, abs=2e-3)
    assert descend(lambda x, key: x.astype(HALF)) == 1.0


def test_rounding_is_the_same_on_a_mesh() -> None:
    over = topology.make("data=4,model=2", 2)
    x, key = jax.random.normal(jax.random.key(0), (8, 16, 32)), jax.random.key(1)
    there = jax.device_put(x, mesh.sharding("NHD", x.shape, over, mesh.FSDP_RULES))
    one, many = (jax.jit(step.stochastic_round)(a, key) for a in (x, there))
    assert np.array_equal(np.asarray(one.astype(WIDE)), np.asarray(many.astype(WIDE)))


def test_rounding_differs_between_arrays_and_steps(model, batch) -> None:
    tx, state = start(model, weights=HALF)
    take = jax.jit(step.make_step(model.family, model.config, tx))
    first, again, later = (take(state._replace(step=jnp.int32(n)), batch)[0].weights["embed"] for n in (0, 0, 7))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    pair = {name: jnp.ones((8, 64), WIDE) for name in "ab"}
    same = step.init_state(optax.sgd(2**-9), step.cast(pair, HALF))
    new = step._update(optax.sgd(2**-9), same, pair, jax.random.key(0)).weights
    assert not np.array_equal(new["a"], new["b"])


def test_a_step_with_a_loss_of_nan_changes_nothing(model, batch) -> None:
    tx, state = start(model, "adamw", HALF, HALF)
    broken = state._replace(weights={**state.weights, "norm": jnp.full_like(state.weights["norm"], jnp.nan)})
    new, metrics = jax.jit(step.make_step(model.family, model.config, tx))(broken, batch)
    assert np.isnan(float(metrics.loss))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(broken), strict=True):
        assert np.array_equal(np.asarray(a.astype(WIDE)), np.asarray(b.astype(WIDE)), equal_nan=True)


def test_dots_keeps_products_in_the_compute_type(model, batch) -> None:
    """Not in float32, in which they are accumulated. Kept for the backward pass is what the scan of layers stacks."""
    tx, state = start(model)
    run = step.make_step(model.family, model.config, tx, dtype=HALF, remat="dots")
    text, L, F = str(jax.make_jaxpr(run)(state, batch)), model.config.L, model.config.F
    assert f"bf16[{L},{B},{T},{F}]" in text
    assert f"f32[{L},{B},{T},{F}]" not in text


def test_the_chunk_of_logits_has_a_bound_in_tokens_and_bytes(model, monkeypatch) -> None:
    def chunks(rows: int, length: int) -> str:
        x, targets = jnp.ones((rows, length, model.config.D)), jnp.zeros((rows, length), jnp.int32)

        def logits(x: jax.Array) -> jax.Array:
            return chunked_logits.map_chunked_logits(
                model.family, model.config, model.weights, x, targets, lambda logits, _: logits.sum(-1)
            )

        return str(jax.make_jaxpr(logits)(x))

    assert f"f32[2,2048,{V}]" in chunks(2, 4096)
    monkeypatch.setattr(chunked_logits, "CHUNK_BYTES", 512 * 4 * V)
    assert f"f32[2,256,{V}]" in chunks(2, 4096)
    assert f"f32[2,200,{V}]" in chunks(2, 600)  # three equal chunks, not of 256, 256 and 88


ALL: dict[str, Any] = {
    "grad_dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "optimizer": Optimizer(lr=1e-2, moment_dtype="bfloat16"),
}


@pytest.mark.usefixtures("quick")
def test_resume_is_bit_exact_and_refuses_other_types(files, tmp_path) -> None:
    run = run_of(files, tmp_path / "run", **ALL)
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    for name in ("grad_dtype", "weight_dtype"):
        with pytest.raises(ValueError, match=rf"{name} \(bfloat16, not float32\)"):
            loop.train(replace(run, **{name: "float32"}))
    with pytest.raises(ValueError, match=r"optimizer.moment_dtype \(bfloat16, not float32\)"):
        loop.train(replace(run, optimizer=Optimizer(lr=1e-2)))
    loop.train(run)
    whole = run_of(files, tmp_path / "whole", **ALL)
    loop.train(whole)
    assert lines(run.out) == lines(whole.out)
    found, expected = ((out / "model/model.safetensors").read_bytes() for out in (run.out, whole.out))
    assert found == expected


@pytest.mark.usefixtures("quick")
def test_a_run_of_an_earlier_version_has_float32(files, tmp_path) -> None:
    """Its run.json has no types."""
    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    record = json.loads((run.out / "run.json").read_text())
    del record["weight_dtype"], record["grad_dtype"], record["optimizer"]["moment_dtype"]
    (run.out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"weight_dtype \(float32, not bfloat16\)"):
        loop.train(replace(run, weight_dtype="bfloat16"))
    loop.train(run)


def test_the_dry_run_counts_types(files, tmp_path) -> None:
    def plan(**fields: Any) -> Any:
        setup = set_up(run_of(files, tmp_path / "run", **fields))
        found = dry_run.plan_memory(setup, loop.jit_step(setup))
        return found, "\n".join(dry_run.describe(setup, found))

    (wide, _), (half, text) = plan(), plan(**{**ALL, "grad_dtype": "float32"})
    assert half.weights * 2 == wide.weights == wide.gradients == half.gradients
    assert half.optimizer < 0.51 * wide.optimizer
    assert "weights bfloat16, gradients float32, moments bfloat16" in text

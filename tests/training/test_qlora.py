"""QLoRA (arXiv:2305.14314): an adapter trains on frozen weights that are quantized."""

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.quantized_models import quantized
from helpers.training_runs import Stopped, lines, stopping_at, write_base

import jaxlm
from jaxlm.cli import main
from jaxlm.data.packing import Batch
from jaxlm.devices import mesh, topology
from jaxlm.nn import lora, params
from jaxlm.nn.quantized import is_quantized, without_rounding
from jaxlm.training import loop, optimizers, step
from jaxlm.training.config import Data, LoraOptions, Optimizer, Run
from jaxlm.training.init_state import frozen_weights
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 199, (4, 17)).astype(np.int32)
    pos = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    return jax.tree.map(jnp.asarray, Batch(tokens[:, :-1], tokens[:, 1:], pos, np.ones((4, 16), bool)))


@cache
def adapter(targets: tuple[str, ...] = ("all-linear",)) -> Any:
    """An adapter of stacked layers with random b: zero would hide a."""
    model, _ = quantized("llama3", "int4")
    rows = lora.targets(model.family.PARAMS, model.config, targets)
    made = lora.init(rows, model.config.L, 2, 0.5, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    made = jax.tree.map(
        lambda leaf: replace(leaf, b=jax.random.normal(next(keys), leaf.b.shape)), made, is_leaf=lora.is_lora
    )
    return params.stack(made)


@cache
def dense_gradient() -> tuple[float, Any]:
    """Loss and gradient with the dequantized weights."""
    _, same = quantized("llama3", "int4")
    return jax.jit(jax.value_and_grad(partial(total, params.stack(same.weights))))(adapter())


def total(frozen: Any, trained: Any) -> jax.Array:
    """The mean loss, with activation checkpointing."""
    model, _ = quantized("llama3", "int4")
    weights = step.full_weights(trained, frozen, jnp.float32)
    return step.loss(model.family, model.config, weights, batch(), remat=step.REMAT["dots"]).loss / 64


def test_the_gradient_is_that_through_the_dequantized_weights() -> None:
    """Weights in groups (int4) and in channels (int8: down, embedding and head), in scanned layers."""
    model, _ = quantized("llama3", "int4")
    frozen = params.stack(without_rounding(model.weights))
    loss, gradient = jax.jit(jax.value_and_grad(partial(total, frozen)))(adapter())
    assert float(loss) == pytest.approx(float(dense_gradient()[0]), rel=1e-6)
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient()[1]), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("spec", ["data=2,model=2", pytest.param("data=4", marks=pytest.mark.slow)])
def test_a_step_on_a_mesh(spec: str) -> None:
    """Quantized weights are sharded over `data` too (FSDP). Gradient accumulation gives the same gradient."""
    model, _ = quantized("llama3", "int4")
    over, table = topology.make(spec, model.config.K), model.family.PARAMS
    frozen = params.stack(without_rounding(model.weights))
    frozen = jax.device_put(frozen, step.weight_shardings(frozen, over, table))
    assert "data" in frozen["layers"]["stacked"][0]["q"].q.sharding.spec
    tx = optimizers.make_optimizer(Optimizer(), 10, params.letters(table, adapter()))
    state = step.init_state(tx, adapter())
    state = jax.device_put(state, step.state_shardings(tx, jax.eval_shape(lambda: state), over, table))
    take = jax.jit(step.make_step(model.family, model.config, tx, accumulate=2, remat="dots"))
    with mesh.use_mesh(over):
        _, metrics = take(state, jax.tree.map(lambda a: mesh.place(a, "BT", over), batch()), frozen)
    loss, gradient = dense_gradient()
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)


def test_a_run(tmp_path, capsys) -> None:
    """The loss falls, resuming is bit-exact, checkpoints hold the adapter alone, and the adapter loads onto the same
    quantized weights. --dry-run counts their bytes. Another type, and all weights, are refused."""
    base, data = write_base(tmp_path / "base"), tmp_path / "train.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}, a number."} for i in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    sizes: dict[str, Any] = {"steps": 6, "batch": 4, "length": 48, "log_every": 2, "save_every": 2, "eval_every": 0}
    run = Run(
        out=tmp_path / "run", model=str(base), method="lora", quantize="int4", data=Data(train=(str(data),)),
        lora=LoraOptions(rank=4, targets=("q", "v")), optimizer=Optimizer(lr=1e-2), **sizes,
    )  # fmt: skip
    first, other = loop.train(run), replace(run, out=tmp_path / "other")
    with pytest.raises(Stopped):
        loop.train(other, stopping_at(4))
    with pytest.raises(ValueError, match=r"a run with other settings: quantize \(int4, not int8\)"):
        loop.train(replace(other, quantize="int8"))
    loop.train(other)
    assert lines(other.out) == lines(run.out)
    assert lines(run.out)[-1]["loss"] < lines(run.out)[0]["loss"] - 0.2
    saved = [(out / "adapter/adapter_model.safetensors").read_bytes() for out in (run.out, other.out)]
    assert saved[0] == saved[1]
    assert sum(p.stat().st_size for p in (run.out / "checkpoints").rglob("*") if p.is_file()) < 300_000  # no base

    frozen = jax.tree.leaves(frozen_weights(set_up(run)), is_leaf=is_quantized)
    assert {leaf.activations for leaf in frozen if is_quantized(leaf)} == {False}
    model = jaxlm.load(base, adapter=first.model, quantize="int4")
    kinds = {path.split(".")[-1]: leaf.w.kind for path, leaf in lora.leaves(model.weights) if is_quantized(leaf.w)}
    assert kinds == {name: "int8" if name in ("k", "v") else "int4" for name in kinds}
    assert "int4" in kinds.values()
    with pytest.raises(ValueError, match="trains all of them: use --method lora"):
        replace(run, method="full", lora=LoraOptions()).check()
    capsys.readouterr()
    flags = ["finetune", "--model", str(base), "--data.train", str(data), "--length", "48", "--dry-run", "--out", "x"]
    assert main([*flags, "--quantize", "int4", "--lora.targets", "q"]) == 0
    out = capsys.readouterr().out
    assert f"frozen {params.nbytes(quantized_base(model)) / 1e6:.1f} MB" in out


def quantized_base(model: jaxlm.Model) -> list[Any]:
    """The weights of a model without its adapter."""
    leaves = jax.tree.leaves(model.weights, is_leaf=lora.is_lora)
    return [leaf.w if lora.is_lora(leaf) else leaf for leaf in leaves]

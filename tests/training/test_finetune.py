"""Fine-tuning with LoRA: gradients, dropout, resuming, scanned layers, and the adapters that runs write."""

import json
import math
import re
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_chat import TEMPLATE
from helpers.tiny_models import tiny
from helpers.training_runs import BASE, Stopped, lines, stopping_at, write_base

import jaxlm
from jaxlm.checkpoint import safetensors
from jaxlm.cli import main
from jaxlm.data.packing import Batch
from jaxlm.nn import layer_types, lora, params
from jaxlm.training import loop, optimizers, step
from jaxlm.training.config import Data, LoraOptions, Optimizer, Run
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")


def batch_of(seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 199, (4, 17)).astype(np.int32)
    pos = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    return jax.tree.map(jnp.asarray, Batch(tokens[:, :-1], tokens[:, 1:], pos, np.ones((4, 16), bool)))


@cache
def new_run(family: str, stacked: bool, dropout: float = 0.0) -> tuple[Any, ...]:
    """A model, the step of an adapter of rank 2 with random b (zero would hide a), its state, the frozen weights."""
    model = tiny(family)
    table, cfg = model.family.PARAMS, model.config
    form = partial(params.stack, period=layer_types.layer_period(cfg)) if stacked else (lambda w: w)

    @jax.jit
    def adapter() -> Any:
        made = lora.init(lora.targets(table, cfg, ("all-linear",)), cfg.L, 2, 0.5, jax.random.key(1))
        keys = iter(jax.random.split(jax.random.key(2), 99))
        return jax.tree.map(
            lambda leaf: replace(leaf, b=jax.random.normal(next(keys), leaf.b.shape)), made, is_leaf=lora.is_lora
        )

    weights = form(adapter())
    tx = optimizers.make_optimizer(Optimizer(lr=1e-2), 10, params.letters(table, weights))
    take = jax.jit(step.make_step(model.family, cfg, tx, dropout=dropout))
    return model, take, step.init_state(tx, weights), form(model.weights)


@pytest.mark.parametrize("family", ["llama3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_gradient_of_an_adapter(family) -> None:
    """It follows from the gradient of the merged weight w + s b a by the chain rule. Scanned layers give the same."""
    model, _, state, frozen = new_run(family, stacked=False)
    joined = lora.join(frozen, state.weights)

    rows = jax.tree.map(jnp.asarray, batch_of())

    def total(weights: Any) -> jax.Array:
        return step.loss(model.family, model.config, weights, rows).loss / 64

    @jax.jit
    def gradients(adapter: Any) -> tuple[Any, Any]:
        dense = jax.grad(total)(lora.fused(lora.join(frozen, adapter)))
        return dense, jax.grad(lambda adapter: total(lora.join(frozen, adapter)))(adapter)

    dense, own = gradients(state.weights)
    for path, leaf in lora.leaves(joined):
        g, found = params.get(dense, path), params.get(own, path)
        flat = g.reshape(*leaf.b.shape[:-1], -1)  # outputs, then inputs as one
        a = leaf.a.reshape(leaf.a.shape[0], -1)
        expected = 0.5 * jnp.einsum("...i,ri->...r", flat, a, precision="highest")
        np.testing.assert_allclose(found.b, expected, rtol=1e-3, atol=1e-5 * float(jnp.abs(expected).max()))
    _, take, state, frozen = new_run(family, stacked=True)
    new, scanned = take(state, batch_of(), frozen)
    np.testing.assert_allclose(scanned.grad_norm, optax.tree.norm(own), rtol=1e-5)
    assert int(new.step) == 1


def test_dropout_is_a_function_of_seed_and_step() -> None:
    """The same step again gives the same bits. The next step gives others, and so does no dropout."""
    _, take, state, frozen = new_run("llama3", stacked=True, dropout=0.5)
    first, again = (take(state, batch_of(), frozen)[1].loss for _ in range(2))
    later = take(state._replace(step=state.step + 1), batch_of(), frozen)[1].loss
    assert first == again != later
    _, plain, state, frozen = new_run("llama3", stacked=True)
    assert plain(state, batch_of(), frozen)[1].loss != first


def test_each_layer_of_a_scan_has_its_own_dropout() -> None:
    _, _, state, _ = new_run("llama3", stacked=True)
    keys = [leaf.key for leaf in jax.tree.leaves(lora.keyed(state.weights, jax.random.key(0), 0.5),
                                                 is_leaf=lora.is_lora)]  # fmt: skip
    drawn = np.concatenate([jax.random.key_data(key).reshape(-1, 2) for key in keys])
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 7 * 2


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}, a number."} for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def run_of(chats: Path, base: Path, out: Path, **fields: Any) -> Run:
    sizes: dict[str, Any] = {"steps": 8, "batch": 4, "length": 48, "log_every": 2, "save_every": 3, "eval_every": 0}
    options = LoraOptions(rank=4, dropout=0.1, targets=("q_proj", "v"))
    given = {"lora": options, "optimizer": Optimizer(lr=1e-2), "data": Data(train=(str(chats),)), **sizes}
    return Run(out=out, model=str(base), method="lora", **{**given, **fields})


@pytest.fixture(scope="module")
def first(chats, base, quick, tmp_path_factory) -> loop.Trained:
    """A trained adapter."""
    return loop.train(run_of(chats, base, tmp_path_factory.mktemp("first") / "run"))


def test_a_run_of_an_adapter(chats, base, first, tmp_path) -> None:
    """The loss falls, resuming is bit-exact, checkpoints hold the adapter alone, and `load` joins it with its base."""
    losses = [line["loss"] for line in lines(first.folder)]
    assert losses[-1] < losses[0] - 0.3
    other = run_of(chats, base, tmp_path / "other")
    with pytest.raises(Stopped):
        loop.train(other, stopping_at(6))
    loop.train(other)
    assert lines(other.out) == lines(first.folder)
    saved = [(out / "adapter/adapter_model.safetensors").read_bytes() for out in (first.folder, other.out)]
    assert saved[0] == saved[1]
    assert sum(p.stat().st_size for p in (first.folder / "checkpoints").rglob("*") if p.is_file()) < 500_000  # no base
    base, model = jaxlm.load(base), jaxlm.load(base, adapter=first.model)
    adapted = dict(lora.leaves(model.weights))
    assert {path.split(".")[-1] for path in adapted} == {"q", "v"}
    assert len(adapted) == 2 * model.config.L
    for path, leaf in adapted.items():
        assert jnp.array_equal(leaf.w, params.get(base.weights, path))
        assert leaf.scale == 8
        assert float(jnp.abs(leaf.b).max()) > 0


def test_training_continues_from_an_adapter(chats, base, first, tmp_path) -> None:
    """The loss starts where it ended. Another rank is refused."""
    fields: dict[str, Any] = {"adapter": first.model, "steps": 2, "log_every": 1}
    second = loop.train(run_of(chats, base, tmp_path / "second", **fields))
    assert lines(second.folder)[0]["loss"] < lines(first.folder)[0]["loss"] - 0.3
    with pytest.raises(ValueError, match=r"its own are --lora\.rank 4 --lora\.alpha 32 --lora\.targets q_proj v_proj$"):
        loop.train(run_of(chats, base, tmp_path / "third", adapter=first.model, lora=LoraOptions(rank=8)))
    several = shutil.copytree(first.model, tmp_path / "several")
    settings = json.loads((several / "adapter_config.json").read_text())
    settings["alpha_pattern"] = {"q_proj": 7}
    (several / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"several has several ranks or alphas.*train another adapter$"):
        loop.train(run_of(chats, base, tmp_path / "fourth", adapter=several))


def test_training_continues_with_the_chat_template_beside_the_adapter(chats, base, first, tmp_path) -> None:
    adapter = shutil.copytree(first.model, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    setup = set_up(run_of(chats, base, tmp_path / "run", adapter=adapter))
    assert setup.tokenizer.hf.chat_template == TEMPLATE
    assert "chat template beside the adapter" in "".join(setup.notes)
    assert setup.checkpoint.adapter is None
    setup = set_up(run_of(chats, base, tmp_path / "run", adapter=adapter, tokenizer=base))
    assert setup.tokenizer.hf.chat_template != TEMPLATE


def test_a_dry_run(chats, base, tmp_path, capsys) -> None:
    flags = ["finetune", "--model", str(base), "--data.train", str(chats)]
    assert main([*flags, "--dry-run", "--out", str(tmp_path / "run"), "--length", "64"]) == 0
    out = capsys.readouterr().out
    held = sum(math.prod(tensor.shape) for tensor in safetensors.read_header(base / "model.safetensors").values())
    assert re.search(rf"parameters of an adapter, {held:,} of its base \(llama3\), adamw, float32", out)
    assert "24 documents (prompt)" in out
    assert re.search(r"3\.\d\d epochs", out)
    assert "the run fits" in out
    assert "example 2" in out
    assert "?⟧ It is" in out  # the prompt is outside the loss mask, the completion is in it
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_the_head_alone(chats, base, tmp_path) -> None:
    """The head is not tied to the embedding. No layer is adapted."""
    model, raw = jaxlm.load(base), {**BASE, "tie_word_embeddings": False}
    config = replace(model.config, tied=False)
    untied = jaxlm.Model(model.family, config, {**model.weights, "head": model.weights["embed"]}, model.tokenizer)
    base = jaxlm.export(untied, tmp_path / "base", config=raw).folder
    run = run_of(chats, base, tmp_path / "run", lora=LoraOptions(targets=("lm_head",)), steps=2)
    done = loop.train(run)
    found = dict(lora.leaves(jaxlm.load(base, adapter=done.model).weights))
    assert list(found) == ["head"]
    with pytest.raises(ValueError, match=r"lora\.dropout"):
        loop.train(replace(run, lora=LoraOptions(targets=("head",), dropout=0.1)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("q", "embed"), "LoRA has no target embed: choose from q, k, v, o, gate, up, down, all-linear"),
     (("lm_head",), "LoRA has no target lm_head (the head is tied to the embedding)")],
)  # fmt: skip
def test_unknown_targets(chats, base, tmp_path, targets, message) -> None:
    with pytest.raises(ValueError) as caught:
        loop.train(run_of(chats, base, tmp_path / "run", lora=LoraOptions(targets=targets)))
    assert message in str(caught.value)

"""Ten training steps with AdamW agree with torch, from the same weights and batches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_adapter import drawn
from helpers.tiny_models import DISTINCT, families, tiny
from oracle.reference import QUICK, V, build, masks, share_frequencies

import jaxlm
from jaxlm.checkpoint import peft
from jaxlm.data.packing import Batch
from jaxlm.nn import attention_cpu, attention_reference, attention_tpu, layer_types, lora, params
from jaxlm.training import optimizers, step
from jaxlm.training.config import Optimizer
from jaxlm.training.loss import loss

pytestmark = pytest.mark.oracle
STEPS, LEARNING_RATE, DECAY, CLIP = 10, 1e-3, 0.1, 1.0
# Compiling takes most of the time. Only the family with the most kinds of layers is compiled with all optimizations.
OPTIONS: dict[str, Any] = {"gemma3": None}
stack, unstack = jax.jit(params.stack, static_argnums=1), jax.jit(params.unstack)


def batches() -> list[Batch]:
    """Returns batches of two rows of 24 tokens: one document, and two packed ones. A fifth of the targets is masked."""
    rng = np.random.default_rng(0)
    pos = np.stack([np.arange(24), [*range(14), *range(10)]]).astype(np.int32)
    out = []
    for _ in range(STEPS):
        tokens = rng.integers(0, V, (2, 25)).astype(np.int32)
        loss_mask = rng.random((2, 24)) < 0.8
        loss_mask[1, 13] = False  # the first token of the next document is no target
        out.append(Batch(tokens[:, :-1], tokens[:, 1:], pos, loss_mask))
    return out


def torch_loss(oracle: Any, batch: Batch) -> Any:
    import torch

    pos = batch.pos.copy()
    pos[1, 14:] += 1000  # only for the masks, which depend on positions: outside every window
    mask = masks(oracle, pos)
    apart = np.zeros((2, 1, 24, 24), bool)
    apart[1, :, 14:, :14] = True
    lowest = torch.finfo(torch.float32).min
    kinds = mask if isinstance(mask, dict) else {"": mask}
    kinds = {kind: m.masked_fill(torch.from_numpy(apart), lowest) for kind, m in kinds.items()}
    out = oracle(
        input_ids=torch.from_numpy(batch.tokens).long(),
        position_ids=torch.from_numpy(batch.pos).long(),
        attention_mask=kinds if isinstance(mask, dict) else kinds[""],
        use_cache=False,
    )
    nats = torch.nn.functional.cross_entropy(
        out.logits.reshape(-1, V), torch.from_numpy(batch.targets).long().reshape(-1), reduction="none"
    )
    counts = torch.from_numpy(batch.loss_mask).float().reshape(-1)
    return (nats * counts).sum() / counts.sum()


def torch_run(oracle: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    """Returns the losses, and the gradients of the first step before clipping."""
    import torch

    named = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    norms = [p for name, p in named.items() if p.ndim < 2]
    matrices = [p for name, p in named.items() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    tx = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses, first = [], {}
    for batch in batches():
        tx.zero_grad()
        value = torch_loss(oracle, batch)
        value.backward()
        first = first or {name: p.grad.numpy().copy() for name, p in named.items()}
        torch.nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        tx.step()
        losses.append(value.item())
    return losses, first


def by_name(model: jaxlm.Model, tree: Any) -> dict[str, np.ndarray]:
    """Returns our arrays under the names and in the shapes of the checkpoint."""
    rows = params.tensors(model.family.PARAMS, model.config)
    return {row.names[0]: np.asarray(params.get(tree, row.path)).reshape(row.stored_shape) for row in rows}


def splash_in_blocks(q: Any, k: Any, v: Any, tokens: Any, window: int | None, scale: float) -> Any:
    """Splash attention in interpret mode, in float32, with rows padded to whole blocks."""
    T, more = q.shape[1], -q.shape[1] % attention_tpu.BLOCKS[-1]
    pos = jnp.pad(tokens.pos, ((0, 0), (0, more)), constant_values=-1)
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    tokens = attention_reference.TokenPositions(pos, attention_reference.segment_ids(pos))
    return attention_tpu.splash(q, k, v, tokens, window, scale, interpret=True)[:, :T]


BACKENDS = {"cpu": attention_cpu.causal, "reference": attention_reference.causal, "splash": splash_in_blocks}


@pytest.mark.parametrize("family", families(*DISTINCT))
@pytest.mark.parametrize("backend", [
    name if name == "cpu" else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS
])  # fmt: skip
def test_ten_steps(family: str, backend: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "causal", BACKENDS[backend])
    # With a padding id, torch's embedding gives that row no gradient.
    oracle = build(family, tie_word_embeddings=family == "gemma3", pad_token_id=None)
    oracle.save_pretrained(tmp_path)
    model = jaxlm.load(tmp_path)
    share_frequencies(oracle, model)
    start = by_name(model, model.weights)
    losses, gradients = torch_run(oracle)

    of = Optimizer(lr=LEARNING_RATE, schedule="constant", warmup=0, weight_decay=DECAY, clip=CLIP)
    stacked = stack(model.weights, layer_types.layer_period(model.config))
    tx = optimizers.make_optimizer(of, STEPS, params.letters(model.family.PARAMS, stacked))
    run = jax.jit(step.make_step(model.family, model.config, tx), compiler_options=OPTIONS.get(family, QUICK))
    state, ours_losses = jax.jit(partial(step.init_state, tx))(stacked), []
    mean = lambda w, b: (s := loss(model.family, model.config, w, b)).loss / s.tokens  # noqa: E731
    first = jax.jit(jax.grad(mean), compiler_options=QUICK)(stacked, batches()[0])
    for batch in batches():
        state, metrics = run(state, batch)
        ours_losses.append(float(metrics.loss))
    assert np.allclose(ours_losses, losses, rtol=1e-5, atol=0)
    for name, gradient in by_name(model, unstack(first)).items():
        error = np.linalg.norm(gradient - gradients[name]) / np.linalg.norm(gradients[name])
        assert error <= 1e-4, (name, error)
    ours = by_name(model, unstack(state.weights))
    theirs = {name: p.detach().numpy() for name, p in oracle.named_parameters()}
    difference = np.sqrt(sum(np.sum((ours[name] - theirs[name]) ** 2) for name in ours))
    update = np.sqrt(sum(np.sum((theirs[name] - start[name]) ** 2) for name in ours))
    assert update > 0.05
    assert difference <= 1e-3 * update


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_ten_steps_of_an_adapter(family: str, tmp_path: Any) -> None:
    """Compared with the peft package, from an adapter that it reads: the same losses and the same adapter."""
    from peft import PeftModel

    oracle = build(family, tie_word_embeddings=family == "gemma3", pad_token_id=None)
    oracle.save_pretrained(tmp_path / "base")
    model = jaxlm.load(tmp_path / "base")
    share_frequencies(oracle, model)
    table, cfg, period = model.family.PARAMS, model.config, layer_types.layer_period(model.config)
    tree = drawn(model)
    peft.write(tmp_path / "adapter", tree, table, cfg)
    losses, _ = torch_run(PeftModel.from_pretrained(oracle, tmp_path / "adapter", is_trainable=True).get_base_model())

    of = Optimizer(lr=LEARNING_RATE, schedule="constant", warmup=0, weight_decay=DECAY, clip=CLIP)
    stacked, frozen = stack(tree, period), stack(model.weights, period)
    tx = optimizers.make_optimizer(of, STEPS, params.letters(table, stacked))
    run = jax.jit(step.make_step(model.family, cfg, tx), compiler_options=QUICK)
    state, ours_losses = jax.jit(partial(step.init_state, tx))(stacked), []
    for batch in batches():
        state, metrics = run(state, batch, frozen)
        ours_losses.append(float(metrics.loss))
    assert np.allclose(ours_losses, losses, rtol=1e-5, atol=0)
    theirs = {name: p.detach().numpy() for name, p in oracle.named_parameters() if p.requires_grad}
    start, ours = halves(model, tree), halves(model, unstack(state.weights))
    assert ours.keys() == theirs.keys()
    difference = np.sqrt(sum(np.sum((ours[name] - theirs[name]) ** 2) for name in ours))
    update = np.sqrt(sum(np.sum((theirs[name] - start[name]) ** 2) for name in ours))
    assert update > 0.05
    assert difference <= 1e-3 * update


def halves(model: jaxlm.Model, tree: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of an adapter under the names that peft has in training."""
    rows = {row.path: row for row in params.tensors(model.family.PARAMS, model.config)}
    arrays = {}
    for path, leaf in lora.leaves(tree):
        row, rank = rows[path], leaf.a.shape[0]
        module = row.names[0].removesuffix(".weight")
        arrays[f"{module}.lora_A.default.weight"] = np.asarray(leaf.a).reshape(rank, row.stored_shape[1])
        arrays[f"{module}.lora_B.default.weight"] = np.asarray(leaf.b).reshape(row.stored_shape[0], rank)
    return arrays


def test_a_wrong_optimizer_is_detected() -> None:
    """Planted faults: without weight decay, or with decay of norms, weights differ by more than the tolerance above."""
    model = tiny("llama3")
    letters = params.letters(model.family.PARAMS, model.weights)
    noise = [jax.tree.map(lambda w, i=i: np.sin(np.arange(w.size) * (i + 2)).reshape(w.shape), model.weights)
             for i in range(STEPS)]  # fmt: skip
    ends = []
    for decay, kinds in ((DECAY, letters), (0.0, letters), (DECAY, jax.tree.map(lambda _: "VD", letters))):
        of = Optimizer(lr=LEARNING_RATE, schedule="constant", warmup=0, weight_decay=decay, clip=CLIP)
        tx = optimizers.make_optimizer(of, STEPS, kinds)
        weights, state = model.weights, jax.jit(tx.init)(model.weights)

        @partial(jax.jit, compiler_options=QUICK)
        def update(gradient: Any, state: Any, weights: Any, tx: Any = tx) -> tuple[Any, Any]:
            updates, state = tx.update(gradient, state, weights)
            return optax.apply_updates(weights, updates), state

        for gradient in noise:
            weights, state = update(gradient, state, weights)
        ends.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(weights)]))
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model.weights)])
    for other in ends[1:]:
        assert np.linalg.norm(other - ends[0]) > 3e-3 * np.linalg.norm(ends[0] - start)

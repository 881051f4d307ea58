"""Tensor parallelism and data parallelism on virtual devices: the same text, logits and gradients as on one device, and
the collectives of each program."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import DISTINCT, FAMILIES, UNIFORM, families, layers, tiny

import jaxlm
from jaxlm import Model
from jaxlm.checkpoint.writer import gather_rows
from jaxlm.devices import mesh, topology
from jaxlm.inference import cache_rows, sampling
from jaxlm.inference.compilation import clear_executables, executables
from jaxlm.inference.requests import MAX_LOGPROBS
from jaxlm.nn import attention_cpu, attention_reference, params

MESHES = ["data=2", "model=2", "data=2,model=2", "data=4,model=2", "data=2,model=4", "model=8", "data=8"]
PROMPTS = [[1, 5, 9], [4] * 14, [7, 0], [3, 2, 1, 0, 1]]  # one length bucket, for few compilations
TEXT: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def make(spec: str, K: int = 4) -> Any:
    return topology.make(spec, K)


def model_of(family: str) -> Model:
    """8 query heads, 4 kv heads and an odd vocabulary: model=8 needs kv groups and replicates the vocabulary."""
    return tiny(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=64, intermediate_size=128)


def spread(model: Model, over: Any) -> Model:
    """The model on a mesh."""
    weights: dict[str, Any] = {}
    for row in params.tensors(model.family.PARAMS, model.config):
        leaf: Any = model.weights
        for part in row.path.split("."):
            leaf = leaf[int(part)] if isinstance(leaf, list) else leaf[part]
        params.put(weights, row.path, mesh.place(leaf, row.letters, over))
    return Model(model.family, model.config, weights)


def texts(model: Model, **options: Any) -> list[list[int]]:
    return [text.tokens for text in jaxlm.generate(model, PROMPTS, **TEXT, **options)]


@pytest.mark.parametrize(("spec", "N", "K", "aligned"), [
    ("model=4", 8, 4, True), ("model=8", 8, 2, True), ("model=8", 8, 1, True), ("model=4", 12, 6, False),
])  # fmt: skip
def test_which_heads_are_aligned(spec: str, N: int, K: int, aligned: bool) -> None:
    """The last: 2 x 2 devices, each with 3 query heads, which read 2 of its 3 kv heads."""
    with mesh.use_mesh(make(spec, K)):
        assert mesh.heads_are_aligned(N, K) is aligned


# All rows take minutes: Gemma on one mesh is in the light tier, the others in the slow tier.
QUICK = ("gemma3", "data=2,model=4")
TABLE = [(family, spec) for family in FAMILIES for spec in MESHES]
ROWS = [pytest.param(*row, marks=[] if row == QUICK else pytest.mark.slow) for row in TABLE]


@pytest.mark.smoke
@pytest.mark.parametrize(("family", "spec"), ROWS)
def test_greedy_text_is_the_same_on_every_mesh(family: str, spec: str) -> None:
    """It equals the argmax of one device's logits over the whole text."""
    model = model_of(family)
    there = spread(model, make(spec))
    assert there.mesh is not None
    made = texts(there, temperature=0)
    rows = np.zeros((8, 26), np.int32)
    for row, prompt, text in zip(rows, PROMPTS, made):
        row[: len(prompt) + 12] = prompt + text
    a, b = (np.asarray(m.forward(rows, m.weights)[0]) for m in (there, model))
    assert np.abs(a - b).max() <= 2e-5 * b.std()  # another order of sums
    assert made == [row[len(p) - 1 : len(p) + 11].argmax(-1).tolist() for row, p in zip(b, PROMPTS)]


@pytest.mark.parametrize("spec", [None, "data=2,model=4"])
def test_the_decoding_step_of_accelerators_writes_the_same_text(
    spec: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device and on a mesh. Gemma has ring buffers."""
    model = model_of("gemma3")
    clear_executables()  # a case that failed has left its programs
    expected = texts(model, temperature=0)
    monkeypatch.setattr(attention_cpu, "over_cache", attention_reference.over_cache)
    clear_executables()
    there = spread(model, make(spec)) if spec else replace(model)
    assert texts(there, temperature=0) == expected
    clear_executables()


def test_a_model_that_is_not_on_the_default_device_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it compiles, too, other programs are traced for its device."""
    from jaxlm.inference import compilation

    monkeypatch.setattr(compilation, "PATIENCE", 0.0)
    clear_executables()
    model = model_of("llama3")
    there = replace(model, weights=jax.device_put(model.weights, jax.devices()[3]))
    assert there.device == jax.devices()[3]
    assert texts(there, temperature=0) == texts(model, temperature=0)


@pytest.mark.slow
def test_sampled_text_does_not_depend_on_the_mesh() -> None:
    model = model_of("gemma3")
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    expected = texts(model, **options)
    assert len({tuple(text) for text in expected}) == 4
    assert texts(spread(model, make("data=2,model=4")), **options) == expected


@pytest.mark.parametrize(("family", "spec"), ROWS)
def test_gradients_are_the_same_on_every_mesh(family: str, spec: str) -> None:
    model = model_of(family)
    there = spread(model, make(spec))
    rows = np.arange(48, dtype=np.int32).reshape(4, 12)

    def loss(weights: Any) -> jax.Array:
        logits, _ = model.forward(rows, weights)
        return -jax.nn.log_softmax(logits)[:, :-1].mean()

    expected = jax.jit(jax.grad(loss))(model.weights)
    with mesh.use_mesh_of(there.weights):
        found = jax.jit(jax.grad(loss))(there.weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * np.abs(np.asarray(b)).max()
    gradient, weight = found["layers"][0]["q"], there.weights["layers"][0]["q"]
    assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def collectives(program: Any) -> Counter[str]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf"= .*? ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.smoke
@pytest.mark.parametrize("family", families(*DISTINCT))
@pytest.mark.parametrize("T", [1, 16])
def test_two_all_reduces_per_layer_and_one_for_the_embedding(family: str, T: int) -> None:
    """Prefill and decoding with a KV cache have no other collectives."""
    count = 1 if family in UNIFORM else 2
    model = tiny(family, num_attention_heads=8, num_key_value_heads=4, vocab_size=200, **layers(family, count))
    there = spread(model, make("data=2,model=4"))
    kv = there.init_kv(4, 64, chunk=16)
    tokens = jnp.zeros((4, T), jnp.int32)
    with mesh.use_mesh_of(there.weights):
        program = jax.jit(lambda w, kv, t, p: there.family.forward(there.config, t, w, kv, p), donate_argnums=1)
        found = collectives(program.lower(there.weights, kv, tokens, jnp.zeros_like(tokens)).compile())
    extra = model.config.L if "olmo" in family else 0  # the norms over all heads of q and k share one
    assert found == Counter({"all-reduce": 2 * model.config.L + 1 + extra})


def gathered(model: Model, name: str) -> list[list[int]]:
    """The shapes of all collectives but all-reduces in a model's compiled programs."""
    programs = [program.as_text() for key, program in executables(model.family, model.config).items() if key[0] == name]
    assert programs
    moved = r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\("
    return [[int(n) for n in shape.split(",") if n] for text in programs for shape in re.findall(moved, text)]


def test_sampling_does_not_gather_the_logits() -> None:
    """The shards of the vocabulary exchange counts and k candidates each, never logits. Ties are ordered by id."""
    model = tiny("qwen3", vocab_size=256, num_hidden_layers=1)
    there = spread(model, make("data=2,model=4"))
    clear_executables()
    options: Any = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "top_p": 0.9, "seed": 1, "logprobs": 5}
    for a, b in zip(*(jaxlm.generate(m, PROMPTS, **options) for m in (model, there))):
        assert a.tokens == b.tokens
        assert [[i for i, _ in x.top] for x in a.logprobs] == [[i for i, _ in x.top] for x in b.logprobs]
        assert np.allclose([x.chosen for x in a.logprobs], [x.chosen for x in b.logprobs], atol=1e-5)
    for shape in gathered(there, "decode"):
        assert np.prod(shape) <= 4 * 4 * MAX_LOGPROBS  # rows x shards x k, once for values and once for ids
    with jax.set_mesh(there.mesh):
        logits = jnp.asarray(np.tile(np.arange(128, dtype=np.float32), (4, 2)))  # each value twice, on two devices
        _, ids, _ = jax.jit(sampling.logprobs, static_argnums=2)(logits, jnp.zeros(4, jnp.int32), 3)
    assert np.asarray(ids).tolist() == [[127, 255, 126]] * 4


def test_kv_groups() -> None:
    """4 kv heads on 8 devices: each head is on two, in the KV cache and in the weights, without more collectives."""
    model = model_of("llama3")
    there = spread(model, make("model=8"))
    assert dict(there.mesh.shape) == {"data": 1, "model": 4, "group": 2}
    kv = there.init_kv(2, 16)
    assert kv.layers[0]["k"].sharding.shard_shape(kv.layers[0]["k"].shape)[1] == 1
    assert there.weights["layers"][0]["q"].sharding.shard_shape((8, 8, 64))[0] == 1
    tokens = jnp.zeros((2, 1), jnp.int32)
    with mesh.use_mesh_of(there.weights):
        program = jax.jit(lambda w, kv, t, p: there.family.forward(there.config, t, w, kv, p), donate_argnums=1)
        found = collectives(program.lower(there.weights, kv, tokens, tokens).compile())
    assert found == Counter({"all-reduce": 2 * model.config.L})  # none for the replicated vocabulary


def test_resize_cache_needs_no_collectives() -> None:
    there = spread(tiny("gemma3", num_attention_heads=8, num_key_value_heads=4), make("data=2,model=4"))
    short, long = (there.init_kv(4, length, chunk=1) for length in (16, 32))
    with mesh.use_mesh_of(there.weights):
        assert not collectives(jax.jit(cache_rows.resize_cache).lower(long, short).compile())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=2,model=3", "6 devices, but there are 8"),
        ("data=4,model=4", "16 devices, but there are 8"),
        ("rows=8", "axis rows"),
        ("data=2,data=4", "each axis once"),
        ("model", "'model'"),
        ("model=0", "'model=0'"),
    ],
)
def test_invalid_meshes_are_rejected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.make(spec, 4)


def test_axes_that_do_not_divide_are_replicated() -> None:
    over, spec = make("model=8", K=8), jax.sharding.PartitionSpec
    assert mesh.spec("NHD", (8, 16, 64), over) == spec("model")
    assert mesh.spec("DF", (64, 128), over) == spec(None, "model")
    assert mesh.spec("KHD", (4, 16, 64), over) == spec()
    assert mesh.spec("VD", (199, 64), over) == spec()
    over = make("model=8", K=4)
    assert mesh.spec("NHD", (8, 16, 64), over) == spec(("model", "group"))
    assert mesh.spec("NHD", (4, 16, 64), over) == spec("model")
    assert mesh.spec("KHD", (4, 16, 64), over) == spec("model")


def test_default_mesh_prefers_tensor_parallelism() -> None:
    assert topology.default({"N": 8, "F": 128}, 8) == {"data": 1, "model": 8}
    assert topology.default({"N": 12, "F": 128}, 8) == {"data": 2, "model": 4}
    assert topology.default({"N": 3, "F": 128}, 8) == {"data": 8, "model": 1}


def test_gather_rows_of_a_sharded_array_is_bit_exact() -> None:
    over = make("data=2,model=4")
    x = np.random.default_rng(0).standard_normal((12, 3, 8)).astype(np.float32)
    x[0, 0, :4] = [-0.0, np.nan, np.inf, -np.inf]
    for dtype, letters in ((np.float32, "NHD"), (jnp.bfloat16, "DHN"), (np.float16, "DHB"), (jnp.bfloat16, "NHB")):
        there = mesh.place(x.astype(dtype), letters, over)
        for begin, count in ((0, 5), (2, 5), (7, 5)):
            assert gather_rows(there, begin, count).tobytes() == x.astype(dtype)[begin : begin + count].tobytes()

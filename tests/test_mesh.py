"""One forward on any mesh of virtual devices: the same text, logits and gradients, no exchange that is not meant."""

import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings.tiny import tiny

import jaxlm
from jaxlm import Model, mesh, params
from jaxlm.decoding import compiled_for

MESHES = ["data=2,model=1", "data=1,model=2", "data=2,model=2", "data=4,model=2", "data=2,model=4", "data=1,model=8",
          "data=8,model=1"]  # fmt: skip
FAMILIES = ["llama3", "qwen3", "olmo2", "gemma3"]
PROMPTS = [[1, 5, 9], [4] * 20, [7, 0], [3, 2, 1, 0, 1]]
TEXT: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def make(spec: str) -> Any:
    sizes = mesh.parse(spec)
    return mesh.make(sizes, jax.devices()[: sizes["data"] * sizes["model"]])


def model_of(family: str) -> Model:
    """Eight heads on four, and a vocabulary that is odd: kv heads and vocabulary stay whole on some of the meshes."""
    return tiny(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=64, intermediate_size=128)


def spread(model: Model, over: Any) -> Model:
    """The model on a mesh."""
    weights: dict[str, Any] = {}
    for row in params.rows(model.family.PARAMS, model.config):
        leaf: Any = model.weights
        for part in row.path.split("."):
            leaf = leaf[int(part)] if isinstance(leaf, list) else leaf[part]
        params.put(weights, row.path, mesh.place(leaf, row.letters, over))
    return Model(model.family, model.config, weights)


def texts(model: Model, **options: Any) -> list[list[int]]:
    return [text.tokens for text in jaxlm.generate(model, PROMPTS, **TEXT, **options)]


@cache
def plain(family: str) -> tuple[Model, list[list[int]]]:
    model = model_of(family)
    return model, texts(model, temperature=0)


# The whole table takes minutes: two families on one mesh run each time, `-m slow` runs the rest.
TABLE = [(family, spec) for family in FAMILIES for spec in MESHES]
QUICK = [("llama3", "data=2,model=4"), ("gemma3", "data=2,model=4")]


@pytest.mark.parametrize(
    ("family", "spec"), [pytest.param(*row, marks=[] if row in QUICK else pytest.mark.slow) for row in TABLE]
)
def test_the_same_text_on_every_mesh(family: str, spec: str) -> None:
    model, expected = plain(family)
    there = spread(model, make(spec))
    assert there.mesh is not None
    assert texts(there, temperature=0) == expected
    rows = np.arange(96, dtype=np.int32).reshape(8, 12)
    a, b = (np.asarray(m.forward(rows, m.weights)[0]) for m in (there, model))
    assert np.abs(a - b).max() <= 2e-5 * b.std()  # another order of sums


def test_sampled_text_does_not_depend_on_the_mesh() -> None:
    model = model_of("qwen3")
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    expected = texts(model, **options)
    assert len({tuple(text) for text in expected}) == 4
    assert texts(spread(model, make("data=2,model=4")), **options) == expected


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_gradients(family: str) -> None:
    model = model_of(family)
    there = spread(model, make("data=2,model=4"))
    rows = np.arange(48, dtype=np.int32).reshape(4, 12)

    def loss(weights: Any) -> jax.Array:
        logits, _ = model.forward(rows, weights)
        return -jax.nn.log_softmax(logits)[:, :-1].mean()

    expected = jax.grad(loss)(model.weights)
    with mesh.on(there.weights):
        found = jax.jit(jax.grad(loss))(there.weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * np.abs(np.asarray(b)).max()
    gradient, weight = found["layers"][0]["q"], there.weights["layers"][0]["q"]
    assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def collectives(program: Any) -> Counter[str]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf"= .*? ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 16])
def test_two_sums_a_layer_and_one_for_the_embedding(family: str, T: int) -> None:
    """Prefill and decoding through the cache: nothing else crosses, and no row leaves its device."""
    model = tiny(family, num_attention_heads=8, num_key_value_heads=4, vocab_size=200)
    there = spread(model, make("data=2,model=4"))
    kv = there.init_kv(4, 64, chunk=16)
    tokens = jnp.zeros((4, T), jnp.int32)
    with mesh.on(there.weights):
        program = jax.jit(lambda w, kv, t, p: there.family.forward(there.config, t, w, kv, p), donate_argnums=1)
        found = collectives(program.lower(there.weights, kv, tokens, jnp.zeros_like(tokens)).compile())
    extra = model.config.L if family == "olmo2" else 0  # q and k are normed over all heads at once: one sum for both
    assert found == Counter({"all-reduce": 2 * model.config.L + 1 + extra})


def test_the_next_token_is_picked_where_the_logits_lie() -> None:
    """Greedy and sampled: the vocabulary's shards send counts and candidates, never their logits."""
    model = tiny("llama3", num_attention_heads=8, num_key_value_heads=4, vocab_size=4096)
    there = spread(model, make("data=1,model=8"))
    compiled_for(there.family, there.config).clear()
    texts(there, temperature=1.0, top_p=0.9, seed=1)
    steps = [program.as_text() for key, program in there.programs.compiled.items() if key[0] == "decode"]
    moved = r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\("
    shapes = [shape for step in steps for shape in re.findall(moved, step)]
    assert steps
    assert all(np.prod([int(n) for n in shape.split(",") if n]) <= 8 * 4 for shape in shapes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=2,model=3", "mesh data=2,model=3 is for 6 devices, but there are 8"),
        ("rows=8", "there is no axis rows; the axes are data and model"),
        ("data=2,data=4", "each axis once"),
        ("model", "write data=2,model=4"),
        ("model=0", "sizes of at least 1"),
    ],
)
def test_a_mesh_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh.make(spec)


def test_what_is_not_divided_is_replicated() -> None:
    over = make("data=1,model=8")
    assert mesh.spec("NHD", (8, 16, 64), over) == jax.sharding.PartitionSpec("model", None, None)
    assert mesh.spec("KHD", (4, 16, 64), over) == jax.sharding.PartitionSpec(None, None, None)
    assert mesh.spec("VD", (199, 64), over) == jax.sharding.PartitionSpec(None, None)
    assert dict(mesh.default({"N": 8, "K": 4, "F": 128}, jax.devices()).shape) == {"data": 2, "model": 4}
    assert dict(mesh.default({"N": 3, "K": 3, "F": 128}, jax.devices()).shape) == {"data": 8, "model": 1}

"""Generation with a KV cache in 8 bits: how far logits move, and every user of a cache's arrays."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import CONFIGS, tiny

import jaxlm
from jaxlm import models
from jaxlm.bench import plan
from jaxlm.devices import specs, topology
from jaxlm.evaluation.scoring import ScoreRequest, scores
from jaxlm.inference import memory, roofline
from jaxlm.inference.memory import CacheLengths, few_cache_lengths
from jaxlm.loading import spread
from jaxlm.nn.quantized_kv import QuantizedKV

FORMATS = ["int8", "fp8"]
STORY = "Once upon a time, there was a girl named Lily. She loved to play with her toys. One day, she found a ball."
STORIES = Path(jaxlm.__file__).parent / "stories"
LONG = [(7 * i) % 90 for i in range(60)]


@pytest.fixture(scope="module")
def stories() -> jaxlm.Model:
    return jaxlm.load(STORIES, dtype="float32")


def log_softmax(x: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x)), np.float64)


@pytest.mark.smoke
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_the_distribution_of_the_next_token_hardly_moves(stories: jaxlm.Model, kv_dtype: str) -> None:
    """A rounding error of r, relative to the values, moves attention by r at most, and logits of deviation s by about
    r s. The KL divergence of a softmax is half the variance of that: r² s² / 2. Scales of the wrong token exceed it."""
    ids = np.array([stories.tokenizer.encode(STORY)], np.int32)  # pyright: ignore[reportOptionalMemberAccess]
    n, half = ids.shape[1], ids.shape[1] // 2

    def logits(dtype: str, shift: int = 0) -> tuple[np.ndarray, Any]:
        kv = stories.init_kv(1, n, dtype=dtype)
        _, kv = stories.forward(ids[:, :half], stories.weights, kv, 0)
        if shift:
            layers = jax.tree.map(lambda a: jnp.roll(a, shift, axis=2) if a.ndim == 3 else a, kv.layers)
            kv = replace(kv, layers=layers)
        out, kv = stories.forward(ids[:, half:], stories.weights, kv, half)
        return np.asarray(out[0]), kv.layers

    (exact, floats), (got, stored), (faulty, _) = logits("float32"), logits(kv_dtype), logits(kv_dtype, 1)
    errors = []
    for layer, exactly in zip(stored, floats):
        for name, of in layer.items():
            assert isinstance(of, QuantizedKV)
            error = np.asarray(of.numbers(jnp.float32) * of.scale[..., None]) - exactly[name]
            errors.append(np.mean(error**2) / np.mean(np.square(exactly[name])))
    bound = np.mean(errors) * exact.std() ** 2 / 2
    p = log_softmax(exact)
    kl, of_fault = (np.mean(np.sum(np.exp(p) * (p - log_softmax(x)), axis=-1)) for x in (got, faulty))
    assert kl < bound < 0.01 < of_fault


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_greedy_text_of_the_story_model(stories: jaxlm.Model, kv_dtype: str) -> None:
    """The same up to a token whose lead is so small that rounding decides: the log-probability of the other token is
    within 0.1 of the best one in float32."""
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "logprobs": 2}
    model = replace(stories, kv_dtype=kv_dtype)
    expected = jaxlm.generate(stories, "Once upon a time", **options)
    got = jaxlm.generate(model, "Once upon a time", **options)
    differ = next((i for i, (a, b) in enumerate(zip(expected.tokens, got.tokens)) if a != b), None)
    if differ is not None:
        (_, first), (other, second) = expected.logprobs[differ].top
        assert other == got.tokens[differ]
        assert first - second < 0.1


@cache
def gemma() -> jaxlm.Model:
    """Sliding windows of 5 tokens, in ring buffers if no prefix is reused."""
    return tiny("gemma3", max_position_embeddings=128, num_attention_heads=8, num_key_value_heads=4)


def answers(engine: jaxlm.Engine, *prompts: list[int]) -> list[list[int]]:
    requests = [engine.submit(prompt, max_tokens=8, temperature=0, ignore_eos=True) for prompt in prompts]
    while engine.is_busy:
        engine.step()
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.tokens for request in requests]


def direct(model: jaxlm.Model, prompt: list[int], **options: Any) -> list[int]:
    """Greedy tokens from `forward`, one at a time."""
    ids, kv = [*prompt], model.init_kv(1, len(prompt) + 8, **options)
    logits, kv = model.forward([prompt], model.weights, kv, 0)
    for _ in range(8):
        ids.append(int(np.argmax(logits[0, -1])))
        logits, kv = model.forward([ids[-1:]], model.weights, kv, len(ids) - 1)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_the_engine_and_its_prefixes(kv_dtype: str, tmp_path: Path) -> None:
    """Rows are inserted and reused, and the cache is saved and loaded. All write the same numbers, so the tokens
    are those of `forward`."""
    model, path = replace(gemma(), kv_dtype=kv_dtype), tmp_path / "prefixes.safetensors"
    expected = [direct(model, LONG)]
    with jaxlm.Engine(model, 2) as engine:
        assert answers(engine, LONG) == expected
        assert isinstance(engine.scheduler.state.kv.layers[0]["k"], QuantizedKV)  # pyright: ignore
        assert answers(engine, LONG) == expected
        assert engine.scheduler.hits == len(LONG) - 1
        saved = engine.save_prefix_cache(path)
    with jaxlm.Engine(model, 2) as engine:
        assert engine.load_prefix_cache(path) == saved
        assert answers(engine, LONG) == expected
        assert engine.scheduler.hits == len(LONG) - 1
    for mine, name in ((gemma(), kv_dtype), (replace(model, kv_dtype="bfloat16"), kv_dtype)):
        with pytest.raises(ValueError, match=f"kv_dtype='{name}'"):
            jaxlm.Engine(mine, 1).load_prefix_cache(path)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_ring_buffers_and_a_cache_that_grows(kv_dtype: str) -> None:
    model = replace(gemma(), kv_dtype=kv_dtype)
    """Continuous batching without reused prefixes."""
    expected = [direct(model, prompt) for prompt in (LONG, LONG[:25])]
    lengths = CacheLengths([64], [64, 128])  # the longer prompt needs more slots
    with jaxlm.Engine(model, 2, prefix_cache=False, lengths=lengths) as engine:
        assert answers(engine, LONG[:25]) == expected[1:]
        assert answers(engine, LONG, LONG[:25]) == expected
        assert engine.scheduler.state.kv.length == 128  # pyright: ignore[reportOptionalMemberAccess]


def test_a_ring_buffer() -> None:
    """Chunks through a ring of window + chunk - 1 slots give the logits of a cache that keeps all positions."""
    model = replace(gemma(), kv_dtype="fp8")
    logits = []
    for kv, slots in ((model.init_kv(1, 32, chunk=4), 8), (replace(model.init_kv(1, 32), chunk=4), 32)):
        assert kv.slots(0) == slots
        out = []
        for begin in range(0, 20, 4):
            chunk, kv = model.forward([LONG[begin : begin + 4]], model.weights, kv, begin)
            out.append(chunk)
        logits.append(jnp.concatenate(out, axis=1))
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_row_that_is_not_finite_is_cleared() -> None:
    """NaN is in the scale, as int8 has none: the request fails, and the next one in the row does not."""
    model = replace(gemma(), kv_dtype="int8")
    broken = jax.tree.map(lambda a: a, model.weights)
    broken["layers"][0]["k"] = broken["layers"][0]["k"].at[0].set(jnp.nan)
    with jaxlm.Engine(model, 1) as engine:
        [expected] = answers(engine, LONG[:20])
        steps = engine.steps
        steps.model = replace(model, weights=broken)
        with pytest.raises(ValueError, match="not finite"):
            answers(engine, LONG[20:40])
        steps.model = model
        assert answers(engine, LONG[:20]) == [expected]


def test_a_mesh() -> None:
    """Tensor parallelism over four devices: values and scales are divided by kv heads."""
    there = spread(replace(gemma(), kv_dtype="int8"), topology.make("model=4", 4, jax.devices()[:4]))
    stored = there.init_kv(2, 16).layers[0]["k"]
    assert stored.values.sharding.shard_shape(stored.values.shape) == (2, 1, 16, there.config.H)
    assert stored.scale.sharding.shard_shape(stored.scale.shape) == (2, 1, 16)
    with jaxlm.Engine(there, 2) as engine:
        assert answers(engine, LONG) == [direct(replace(gemma(), kv_dtype="int8"), LONG)]


def test_bytes_of_a_cache() -> None:
    """A head of 128 numbers takes 128 + 4 bytes, where bfloat16 takes 256. The plan and the checks of memory follow."""
    model = tiny("qwen3", head_dim=128, dtype="bfloat16", max_position_embeddings=4096)
    of = {name: replace(model, kv_dtype=name) for name in ("bfloat16", "int8", "fp8")}
    nbytes = {name: sum(a.nbytes for a in jax.tree.leaves(each.init_kv(3, 64).layers)) for name, each in of.items()}
    assert nbytes["int8"] == nbytes["fp8"] == nbytes["bfloat16"] * 132 / 256
    lengths = few_cache_lengths(4096)
    for name, each in of.items():
        assert memory.kv_bytes(each, 64) == nbytes[name] / 3
        layout = roofline.layout(each.family.PARAMS, each.config, {"data": 1, "model": 1}, 2, kv_dtype=each.cache_dtype)
        kept = sum(a.nbytes for a in jax.tree.leaves(each.init_kv(3, 64)))
        assert roofline.cache_bytes(layout, 3, 64) == kept
    ratio = memory.kv_memory(of["int8"], 8, lengths) / memory.kv_memory(of["bfloat16"], 8, lengths)
    assert ratio == pytest.approx(132 / 256, abs=0.01)


def test_plans() -> None:
    """Nearly twice the rows fit, and a step reads less. A model of the size of Llama 3.1 8B."""
    config = {**CONFIGS["llama3"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    family = models.family_of("llama")
    half, int8 = (
        plan.plan(family, family.Config.from_hf(config), specs.BY_NAME["H100"], batch=8, context=8192, kv_dtype=name)
        for name in (None, "int8")
    )
    assert int8.memory.cache / half.memory.cache == pytest.approx(132 / 256, abs=1e-3)  # positions are the same
    # New prompts have a KV cache beside it, of a power of two of rows. Activations take the same memory.
    caches = [found.max_batch + roofline.prefill_rows(found.max_batch, 1) for found in (half, int8)]
    assert caches[1] / caches[0] == pytest.approx(256 / 132, rel=0.05)
    saved = (1 - 132 / 256) * 8 * 32 * 8192 * 2 * 8 * 128 * 2
    assert half.decode.memory - int8.decode.memory == pytest.approx(saved / 3.35e12, rel=1e-3)


def test_scores_read_the_cache() -> None:
    """Log-probabilities are those of tokens that are fed one by one, as in generation."""
    model = replace(gemma(), kv_dtype="fp8")
    texts = [np.array(LONG[:n], np.int32) for n in (12, 30)]
    requests = [ScoreRequest(ids[:-1], np.arange(len(ids) - 1), ids[1:]) for ids in texts]
    exact = dict(scores(gemma(), requests))
    for number, score in scores(model, requests):
        kv, found = model.init_kv(1, 32), []
        for at, token in enumerate(texts[number][:-1]):
            logits, kv = model.forward([[int(token)]], model.weights, kv, at)
            found.append(log_softmax(logits[0, 0])[texts[number][at + 1]])
        np.testing.assert_allclose(score.logprobs, found, atol=2e-4)
        assert np.abs(score.logprobs - exact[number].logprobs).max() > 2e-3


def test_an_unknown_kv_dtype() -> None:
    with pytest.raises(ValueError, match="int8"):
        replace(gemma(), kv_dtype="int4")
    with pytest.raises(ValueError, match="int8"):
        jaxlm.load(STORIES, kv_dtype="int4")

"""Several LoRA adapters of one base in one engine. Each request's answer is that of its adapter's model alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_files
from helpers.tiny_adapter import beside, drawn
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import families, tiny

import jaxlm
from jaxlm.checkpoint import peft
from jaxlm.model import Model
from jaxlm.models import llama3
from jaxlm.nn import lora, multi_lora
from jaxlm.nn.linear import product

# Names, targets, ranks and scales. Only one adapts the head. Of the last one, the first layer alone is adapted.
KINDS = {"all": (("all-linear", "head"), 3, 0.75), "query": (("q",), 5, 1.3), "mlp": (("gate", "down"), 2, 0.31)}
TEXT = [(7 * i) % 90 for i in range(40)]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with quick_compilation():
        yield


def models_of(family: str) -> tuple[Model, dict[str, Model]]:
    """A base with an untied head, and its models with adapters."""
    base = replace(tiny(family, tie_word_embeddings=False, max_position_embeddings=128), tokenizer=tokenizer_of(None))
    trees = {name: drawn(base, *kind) for name, kind in KINDS.items()}
    trees["mlp"] = {"layers": trees["mlp"]["layers"][:1]}
    return base, {name: beside(base, tree) for name, tree in trees.items()}


@pytest.mark.parametrize("spec", ["BTD,NHD->BTNH", "BTNH,DNH->BTD", "BTF,DF->BTD", "BTD,VD->BTV"])
def test_each_row_has_the_product_of_its_adapter(spec: str) -> None:
    sizes = {"B": 5, "T": 3, "D": 8, "N": 2, "H": 4, "F": 6, "V": 7}
    random = np.random.default_rng(0)

    def array(letters: str, **more: int) -> Any:
        return jnp.asarray(random.standard_normal([{**sizes, **more}[x] for x in letters]), jnp.float32)

    of_x, of_w = spec.split("->")[0].split(",")
    x, w = array(of_x), array(of_w)
    _, of_a = lora.factor_specs(spec)[0].split("->")[0].split(",")
    _, of_b = lora.factor_specs(spec)[1].split("->")[0].split(",")
    single = [lora.Lora(w, array(of_a, r=r), array(of_b, r=r), None, s) for r, s in ((3, 0.5), (1, 2.0), (4, 1.7))]
    [both] = multi_lora.combine([w], [[single[0]], [w], [single[1]], [single[2]]])
    assert both.ranks == (3, 0, 1, 4)
    adapter = jnp.asarray([3, multi_lora.BASE, 0, 1, 2], jnp.int32)
    found = multi_lora.for_rows([both], adapter)[0].product(spec, x)
    of_rows = [single[2].product(spec, x), product(spec, x, w), single[0].product(spec, x), product(spec, x, w),
               single[1].product(spec, x)]  # fmt: skip
    for row, expected in enumerate(of_rows):
        np.testing.assert_allclose(found[row], expected[row], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(both.product(spec, x), product(spec, x, w))  # no rows are named: the base


def test_a_nan_of_another_adapter_stays_there() -> None:
    w, a, b = jnp.ones((4, 8)), jnp.full((2, 8), jnp.nan), jnp.ones((4, 2))
    good = lora.Lora(w, jnp.ones((1, 8)), jnp.ones((4, 1)))
    [both] = multi_lora.for_rows(
        multi_lora.combine([w], [[good], [lora.Lora(w, a, b)]]), jnp.asarray([0, 1, multi_lora.BASE], jnp.int32)
    )
    y = both.product("BTD,FD->BTF", jnp.ones((3, 1, 8)))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize("family", families("llama3"))
def test_requests_of_different_adapters_in_one_batch(family: str) -> None:
    base, adapted = models_of(family)
    rng, asked = np.random.default_rng(1), []
    with jaxlm.Engine(base, 4, adapters=adapted) as engine:
        for n in range(12):
            name = [None, *adapted][n % 4]
            prompt = [*TEXT[: int(rng.integers(1, 15))], n]
            options = {"max_tokens": 6 + n % 5, "temperature": 0.8 * (n % 2), "seed": n, "ignore_eos": True}
            asked.append((name, prompt, options, engine.submit(prompt, adapter=name, **options)))
            if n % 3 == 2:
                engine.step()
        while engine.is_busy:
            for chunk in engine.step():
                assert chunk.error is None
    texts = set()
    for name, prompt, options, request in asked:
        expected = jaxlm.generate(base if name is None else adapted[name], prompt, **options)
        assert request.tokens == expected.tokens, (name, options)
        texts.add(tuple(request.tokens))
    assert len(texts) == len(asked)


def test_log_probabilities_are_those_of_the_adapter_alone() -> None:
    base, adapted = models_of("llama3")
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "logprobs": 3, "prompt_logprobs": True}
    with jaxlm.Engine(base, 4, adapters=adapted) as engine:
        asked = {name: engine.submit(TEXT, adapter=name, **options) for name in [None, *adapted]}
        last = {}
        while engine.is_busy:
            for chunk in engine.step():
                last.setdefault(chunk.request, []).extend([*(chunk.prompt_logprobs or []), *(chunk.logprobs or [])])
    for name, request in asked.items():
        expected = jaxlm.generate(base if name is None else adapted[name], TEXT, **options)
        scores = [*(expected.prompt_logprobs or []), *(expected.logprobs or [])]
        found = [score.chosen for score in last[request] if score is not None]
        assert found == pytest.approx([score.chosen for score in scores if score is not None], abs=1e-4)


def test_cached_prefixes_belong_to_their_adapter(tmp_path: Path) -> None:
    base, adapted = models_of("llama3")
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    names = [None, "all", "query", None, "all", "query"]
    expected = {name: jaxlm.generate(adapted.get(name or "", base), TEXT, **options).tokens for name in names}

    def answer(engine: jaxlm.Engine, name: str | None) -> list[int]:
        request = engine.submit(TEXT, adapter=name, **options)
        while engine.is_busy:
            engine.step()
        return request.tokens

    with jaxlm.Engine(base, 4, adapters=adapted) as engine:
        hits = []
        for name in names:
            assert answer(engine, name) == expected[name]
            hits.append(engine.scheduler.hits)
        assert hits == [0, 0, 0, 39, 78, 117]
        assert engine.save_prefix_cache(tmp_path / "prefixes.safetensors") == 3 * 45
    louder = drawn(base, *KINDS["query"][:2], scale=2 * KINDS["query"][2])  # the same arrays, another lora_alpha
    with (
        jaxlm.Engine(base, 3, adapters=adapted | {"query": beside(base, louder)}) as engine,
        pytest.raises(ValueError, match="other weights"),
    ):
        engine.load_prefix_cache(tmp_path / "prefixes.safetensors")
    with jaxlm.Engine(base, 3, adapters=adapted) as engine:
        engine.load_prefix_cache(tmp_path / "prefixes.safetensors")
        for name in ("query", None, "all"):
            assert answer(engine, name) == expected[name]
        assert engine.scheduler.hits == 3 * 39


@pytest.mark.slow
def test_nothing_is_compiled_after_prepare() -> None:
    base, adapted = models_of("llama3")
    with jaxlm.Engine(base, 2, length=64, adapters=adapted) as engine:
        engine.prepare(constraints=False)
        before = engine.steps.compiled
        for name in [None, *adapted]:
            engine.submit(TEXT[:9], adapter=name, max_tokens=3)
        while engine.is_busy:
            engine.step()
        assert engine.steps.compiled == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and two adapters of it in files. `chat` has a chat template beside it, which the base lacks."""
    (tmp_path / "base").mkdir()
    tiny_files.write(tmp_path / "base")
    base = jaxlm.load(tmp_path / "base", device=jax.devices()[0])
    cfg = llama3.Config.from_hf(tiny_files.CONFIG)
    for name, targets, rank in (("chat", ("all-linear",), 2), ("plain", ("q", "v"), 4)):
        peft.write(tmp_path / name, drawn(base, targets, rank), llama3.PARAMS, cfg, base=str(tmp_path / "base"))
    tokenizer = base.tokenizer.hf
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path


@pytest.mark.parametrize(
    "where",
    [pytest.param({"device": jax.devices()[0]}, id="device", marks=pytest.mark.slow),
     pytest.param({"mesh": "data=2,model=2"}, id="mesh")],
)  # fmt: skip
def test_adapters_from_files_share_the_base(folder: Path, where: dict[str, Any]) -> None:
    base = jaxlm.load(folder / "base", **where)
    adapted = {name: jaxlm.load_adapter(base, folder / name) for name in ("chat", "plain")}
    assert adapted["plain"].weights["embed"] is base.weights["embed"]
    assert adapted["plain"].weights["layers"][0]["q"].w is base.weights["layers"][0]["q"]
    assert adapted["chat"].tokenizer.has_template
    assert not base.tokenizer.has_template
    chat = [{"role": "user", "content": "hello"}]
    with jaxlm.Engine(base, 4, adapters=adapted) as engine:
        asked = {
            "chat": engine.submit(chat, adapter="chat", max_tokens=5, temperature=0),
            "plain": engine.submit("hello", adapter="plain", max_tokens=5, temperature=0),
        }
        while engine.is_busy:
            engine.step()
    for name, prompt in (("chat", chat), ("plain", "hello")):
        alone = jaxlm.load(folder / "base", adapter=folder / name, device=jax.devices()[0])
        assert asked[name].tokens == jaxlm.generate(alone, prompt, max_tokens=5, temperature=0).tokens


def test_errors_say_the_way_out(folder: Path) -> None:
    base, adapted = models_of("llama3")
    with (
        jaxlm.Engine(base, 1, adapters=adapted) as engine,
        pytest.raises(ValueError, match=r"unknown adapter 'x': this engine has all, query, mlp"),
    ):
        engine.submit("a", adapter="x")
    with jaxlm.Engine(base, 1) as engine, pytest.raises(ValueError, match="this engine has none"):
        engine.submit("a", adapter="all")
    with pytest.raises(ValueError, match="has an adapter itself"):
        jaxlm.Engine(adapted["all"], 1, adapters={"query": adapted["query"]})
    other, _ = models_of("llama3")
    with pytest.raises(ValueError, match="is not an adapter of this model"):
        jaxlm.Engine(other, 1, adapters=adapted)
    loaded = jaxlm.load(folder / "base", adapter=folder / "plain", device=jax.devices()[0])
    with pytest.raises(ValueError, match="has an adapter already"):
        jaxlm.load_adapter(loaded, folder / "chat")
    with pytest.raises(ValueError, match="was not loaded"):
        jaxlm.load_adapter(base, folder / "chat")

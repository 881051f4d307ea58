"""LoRA adapters and the peft package: reading its files, writing files that it reads, and fused models."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_adapter import beside, drawn
from helpers.tiny_models import DISTINCT
from oracle import reference
from oracle.reference import FAULT, LIMIT
from oracle.test_gemma_layouts import seeing

import jaxlm
from jaxlm import Model
from jaxlm.checkpoint import peft
from jaxlm.cli import main
from jaxlm.nn import lora

pytestmark = pytest.mark.oracle
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 6},
    "alpha_pattern": {".*down_proj": 5, r"^model\.layers\.0\.self_attn\.o_proj": 3},
}
UNTIED = {"tie_word_embeddings": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of peft.LoraConfig, and of the model's config
    "patterns": ({"r": 4, "lora_alpha": 10, "target_modules": "all-linear", **PATTERNS}, {}),
    "rslora": ({"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "use_rslora": True,
                "rank_pattern": {"q_proj": 2}}, {}),
    "the head": ({"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "lm_head"]}, UNTIED),
    "one layer": ({"r": 3, "lora_alpha": 9, "target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]}, {}),
    "a pattern of names": ({"r": 2, "lora_alpha": 5, "target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.3}, {}),
}  # fmt: skip
ROWS = [(family, name) for family in DISTINCT for name in CASES if family == "llama3" or name == "patterns"]
ROWS += [("gemma3", "the head")]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with reference.quickly():
        yield


def load_transformers(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


def adapted(folder: Path, **config: Any) -> Any:
    """Returns a saved model with a random adapter of the peft package, about a third as large as the weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_transformers(folder), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[1] ** -0.5)
    return model


def frequencies_of(oracle: Any, model: Model) -> None:
    reference.share_frequencies(oracle.get_base_model(), model)


def distance(model: Model, oracle: Any) -> float:
    tokens, pos = reference.near_and_far()
    return reference.distance(reference.forward(model, tokens, pos)[0], reference.logits(oracle, tokens, pos))


def faulty_distance(model: Model, oracle: Any) -> float:
    """Returns the distance of a model that is compiled only for this."""
    tokens, pos = reference.near_and_far()
    return reference.distance(reference.fresh(model)(tokens, pos)[0], reference.logits(oracle, tokens, pos))


def changed(model: Model, change: Callable[[lora.Lora], Any]) -> Model:
    """Returns the model with a fault in every adapted weight."""
    weights = jax.tree.map(
        lambda leaf: change(leaf) if lora.is_lora(leaf) else leaf, model.weights, is_leaf=lora.is_lora
    )
    return Model(model.family, model.config, weights)


def heads_interleaved(leaf: lora.Lora) -> lora.Lora:
    """Splits the merged axis of the file in the wrong order."""

    def wrong(a: jax.Array, begin: int) -> jax.Array:
        n, h = a.shape[begin : begin + 2]
        return a.reshape(*a.shape[:begin], h, n, *a.shape[begin + 2 :]).swapaxes(begin, begin + 1)

    return replace(leaf, b=wrong(leaf.b, 0)) if leaf.b.ndim == 3 else leaf


FAULTS: dict[str, Callable[[lora.Lora], Any]] = {
    "without": lambda leaf: leaf.w,
    "unscaled": lambda leaf: replace(leaf, scale=1.0),
    "upside down": lambda leaf: replace(leaf, a=leaf.a[::-1]),
    "interleaved": heads_interleaved,
}


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_adapters_of_peft(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Loaded, the logits agree. Fused, the weights are those of merge_and_unload, with its logits in transformers."""
    config, fields = CASES[name]
    with reference.quiet():
        place = reference.save(reference.build(family, **fields), tmp_path / "base")
        oracle = adapted(place, **config)
        with warnings.catch_warnings(action="ignore"):  # with an adapted head, peft also stores that of the base
            oracle.save_pretrained(tmp_path / "adapter")
        model = jaxlm.load(place, adapter=tmp_path / "adapter", dtype="float32")
        assert distance(jaxlm.load(tmp_path / "adapter", dtype="float32"), oracle) < FAULT  # the base that it names
        frequencies_of(oracle, model)
        assert distance(model, oracle) <= LIMIT
        faults = (
            FAULTS
            if (family, name) in (("llama3", "patterns"), ("gemma3", "the head"))
            else {"unscaled": FAULTS["unscaled"]}
        )
        for fault in faults.values():
            assert faulty_distance(changed(model, fault), oracle) >= FAULT
        argv = ["-m", str(place), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "fused")]
        assert main(["fuse", *argv]) == 0
        fused, merged = load_transformers(tmp_path / "fused"), oracle.merge_and_unload()
    for (ours, a), (theirs, b) in zip(fused.state_dict().items(), merged.state_dict().items(), strict=True):
        assert ours == theirs
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-6)
    tokens, pos = reference.near_and_far()
    reference.share_frequencies(fused, model)
    reference.share_frequencies(merged, model)
    logits = [reference.logits(each, tokens, pos) for each in (fused, merged)]
    assert reference.distance(*logits) <= LIMIT


WRITTEN = {
    "every product": (("all-linear",), 4, 2.5, False),
    "two, rslora": (("q", "down"), 3, lora.scale(8, 3, True), True),
    "the head": (("v", "head"), 2, 0.75, False),
}


@pytest.mark.parametrize(
    ("family", "name"), [(f, "every product") for f in DISTINCT] + [("llama3", n) for n in WRITTEN][1:]
)
def test_adapters_for_peft(family: str, name: str, tmp_path: Path) -> None:
    """peft loads our files completely (missing and unexpected tensors are warnings in peft, and errors here)."""
    from peft import PeftModel

    targets, rank, scale, rslora = WRITTEN[name]
    with reference.quiet():
        place = reference.save(reference.build(family, **UNTIED if "head" in targets else {}), tmp_path / "base")
        model = jaxlm.load(place, dtype="float32")
        tree = drawn(model, targets, rank, scale)
        sizes = (model.family.PARAMS, model.config)
        peft.write(tmp_path / "adapter", tree, *sizes, base=str(place), rslora=rslora, dropout=0.1)
        oracle = PeftModel.from_pretrained(load_transformers(place), str(tmp_path / "adapter")).eval()
    config = oracle.peft_config["default"]
    assert (config.r, config.use_rslora, config.lora_dropout, config.base_model_name_or_path) == (
        rank,
        rslora,
        0.1,
        str(place),
    )
    model = beside(model, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    assert faulty_distance(changed(model, FAULTS["unscaled"]), oracle) >= FAULT


def test_an_adapter_of_some_layers_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    with reference.quiet():
        place = reference.save(reference.build("llama3", num_hidden_layers=12), tmp_path / "base")
        model = jaxlm.load(place, dtype="float32")
        tree = drawn(model, ("q",), 2, 2.0)
        other = drawn(model, ("q",), 3, 0.5)
        tree["layers"] = [tree["layers"][0], other["layers"][1], *[{}] * 9, tree["layers"][11]]
        peft.write(tmp_path / "adapter", tree, model.family.PARAMS, model.config)
        oracle = PeftModel.from_pretrained(load_transformers(place), str(tmp_path / "adapter")).eval()
    model = beside(model, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    everywhere = copy.copy(tree) | {"layers": [tree["layers"][0]] * 12}
    assert faulty_distance(beside(jaxlm.load(place, dtype="float32"), everywhere), oracle) >= FAULT


def test_a_model_with_a_vision_tower(tmp_path: Path) -> None:
    """Its modules have other names. An adapter of peft also adapts modules of the vision tower with the same names."""
    from peft import PeftModel

    with reference.quiet():
        seeing(tmp_path / "base", tied=True)
        oracle = adapted(tmp_path / "base", r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"])
        oracle.save_pretrained(tmp_path / "theirs")
        model = jaxlm.load(tmp_path / "base", adapter=tmp_path / "theirs", dtype="float32")
        assert len([name for name in model.ignored if "lora" in name]) == 4
        frequencies_of(oracle, model)
        assert distance(model, oracle) <= LIMIT
        plain = jaxlm.load(tmp_path / "base", dtype="float32")
        assert distance(plain, oracle) >= FAULT
        tree = drawn(plain, ("k", "down"))
        peft.write(tmp_path / "ours", tree, plain.family.PARAMS, plain.config, has_vision=True)
        oracle = PeftModel.from_pretrained(load_transformers(tmp_path / "base"), str(tmp_path / "ours")).eval()
    model = beside(plain, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    assert distance(plain, oracle) >= FAULT


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_initializations_that_change_the_base(init: Any, tmp_path: Path) -> None:
    """They are refused, unless peft converts the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    with reference.quiet():
        place = reference.save(reference.build("llama3"), tmp_path / "base")
        before = {name: value.clone() for name, value in load_transformers(place).state_dict().items()}
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
        oracle = get_peft_model(load_transformers(place), config).eval()
        after = oracle.get_base_model().state_dict()
        name = "model.layers.0.self_attn.q_proj"
        kept = torch.equal(before[f"{name}.weight"], after[f"{name}.base_layer.weight"])
        config.init_lora_weights = True  # otherwise peft subtracts the initial values from the base again
        oracle.save_pretrained(tmp_path / "first")
        config.init_lora_weights = init
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        oracle.save_pretrained(tmp_path / "last")
        if kept:
            model = jaxlm.load(place, adapter=tmp_path / "last", dtype="float32")
        else:
            with pytest.raises(ValueError, match="changed the base"):
                jaxlm.load(place, adapter=tmp_path / "last")
            with warnings.catch_warnings(action="ignore"):  # peft warns that it changes the base
                oracle.save_pretrained(
                    tmp_path / "made", path_initial_model_for_weight_conversion=str(tmp_path / "first")
                )
            model = jaxlm.load(place, adapter=tmp_path / "made", dtype="float32")
    assert kept == (init in (True, "gaussian", "orthogonal", "mica"))
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT

"""LoRA adapters beside the peft package: its files here, ours there, and fused models in transformers."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.tiny_adapter import beside, drawn
from oracle import reference
from oracle.reference import FAMILIES, FAULT, LIMIT
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
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of peft.LoraConfig, of the model
    "patterns": ({"r": 4, "lora_alpha": 10, "target_modules": "all-linear", **PATTERNS}, {}),
    "rslora": ({"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "use_rslora": True,
                "rank_pattern": {"q_proj": 2}}, {}),
    "the head": ({"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "lm_head"]}, UNTIED),
    "one layer": ({"r": 3, "lora_alpha": 9, "target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]}, {}),
    "a pattern of names": ({"r": 2, "lora_alpha": 5, "target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.3}, {}),
}  # fmt: skip
ROWS = [(family, name) for family in FAMILIES for name in CASES if family == "llama3" or name == "patterns"]
ROWS += [("gemma3", "the head")]


def opened(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


def adapted(folder: Path, **config: Any) -> Any:
    """A saved model with an adapter of the peft package whose values are drawn, about a third of the weights' size."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(opened(folder), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
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
    """Of a model that is compiled for this alone."""
    tokens, pos = reference.near_and_far()
    return reference.distance(reference.fresh(model)(tokens, pos)[0], reference.logits(oracle, tokens, pos))


def changed(model: Model, change: Callable[[lora.Lora], Any]) -> Model:
    """The model with a fault in every leaf."""
    weights = jax.tree.map(
        lambda leaf: change(leaf) if lora.is_lora(leaf) else leaf, model.weights, is_leaf=lora.is_lora
    )
    return Model(model.family, model.config, weights)


def heads_interleaved(leaf: lora.Lora) -> lora.Lora:
    """The joined axis of a file taken apart in the wrong order."""

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
    """Loaded: the same logits. Fused: the weights of merge_and_unload, and its logits in transformers."""
    config, fields = CASES[name]
    with reference.quiet():
        place = reference.save(reference.build(family, **fields), tmp_path / "base")
        oracle = adapted(place, **config)
        with warnings.catch_warnings(action="ignore"):  # of an adapted head, the base's is stored too
            oracle.save_pretrained(tmp_path / "adapter")
        model = jaxlm.load(place, adapter=tmp_path / "adapter", dtype="float32")
        assert distance(jaxlm.load(tmp_path / "adapter", dtype="float32"), oracle) < FAULT  # its base by its name
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
        fused, merged = opened(tmp_path / "fused"), oracle.merge_and_unload()
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
    ("family", "name"), [(f, "every product") for f in FAMILIES] + [("llama3", n) for n in WRITTEN][1:]
)
def test_adapters_for_peft(family: str, name: str, tmp_path: Path) -> None:
    """Written here: peft loads all of it (a missing or an unexpected tensor is a warning there, an error here)."""
    from peft import PeftModel

    targets, rank, scale, rslora = WRITTEN[name]
    with reference.quiet():
        place = reference.save(reference.build(family, **UNTIED if "head" in targets else {}), tmp_path / "base")
        model = jaxlm.load(place, dtype="float32")
        tree = drawn(model, targets, rank, scale)
        sizes = (model.family.PARAMS, model.config)
        peft.write(tmp_path / "adapter", tree, *sizes, base=str(place), rslora=rslora, dropout=0.1)
        oracle = PeftModel.from_pretrained(opened(place), str(tmp_path / "adapter")).eval()
    found = oracle.peft_config["default"]
    assert (found.r, found.use_rslora, found.lora_dropout, found.base_model_name_or_path) == (
        rank,
        rslora,
        0.1,
        str(place),
    )
    model = beside(model, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    assert faulty_distance(changed(model, FAULTS["unscaled"]), oracle) >= FAULT


def test_a_part_of_the_layers_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    with reference.quiet():
        place = reference.save(reference.build("llama3", num_hidden_layers=12), tmp_path / "base")
        model = jaxlm.load(place, dtype="float32")
        tree = drawn(model, ("q",), 2, 2.0)
        other = drawn(model, ("q",), 3, 0.5)
        tree["layers"] = [tree["layers"][0], other["layers"][1], *[{}] * 9, tree["layers"][11]]
        peft.write(tmp_path / "adapter", tree, model.family.PARAMS, model.config)
        oracle = PeftModel.from_pretrained(opened(place), str(tmp_path / "adapter")).eval()
    model = beside(model, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    everywhere = copy.copy(tree) | {"layers": [tree["layers"][0]] * 12}
    assert faulty_distance(beside(jaxlm.load(place, dtype="float32"), everywhere), oracle) >= FAULT


def test_a_model_that_sees(tmp_path: Path) -> None:
    """Its modules bear other names; an adapter of peft's also takes in modules of the other half of these names."""
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
        oracle = PeftModel.from_pretrained(opened(tmp_path / "base"), str(tmp_path / "ours")).eval()
    model = beside(plain, tree)
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT
    assert distance(plain, oracle) >= FAULT


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_which_beginnings_change_the_base(init: Any, tmp_path: Path) -> None:
    """Those that do are refused; what peft makes of one when it is asked to convert it is not."""
    import torch
    from peft import LoraConfig, get_peft_model

    with reference.quiet():
        place = reference.save(reference.build("llama3"), tmp_path / "base")
        before = {name: value.clone() for name, value in opened(place).state_dict().items()}
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
        oracle = get_peft_model(opened(place), config).eval()
        after = oracle.get_base_model().state_dict()
        name = "model.layers.0.self_attn.q_proj"
        kept = torch.equal(before[f"{name}.weight"], after[f"{name}.base_layer.weight"])
        config.init_lora_weights = True  # or peft would take the first values out of the base once more
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
            with pytest.raises(ValueError, match="it is for a base whose weights were changed before training"):
                jaxlm.load(place, adapter=tmp_path / "last")
            with warnings.catch_warnings(action="ignore"):  # that it changes the base
                oracle.save_pretrained(
                    tmp_path / "made", path_initial_model_for_weight_conversion=str(tmp_path / "first")
                )
            model = jaxlm.load(place, adapter=tmp_path / "made", dtype="float32")
    assert kept == (init in (True, "gaussian", "orthogonal", "mica"))
    frequencies_of(oracle, model)
    assert distance(model, oracle) <= LIMIT

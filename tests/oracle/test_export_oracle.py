"""What is exported opens in transformers, with the very logits of the model that was saved there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import meta_files
from helpers.tiny_models import DISTINCT, families
from oracle import reference
from oracle.test_gemma_layouts import SPELLINGS, seeing

import jaxlm
from jaxlm.checkpoint import writer as files

pytestmark = pytest.mark.oracle


def same_logits(a: Any, b: Any) -> bool:
    tokens, pos = reference.near_and_far()
    return np.array_equal(reference.logits(a, tokens, pos), reference.logits(b, tokens, pos))


def opened(folder: Path, **options: Any) -> Any:
    """The folder as transformers reads it; nothing in it may be missing, unexpected or misshapen."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", families(*DISTINCT))
def test_logits_are_bit_for_bit_those_before(
    family: str, tied: bool, sharded: bool, tmp_path: Path, monkeypatch
) -> None:
    with reference.quiet():
        oracle = reference.build(family, tie_word_embeddings=tied)
        reference.save(oracle, tmp_path / "in", max_shard_size="40KB" if sharded else "1GB")
        if sharded:
            monkeypatch.setattr(files, "SHARD", 30_000)
        jaxlm.export(jaxlm.load(tmp_path / "in", dtype="float32"), tmp_path / "out")
        assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == sharded
        assert same_logits(oracle, opened(tmp_path / "out"))


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_another_type(family: str, tmp_path: Path) -> None:
    """As transformers itself converts; and it takes the type that config.json names."""
    import torch

    with reference.quiet():
        oracle = reference.build(family)
        jaxlm.export(jaxlm.load(reference.save(oracle, tmp_path / "in")), tmp_path / "out", dtype="bfloat16")
        exported = opened(tmp_path / "out")
        assert exported.dtype == torch.bfloat16
        assert same_logits(opened(tmp_path / "in", dtype=torch.bfloat16), exported)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gemma_that_sees(spelling: str, tmp_path: Path) -> None:
    """All of it, with the half that jaxlm does not read."""
    import torch
    import transformers

    with reference.quiet():
        oracle = seeing(tmp_path / "in", tied=True)
        SPELLINGS[spelling](tmp_path / "in")
        jaxlm.export(jaxlm.load(tmp_path / "in"), tmp_path / "out")
        exported, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
            tmp_path / "out", attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
    before, after = oracle.state_dict(), exported.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("vision_tower" in name for name in before)


@pytest.mark.parametrize("tied", [False, True])
def test_metas_format(tied: bool, tmp_path: Path) -> None:
    """Meta's files, with q and k in the row order that transformers' conversion script starts from, become a folder
    with the same logits."""
    import torch

    with reference.quiet():
        oracle = reference.build("llama3", tie_word_embeddings=tied, max_position_embeddings=8192)
        meta_files.convert(reference.save(oracle, tmp_path / "in"), tmp_path / "meta")
        original = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
        theirs = oracle.state_dict()
        for layer in range(2):
            for ours, name, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
                w = original[f"layers.{layer}.attention.{ours}.weight"]
                halves = w.view(heads, len(w) // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)  # its permutation
                assert torch.equal(halves, theirs[f"model.layers.{layer}.self_attn.{name}.weight"])
        assert torch.equal(original["output.weight"], theirs["lm_head.weight"])
        jaxlm.export(jaxlm.load(tmp_path / "meta"), tmp_path / "out")
        assert same_logits(oracle, opened(tmp_path / "out"))


def test_random_weights(tmp_path: Path) -> None:
    """A model that transformers has never seen: its logits are ours."""
    from helpers.tiny_models import CONFIGS, from_config

    for family, raw in CONFIGS.items():
        with reference.quiet():
            model = from_config(raw)
            jaxlm.export(model, tmp_path / family, config={**raw, "pad_token_id": 0})  # SmolLM3's default is above V
            oracle = opened(tmp_path / family)
        reference.share_frequencies(oracle, model)
        tokens, pos = reference.near_and_far()
        ours = reference.forward(model, tokens, pos)[0]
        assert reference.distance(ours, reference.logits(oracle, tokens, pos)) <= reference.LIMIT

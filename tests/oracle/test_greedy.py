"""Greedy text against transformers.generate in float32."""

from pathlib import Path

import pytest
from helpers.tiny_models import DISTINCT, families, layers
from oracle import faults, reference

import jaxlm

pytestmark = pytest.mark.oracle
PROMPT = [5, 0, 17, 2, 88, 1, 40]


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_greedy_text(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    fields = {**layers(family, 3), "tie_word_embeddings": False}  # tied, these weights repeat themselves
    with reference.quiet():
        oracle = reference.build(family, seed=3, **fields)
        model = reference.pair(oracle, tmp_path)
        prompt = torch.tensor([PROMPT])
        stops = {"eos_token_id": None, "pad_token_id": 0}
        whole = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, **stops
        )
    expected = whole[0, len(PROMPT) :].tolist()
    assert len(expected) == 64
    assert len(set(expected)) >= 20  # a text that repeats itself proves little
    assert jaxlm.generate(model, PROMPT, max_tokens=64, temperature=0, ignore_eos=True).tokens == expected
    faulty = faults.rolled_kv_heads(model, monkeypatch)
    assert jaxlm.generate(faulty, PROMPT, max_tokens=64, temperature=0, ignore_eos=True).tokens != expected

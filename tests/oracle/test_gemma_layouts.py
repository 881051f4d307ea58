"""Gemma 3 checkpoints that also see, text half: three spellings of tensor names, vision tensors recognized by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.random_weights import draw
from helpers.tiny_models import CONFIGS
from oracle import cases, faults, reference
from oracle.reference import BASE, FAULT, LIMIT

import jaxlm

pytestmark = pytest.mark.oracle


def seeing(folder: Path, tied: bool) -> Any:
    """A tiny Gemma3ForConditionalGeneration, saved; vision weights as initialized."""
    import torch
    import transformers

    fields = {**CONFIGS["gemma3"], **BASE, "num_hidden_layers": 3, "layer_types": None, "sliding_window_pattern": 2}
    fields |= cases.gemma_rope(rope_type="linear", factor=8.0)
    text = transformers.AutoConfig.for_model(**fields, tie_word_embeddings=tied)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=tied
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" not in name and "multi_modal" not in name:
                parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape), neutral=0.0)))
    return reference.save(model, folder) and model


def renamed(folder: Path, change: Callable[[str], str], head: str | None = None) -> None:
    """Writes the tensors under other names, in two shards with an index; head: a tied head under this name as well."""
    from safetensors.numpy import load_file, save_file

    tensors = {change(name): value for name, value in load_file(folder / "model.safetensors").items()}
    if head:
        tensors[head] = tensors[change("language_model.model.embed_tokens.weight")]
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def transformers5(name: str) -> str:
    """As transformers 5 names its own parameters."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


SPELLINGS: dict[str, Callable[[Path], None]] = {
    "as saved": lambda folder: None,
    "the hub's, an index with a tied head": lambda folder: renamed(folder, str, "language_model.lm_head.weight"),
    "transformers 5": lambda folder: renamed(folder, transformers5),
    "transformers 5, a tied head": lambda folder: renamed(folder, transformers5, "lm_head.weight"),
    "rope in the old spelling": lambda folder: reference.rewrite(
        folder, lambda c: reference.old_spelling(c["text_config"])
    ),
}


@pytest.mark.parametrize(
    ("spelling", "tied"), [(name, True) for name in SPELLINGS] + [(n, False) for n in SPELLINGS if "tied" not in n]
)
def test_text_half(spelling: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reference.quiet():
        oracle = seeing(tmp_path, tied)
        SPELLINGS[spelling](tmp_path)
        model = jaxlm.load(tmp_path, dtype="float32")
    reference.share_frequencies(oracle, model)
    theirs = [n for n, _ in oracle.named_parameters() if "vision_tower" in n or "multi_modal" in n]
    assert len(model.ignored) == len(theirs)
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in model.ignored)
    tokens, pos = reference.near_and_far()
    expected = reference.logits(oracle, tokens, pos)
    assert reference.score_deviation(oracle, tokens, pos) >= 1
    assert reference.distance(reference.forward(model, tokens, pos)[0], expected) <= LIMIT
    faulty = faults.scaling_everywhere(model, monkeypatch)
    assert reference.distance(reference.faulty_logits(faulty, model, tokens, pos), expected) >= FAULT

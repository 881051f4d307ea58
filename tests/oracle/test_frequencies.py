"""Rotary frequencies on their own, to 2 units in the last place: an ulp moves logits at position 9,000 by 1e-3
deviations, so the logits are compared with shared frequencies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import reference
from oracle.cases import CASES, Case
from oracle.reference import FULL, SLIDING

from jaxlm import models
from jaxlm.nn import Rope

pytestmark = pytest.mark.oracle


def oracle_ropes(hf: Any) -> dict[str, tuple[np.ndarray, float]]:
    """Frequencies and amplitude of each kind of layer, as transformers computes them for a config."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

    hf = hf.get_text_config()
    if hf.model_type in ("gemma3_text", "olmo3"):
        rotary = {"gemma3_text": Gemma3RotaryEmbedding, "olmo3": Olmo3RotaryEmbedding}[hf.model_type](hf)
        kinds = {kind: (f"{kind}_inv_freq", f"{kind}_attention_scaling") for kind in set(hf.layer_types)}
    else:
        classes = {"llama": LlamaRotaryEmbedding, "olmo2": Olmo2RotaryEmbedding, "qwen3": Qwen3RotaryEmbedding,
                   "smollm3": SmolLM3RotaryEmbedding}  # fmt: skip
        rotary = classes[hf.model_type](hf)
        kinds = {FULL: ("inv_freq", "attention_scaling")}
    return {kind: (getattr(rotary, a).numpy(), getattr(rotary, b)) for kind, (a, b) in kinds.items()}


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance of two arrays of positive float32 numbers, in units in the last place."""
    assert a.dtype == b.dtype == np.float32
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


def compare(raw: dict[str, Any]) -> None:
    import transformers

    config = models.family_of(raw["model_type"]).Config.from_hf(raw)
    with reference.quiet():
        hf = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))  # which changes what it is given
        expected = oracle_ropes(hf)
    for kind, (radians, amplitude) in expected.items():
        ours = (config.local_rope if kind == SLIDING else config.rope).frequencies(config.H)
        assert ulps(ours.radians, radians) <= 2, kind
        assert ours.amplitude == pytest.approx(amplitude, rel=1e-6), kind


@pytest.mark.parametrize(
    "case", [c for c in CASES if "rope_parameters" in c.fields], ids=lambda c: f"{c.family}: {c.name}"
)
def test_drawn_configs(case: Case, tmp_path: Path) -> None:
    with reference.quiet():
        reference.save(reference.build(case.family, **case.fields), tmp_path)
    if case.old:
        reference.rewrite(tmp_path, reference.old_spelling)
    compare(json.loads((tmp_path / "config.json").read_text()))


def test_published_configs(shared: Path) -> None:
    paths = [
        p for p in sorted((shared / "configs").glob("*.json")) if p.stem not in ("param_counts", "Qwen-Qwen3-30B-A3B")
    ]
    assert len(paths) >= 28
    for path in paths:
        compare(json.loads(path.read_text()))


def test_a_wrong_factor_shows() -> None:
    rope = Rope(500_000.0, "llama3", 32.0, 8192)
    ours = rope.frequencies(64).radians
    assert (ours != Rope(500_000.0, "llama3", 8.0, 8192).frequencies(64).radians).sum() == 17  # for Llama 3.2 1B
    assert ulps(ours, Rope(500_000.0, "llama3", 32.0001, 8192).frequencies(64).radians) > 2

"""float32 logits of every configuration against transformers, at near and far positions in one row.

Row 0 stands at positions 0 to 63, past every window; row 1 at 0 to 31 and 9,000 to 9,031: rope is relative, so a long
offset alone would test nothing.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers.tiny_models import DISTINCT, families, layers
from oracle import reference
from oracle.cases import CASES, Case
from oracle.reference import FAULT, LIMIT

import jaxlm

pytestmark = pytest.mark.oracle


def saved(case: Case, folder: Path) -> tuple[object, jaxlm.Model]:
    """The oracle as it reads its own folder in float32, and ours."""
    import torch
    import transformers

    oracle = reference.build(case.family, change=case.change, **case.fields)
    oracle.to(getattr(torch, case.stored)).save_pretrained(folder, max_shard_size="40KB" if case.shards else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or not case.shards
    if case.old:
        reference.rewrite(folder, reference.old_spelling)
    if case.drop:
        reference.rewrite(folder, lambda config: [config.pop(name) for name in case.drop])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    model = jaxlm.load(folder, dtype="float32")
    reference.share_frequencies(oracle, model)
    return oracle, model


# One planted fault per family and kind of fault; the others are in the slow tier.
PLANTED = list({(case.family, case.fault.__qualname__): case for case in reversed(CASES)}.values())


@pytest.mark.parametrize("case", CASES, ids=[f"{case.family}: {case.name}" for case in CASES])
def test_logits(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, tmp_path, monkeypatch, planted=case in PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f"{case.family}: {case.name}" for case in CASES])
def test_every_planted_fault(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, tmp_path, monkeypatch, planted=True)


def new_program(case: Case) -> bool:
    """Whether more than numbers and files sets the case apart: the rest is the program of another case, with other
    constants, and is compiled quickly."""
    return "rope_parameters" not in case.fields and case.change is None and case.stored == "float32"


def compare(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    with reference.quiet():
        oracle, model = saved(case, folder)
    tokens, pos = reference.near_and_far()
    expected = reference.logits(oracle, tokens, pos)
    assert reference.score_deviation(oracle, tokens, pos) >= 1
    with nullcontext() if new_program(case) else reference.quickly():
        assert reference.distance(reference.forward(model, tokens, pos)[0], expected) <= LIMIT
    if planted:
        faulty = case.fault(model, monkeypatch)
        assert reference.distance(reference.faulty_logits(faulty, model, tokens, pos), expected) >= FAULT


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_hidden_states_of_every_layer(family: str, tmp_path: Path) -> None:
    with reference.quiet():
        oracle = reference.build(family, **layers(family, 3))
        model = reference.pair(oracle, tmp_path)
    tokens, pos = reference.near_and_far()
    expected = [h.numpy() for h in reference.run(oracle, tokens, pos, output_hidden_states=True).hidden_states]
    ours = model.hidden_states(tokens, pos=pos)
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected):
        assert reference.distance(a, b) <= LIMIT
    assert all(reference.distance(a, b) >= FAULT for a, b in zip(ours, expected[1:]))

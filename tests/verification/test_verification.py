"""`verify` without torch: jaxlm against itself and against recordings, its report, its command, its messages."""

import importlib.util
import json
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.published import SHARED
from helpers.tiny_models import CONFIGS, SLIDING, tiny

import jaxlm
from jaxlm import loading
from jaxlm.cli import main
from jaxlm.inference import compilation
from jaxlm.nn import Rope, attention, quantize
from jaxlm.nn.linear import WeightForm
from jaxlm.verification import checks, meta_code, ours, probes, recordings, report

STORIES = SHARED / "checkpoints" / "stories260K"
RECORDED = Path(__file__).parents[1] / "recordings" / "verify" / "stories260K.npz"


@pytest.fixture(scope="module")
def gemma() -> jaxlm.Model:
    return tiny("gemma3")


@pytest.fixture
def not_itself(monkeypatch) -> None:
    """No comparison with itself, which test_a_model_agrees_with_itself makes."""
    monkeypatch.setattr(ours, "itself", lambda model: {})


def recording_of(model: jaxlm.Model, path: Path, **config: Any) -> Path:
    """A file as --record writes it, in which the reference is another name for jaxlm, of these fields of the config."""
    trace = traced(model)
    trace.name, trace.gaps = "a twin", [1.0] * len(trace.greedy)
    recordings.write(path, probes.probes_for(model.config, None), [trace], replace(model.config, **config))
    return path


def traced(model: jaxlm.Model) -> probes.Trace:
    return copy(answers(model))


@cache
def answers(model: jaxlm.Model) -> probes.Trace:
    return ours.trace(model, probes.probes_for(model.config, None), None)


def changed(model: jaxlm.Model, layer: int, name: str, factor: float) -> jaxlm.Model:
    layers = [dict(w) for w in model.weights["layers"]]
    layers[layer][name] = jnp.asarray(np.asarray(layers[layer][name]) * np.float32(factor))
    return replace(model, weights={**model.weights, "layers": layers})


def test_positions_mix_near_far_and_every_window() -> None:
    rows = probes.positions(32768, (512, None, 1024))
    assert rows.shape == (4, 64)
    assert rows[0].tolist() == list(range(64))
    assert all((np.diff(row) > 0).all() for row in rows)
    assert rows[1, -1] == 9031
    for row, window in zip(rows[2:], (512, 1024)):
        distance = row[:, None] - row[None, :]
        assert {window - 1, window, window + 1} <= set(distance.ravel().tolist())
    assert probes.positions(40, (None,)).max() < 40
    assert probes.positions(512, (None,))[1, -1] == 511


def test_a_model_agrees_with_itself(gemma) -> None:
    found = jaxlm.verify(gemma)
    assert found.passed, str(found)
    assert [check.against for check in found.checks] == ["itself"] * 4
    assert 0 < max(check.figure for check in found.checks) < 1e-5
    assert found.verdict() == "verified: 4 checks passed"


def test_a_cache_that_forgets_the_window_fails(monkeypatch) -> None:
    whole = attention.attend

    def attend(q, k, v, pos, cache=None, *, window=None, scale=None):
        return whole(q, k, v, pos, cache, window=None if cache is not None else window, scale=scale)

    model = tiny("gemma3", num_hidden_layers=1, layer_types=[SLIDING])
    monkeypatch.setattr(model.family, "attend", attend)
    compilation.clear_executables()
    try:
        failed = [check.what for check in jaxlm.verify(model, "self").checks if not check.passed]
    finally:
        compilation.clear_executables()
    assert "decode = forward, logits, RMS" in failed


def test_a_mesh_that_computes_something_else_fails(gemma, monkeypatch) -> None:
    alone, trace = traced(gemma), ours.trace
    monkeypatch.setattr(ours, "trace", lambda model, *rest: alone if model is gemma else trace(model, *rest))
    found = report.Report.of(gemma)
    there = loading.spread(changed(gemma, 1, "mlp_out_norm", 1.01), "model=2")
    checks.compare_meshes(found, gemma, there, probes.probes_for(gemma.config, None))
    failed = [check.what for check in found.checks if not check.passed]
    assert "on data=1,model=2 = on one device, logits, RMS" in failed
    assert list(found.tokens) == ["jaxlm on data=1,model=2"]


def test_recordings(gemma, not_itself, tmp_path) -> None:
    path = recording_of(gemma, tmp_path / "twin.npz")
    found = jaxlm.verify(gemma, str(path))
    assert found.passed, str(found)
    assert found.layers["a twin"] == [0.0] * 3
    assert found.tokens["jaxlm"] == found.tokens["a twin"]
    faulty = jaxlm.verify(changed(gemma, 1, "mlp_out_norm", 1.01), path.as_posix())
    assert not faulty.passed
    assert "a twin: first divergence at layer 1 + norm" in faulty.verdict()
    assert not jaxlm.verify(changed(gemma, 0, "v", -1), str(path)).passed
    assert [p.name for p in tmp_path.iterdir()] == ["twin.npz"]


def test_a_recording_of_another_model_is_refused(gemma, tmp_path) -> None:
    path = recording_of(gemma, tmp_path / "other.npz", windows=(6, None))
    with pytest.raises(ValueError, match="windows"):
        jaxlm.verify(gemma, str(path))
    path.write_bytes(b"PK\x03\x04 not a recording")
    with pytest.raises(ValueError, match="recording"):
        jaxlm.verify(gemma, str(path))
    np.savez(path, about=np.array(["[]"]))
    with pytest.raises(ValueError, match="recording"):
        jaxlm.verify(gemma, str(path))


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("nobody", "neither one of"),
        ("transformers", "export it"),
        ("{recording},self", "own probes"),
    ],
)
def test_references_that_cannot_run(against: str, message: str, gemma, tmp_path) -> None:
    recording = recording_of(gemma, tmp_path / "twin.npz") if "{" in against else ""
    with pytest.raises(ValueError, match=message):
        jaxlm.verify(gemma, against.format(recording=recording))
    with pytest.raises(ValueError, match="transformers"):
        jaxlm.verify(gemma, "self", record=tmp_path / "new.npz")


def test_distance() -> None:
    b = np.random.RandomState(0).normal(0, 2, (5, 40)).astype(np.float32)
    assert checks.distance(b + np.float32(0.2), b).worst == pytest.approx(0.2 / b.std(), rel=1e-3)
    assert checks.logits_distance(b + 1, b).kl == pytest.approx(0, abs=1e-9)  # a constant changes no probability
    p = np.exp(b) / np.exp(b).sum(-1, keepdims=True)
    q = np.exp(1.1 * b) / np.exp(1.1 * b).sum(-1, keepdims=True)
    assert checks.logits_distance(1.1 * b, b).kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert checks.logits_distance(-b, b).top1 == 0
    broken = b.copy()
    broken[3, 3] = np.nan
    far = checks.logits_distance(broken, b)
    assert (far.worst, far.rms, far.kl) == (np.inf,) * 3
    assert not report.Check("x", "y", float("nan"), 1.0, "z").passed


def test_greedy_text_may_diverge_only_at_a_tie(gemma) -> None:
    theirs = traced(gemma)
    mine = copy(theirs)
    mine.greedy = [*theirs.greedy[:10], 7, *theirs.greedy[11:]]
    theirs.gaps = [1.0] * 64
    [check] = checks._text(mine, theirs)
    assert (check.figure, check.passed) == (54, False)
    theirs.gaps[10] = 1e-6
    [check] = checks._text(mine, theirs)
    assert check.passed
    assert "at a tie" in check.note


def test_a_recording_in_another_type_proves_nothing(gemma, not_itself, tmp_path) -> None:
    asked = probes.probes_for(gemma.config, None)
    exact = traced(gemma)
    rounded = copy(exact)
    rounded.dtype, rounded.logits = "bfloat16", exact.logits + 0.5
    recordings.write(tmp_path / "both.npz", asked, [exact, rounded], gemma.config)
    limits = {check.what: check.limit for check in jaxlm.verify(gemma, str(tmp_path / "both.npz")).checks}
    assert limits["logits, worst"] == 1e-4
    with pytest.raises(ValueError, match="float16"):
        recordings.read(tmp_path / "both.npz", gemma.config, "float16")


def test_text_that_ends_early_fails(gemma) -> None:
    theirs = traced(gemma)
    mine = copy(theirs)
    mine.greedy = theirs.greedy[:3]
    [check] = checks._text(mine, theirs)
    assert (check.figure, check.passed) == (61, False)


def test_names_are_no_markup(gemma) -> None:
    odd = replace(gemma, source="models/[/x] [beta]")
    assert "models/[/x] [beta]" in str(jaxlm.verify(odd))


def test_the_report(gemma, not_itself, tmp_path) -> None:
    found = jaxlm.verify(changed(gemma, 0, "gate", 1.2), str(recording_of(gemma, tmp_path / "twin.npz")))
    text = str(found)
    assert "FAILED" in text and "matrix precision full" in text  # noqa: PT018
    told = json.loads(json.dumps(found.json()))
    assert told["passed"] is False
    assert len(told["layers"]["a twin"]) == 3
    page = found.save(tmp_path / "report").read_text()
    assert page.startswith("# random weights: FAILED")
    assert "| a twin | logits, worst |" in page
    assert "![Error by layer](layers.png)" in page
    assert (tmp_path / "report" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(gemma, tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "tiny"
    jaxlm.export(gemma, folder, config=CONFIGS["gemma3"])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    assert main(["verify", str(folder), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["passed"] is True
    assert "pip install torch" in shown.err
    other = recording_of(changed(gemma, 0, "mlp_out_norm", 2.0), tmp_path / "other.npz")
    assert main(["verify", str(folder), "--against", str(other)]) == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "first divergence at layer 0" in " ".join(shown.out.split())
    assert "running jaxlm" in shown.err
    assert main(["verify", str(folder), "--against", "nobody"]) == 1
    assert capsys.readouterr().err.startswith("jaxlm: --against nobody")
    assert main(["verify"]) == 2
    assert "pass one model" in capsys.readouterr().err


@pytest.mark.skipif(not STORIES.exists(), reason="the checkpoint is not at hand (../shared)")
@pytest.mark.parametrize("checks", ["not_itself", pytest.param("all", marks=pytest.mark.slow)])
def test_stories260k_against_what_transformers_computed(checks, request) -> None:
    if checks == "not_itself":
        request.getfixturevalue("not_itself")
    found: Any = jaxlm.verify(STORIES, str(RECORDED))
    assert found.passed, str(found)
    assert any("transformers" in check.against for check in found.checks)
    assert [check for check in found.checks if "token ids of 10 texts" in check.what]
    assert len(set(found.tokens["jaxlm"])) > 30


@pytest.mark.parametrize("changed", [{"low_freq_factor": 2.0}, {"high_freq_factor": 8.0}, {"original_context": 4096}])
def test_metas_code_has_one_rope(changed, monkeypatch) -> None:
    monkeypatch.setattr(meta_code.importlib.util, "find_spec", lambda name: name)
    rope = Rope(type="llama3", factor=8.0, original_context=8192)
    subject = SimpleNamespace(
        config=SimpleNamespace(rope=rope, H=4, N=2, D=8), checkpoint=SimpleNamespace(config={"model_type": "llama"})
    )
    meta_code.Meta().require(subject)
    subject.config.rope = replace(rope, **changed)
    with pytest.raises(ValueError, match="high_freq_factor"):
        meta_code.Meta().require(subject)


def test_a_quantized_model_is_compared_with_its_float_model(not_itself, tmp_path, monkeypatch) -> None:
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors(kind="F32"))
    found = jaxlm.verify(folder, quantize="int8-weights")
    assert (found.about["weights"], found.passed) == ("int8-weights", True)
    figures = {check.what: check.figure for check in found.checks}
    exact, model = (jaxlm.load(folder, dtype="float32", quantize=name) for name in (None, "int8-weights"))
    dense = jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, WeightForm) else leaf,
        model.weights,
        is_leaf=lambda leaf: isinstance(leaf, WeightForm),
    )
    inputs = probes.probes_for(exact.config, None)
    logits = [ours.trace(each, inputs, None).logits for each in (replace(model, weights=dense), exact)]
    kl = figures["logits, mean KL(float || quantized)"]
    assert 1e-3 < kl == pytest.approx(checks.logits_distance(*logits).kl, rel=1e-3)
    with pytest.raises(ValueError, match="--against"):
        jaxlm.verify(folder, "transformers", quantize="int8")
    given = quantize.quantize

    def wrong(w: Any, *args: Any, **more: Any) -> Any:  # the scales of other channels
        made = given(w, *args, **more)
        return replace(made, scale=jnp.roll(made.scale, 1) * 8)

    monkeypatch.setattr(quantize, "quantize", wrong)
    quantize._program.cache_clear()
    faulty = jaxlm.verify(folder, quantize="int8")
    quantize._program.cache_clear()
    assert not faulty.passed

"""`verify` against transformers and Meta's code: what is right passes, every planted fault fails."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meta_files
from helpers.tiny_models import FAMILIES
from oracle import faults, reference
from oracle.cases import WIDE_YARN, gemma_rope, llama3_rope, shape
from oracle.reference import FULL, SLIDING

import jaxlm
from jaxlm import Model
from jaxlm.nn import attention
from jaxlm.verification import ours, probes, torch_models
from jaxlm.verification.checks import compare

pytestmark = pytest.mark.oracle
FIELDS: dict[str, dict[str, Any]] = {
    "llama3": shape(N=6, K=3, D=96, tie_word_embeddings=True, **llama3_rope(32.0)),
    "qwen3": shape(head_dim=20),
    "olmo2": shape(N=3, K=3),
    "olmo3": shape(**gemma_rope(5e5, 5e5, **WIDE_YARN)),
    "smollm3": shape(no_rope_layers=[1, 0], layer_types=[FULL, SLIDING], use_sliding_window=True, sliding_window=8),
    "gemma3": shape(layer_types=[SLIDING, FULL], **gemma_rope(rope_type="linear", factor=8.0)),
}


class Tried(NamedTuple):
    model: Model
    probes: probes.Probes
    traces: list[list[probes.Trace]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tried]:
    return cache(lambda family: make(tmp_path_factory.mktemp(family), family, **FIELDS[family]))


@pytest.fixture(params=FAMILIES)
def tried(request: pytest.FixtureRequest, made: Callable[[str], Tried]) -> Tried:
    return made(request.param)


def make(folder: Path, family: str, **fields: Any) -> Tried:
    """A random-weight model as transformers saved it, with transformers' answers."""
    with reference.quiet():
        model = jaxlm.load(reference.save(reference.build(family, **fields), folder), dtype="float32")
    subject = ours.subject_of(model)
    asked = probes.probes_for(model.config, None)
    return Tried(model, asked, [torch_models.RUNS["transformers"](subject, asked, "float32")])


def test_what_is_right_passes(tried: Tried) -> None:
    # One family is compiled as users compile.
    with nullcontext() if tried.model.family.__name__.endswith("olmo2") else reference.quickly():
        report = compare(*tried)
    assert report.passed, str(report)
    worst = {check.what: check.figure for check in report.checks}
    assert worst["logits, worst"] < 3e-5
    assert worst["greedy text, 64 tokens"] == 0  # test_greedy.py looks after text that varies


def window_off_when_decoding(model: Model, patch: pytest.MonkeyPatch) -> Model:
    whole = attention.attend

    def attend(q, k, v, pos, cache=None, *, window=None, scale=None):
        return whole(q, k, v, pos, cache, window=window if cache is None else None, scale=scale)

    patch.setattr(model.family, "attend", attend)
    return faults.config(context=model.config.context - 1)(model, patch)  # so that it is compiled


def position_when_decoding(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """Positions doubled in steps of one token, as a cache that counts twice would have them."""
    whole = model.family.apply_rope
    patch.setattr(model.family, "apply_rope", lambda x, pos, freqs: whole(x, pos * (1 + (x.shape[1] == 1)), freqs))
    return faults.config(context=model.config.context - 1)(model, patch)


def norm_offset_forgotten(model: Model, patch: pytest.MonkeyPatch) -> Model:
    return faults.norm_without_one(model, patch)


def one_token_of_padding_seen(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """The embedding of one id changed: a wrong row of the table."""
    embed = model.weights["embed"].at[0].set(0)
    return faults._with(model, weights={**model.weights, "embed": embed})


def late_layer(model: Model, patch: pytest.MonkeyPatch) -> Model:
    """Only the last layer is wrong: the report must name it."""
    layers = [*model.weights["layers"][:-1], {**model.weights["layers"][-1]}]
    layers[-1]["down"] = layers[-1]["down"] * jnp.float32(1.01)
    return faults._with(model, weights={**model.weights, "layers": layers})


PLANTED = [
    ("llama3", "rope factor 8 for 32", faults.rope(factor=8.0)),
    ("llama3", "rope factor dropped", faults.rope(type="default")),
    ("llama3", "q and k permuted", faults.interleaved),
    ("llama3", "kv heads rolled", faults.rolled_kv_heads),
    ("llama3", "a layer skipped", faults.skipped_layer),
    ("llama3", "tied head ignored", faults.tied_head_ignored),
    ("llama3", "norms swapped", faults.swapped_norms),
    ("llama3", "eps", faults.config(eps=1e-4)),
    ("llama3", "a row of the embedding", one_token_of_padding_seen),
    ("qwen3", "q and k norms forgotten", faults.weights("q_norm", lambda w: w * 0 + 1)),
    ("qwen3", "the last layer", late_layer),
    ("qwen3", "position when decoding", position_when_decoding),
    ("olmo2", "norm of each head", faults.norm_of_each_head),
    ("olmo3", "factor on local layers", faults.scaling_everywhere),
    ("olmo3", "window off when decoding", window_off_when_decoding),
    ("smollm3", "RoPE in every layer", faults.rope_in_every_layer),
    ("smollm3", "window wider by one", faults.window(1)),
    ("gemma3", "norm without the +1", norm_offset_forgotten),
    ("gemma3", "window off when decoding", window_off_when_decoding),
    ("gemma3", "window wider by one", faults.window(1)),
    ("gemma3", "local theta is global", faults.local_theta_is_global),
    ("gemma3", "factor on local layers", faults.scaling_everywhere),
    ("gemma3", "query scale", faults.query_scale_of_width),
    ("gemma3", "embedding unscaled", faults.embedding_unscaled),
]


def forward_alone(monkeypatch: pytest.MonkeyPatch, greedy: list[int]) -> None:
    """Leaves the plain forward pass of `verify`, in which most faults show: the rest is not compiled."""
    monkeypatch.setattr(ours, "itself", lambda model: {})
    monkeypatch.setattr(ours, "greedy", lambda model, probes: greedy)


@pytest.mark.parametrize(("family", "name", "fault"), PLANTED, ids=[f"{f}: {n}" for f, n, _ in PLANTED])
def test_every_planted_fault_fails(
    family: str,
    name: str,
    fault: faults.Fault,
    made: Callable[[str], Tried],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, asked, traces = made(family)
    # What a fault does not need to show is not compiled: most show in the plain forward pass.
    if "when decoding" not in name:
        forward_alone(monkeypatch, traces[0][0].greedy)
    elif "window" in name:
        monkeypatch.setattr(ours, "greedy", lambda model, probes: traces[0][0].greedy)
    else:
        monkeypatch.setattr(ours, "itself", lambda model: {})
    with reference.quickly():
        report = compare(fault(model, monkeypatch), asked, traces)
    assert not report.passed
    assert report.verdict().startswith("FAILED")
    if name == "the last layer":
        assert f"first divergence at layer {model.config.L - 1} + norm" in report.verdict()
    if "factor" in name or "theta" in name:
        assert any(check.what.startswith("rotary frequencies") and not check.passed for check in report.checks)


def test_both_at_once_on_metas_form(
    made: Callable[[str], Tried], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama with scaled rope, factor 32: Meta's files, transformers, Meta's code and four devices: one table of ids."""
    model = made("llama3").model
    meta_files.convert(model.checkpoint.folder, tmp_path / "meta")
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["use_scaled_rope"]
    with reference.quickly():
        report = jaxlm.verify(tmp_path / "meta", "transformers,meta", rope_factor=32.0, mesh="model=4")
    assert report.passed, str(report)
    assert list(report.tokens) == ["jaxlm", *(name for name in report.tokens if name != "jaxlm")]
    assert len(report.tokens) == 4
    assert len({tuple(ids) for ids in report.tokens.values()}) == 1
    assert {"on data=1,model=4 = on one device, logits, RMS"} <= {check.what for check in report.checks}
    assert any("factor 32 patched in" in name for name in report.tokens)
    forward_alone(monkeypatch, report.tokens["jaxlm"])
    with reference.quickly():
        assert not jaxlm.verify(faults.interleaved(model, None), "meta").passed


def test_a_type_is_held_against_the_references_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reference.quiet():
        reference.save(reference.build("qwen3", **shape(L=1)), tmp_path / "hf")
    with reference.quickly():
        for dtype in ("bfloat16", "float16"):
            report = jaxlm.verify(tmp_path / "hf", "transformers", dtype=dtype)
            assert report.passed, str(report)
            assert report.dtype == dtype
        assert not np.isnan([check.figure for check in report.checks]).any()
        forward_alone(monkeypatch, report.tokens["jaxlm"])
        half = faults.weights("gate", lambda w: w * 1.05)(jaxlm.load(tmp_path / "hf", dtype="bfloat16"), None)
        assert not jaxlm.verify(half, "transformers").passed

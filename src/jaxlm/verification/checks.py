"""Comparisons of answers: each has a figure and a limit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.verification import ours, tolerances
from jaxlm.verification.probes import CHATS, TEXTS, Probes, Trace
from jaxlm.verification.report import DIVERGENCE, Check, Report

STD = "std"  # unit of errors: standard deviations of the reference


class Distance(NamedTuple):
    """Distance of answers from the reference's.

    Attributes:
        worst, rms: largest and root mean square difference, in standard deviations of the reference.
        kl: mean KL divergence in nats.
        top1: share of positions with the same most likely token.
    """

    worst: float
    rms: float
    kl: float = 0.0
    top1: float = 1.0


def distance(a: np.ndarray, b: np.ndarray) -> Distance:
    """Of hidden states or logits a [...,n] from the reference's b."""
    deviation = float(b.std()) or 1.0
    difference = a.astype(np.float64) - b
    # A NaN must count as infinitely far.
    worst, rms = np.abs(difference).max() / deviation, np.sqrt((difference**2).mean()) / deviation
    return Distance(*(float(x) if np.isfinite(x) else np.inf for x in (worst, rms)))


def logits_distance(a: np.ndarray, b: np.ndarray) -> Distance:
    """Of logits a [...,V] from the reference's b, with KL divergence and top-1 agreement."""
    p, q = _log_softmax(b), _log_softmax(a)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    top1 = float((a.argmax(-1) == b.argmax(-1)).mean())
    return Distance(*distance(a, b)[:2], max(kl, 0.0) if np.isfinite(kl) else np.inf, top1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(model: Any, probes: Probes, traces: Sequence[list[Trace]]) -> Report:
    """All checks of a model, against each reference and against itself.

    Args:
        model: the model.
        probes: the inputs.
        traces: per reference its answers in float32, then those in the model's type if that is another.
    """
    report = Report.of(model)
    for theirs in traces:
        mine = ours.trace(model, probes, theirs[0])
        report.tokens.setdefault("jaxlm", mine.greedy)
        report.tokens[theirs[0].name] = theirs[0].greedy
        report.checks += _frequencies(mine, theirs[0])
        report.checks += _states(report, mine, theirs)
        report.checks += _logits(mine, theirs)
        report.checks += _text(mine, theirs[0])
        report.checks += _tokens(mine, theirs[0])
    report.checks += _itself(model, tolerances.ITSELF[report.dtype])
    return report


def compare_quantized(model: Any, probes: Probes, exact: Trace) -> Report:
    """The distance of a quantized model from the float model of the same checkpoint, and the model against itself.

    Args:
        model: The quantized model.
        probes: The inputs.
        exact: The outputs of the float model.
    """
    report, mine = Report.of(model), ours.trace(model, probes, None)
    report.tokens = {"jaxlm": mine.greedy, exact.name: exact.greedy}
    far = logits_distance(mine.logits, exact.logits)
    differ = int((mine.logits.argmax(-1) != exact.logits.argmax(-1)).sum())
    title = f"most likely token, of {exact.logits[..., 0].size}"
    text = sum(a != b for a, b in zip(mine.greedy, exact.greedy, strict=True))
    report.checks += [
        Check(exact.name, "logits, mean KL(float || quantized)", far.kl, tolerances.QUANTIZED_KL, "nats"),
        Check(exact.name, "logits, RMS", far.rms, None, STD),
        Check(exact.name, title, differ, None, "differ", f"{far.top1:.1%} agree"),
        Check(exact.name, f"greedy text, {len(exact.greedy)} tokens", text, None, "differ", "expected from rounding"),
    ]
    limit = max(tolerances.ITSELF[report.dtype], tolerances.ROUNDED)
    report.checks += _itself(model, limit)
    return report


def _itself(model: Any, limit: float) -> list[Check]:
    return [
        Check("itself", f"{name}, logits, RMS", distance(a, b).rms, limit, STD)
        for name, (a, b) in ours.itself(model).items()
    ]


def compare_meshes(report: Report, one: Any, spread: Any, probes: Probes) -> None:
    """Adds the checks of a model sharded over a mesh against the same model on one device."""
    alone, there = ours.trace(one, probes, None), ours.trace(spread, probes, None)
    rows, devices = spread.mesh.shape["data"], spread.mesh.size
    on = f"on data={rows},model={devices // rows}"
    report.tokens[f"jaxlm {on}"] = there.greedy
    rms = distance(there.logits, alone.logits).rms
    check = Check("itself", f"{on} = on one device, logits, RMS", rms, tolerances.ITSELF[report.dtype], STD)
    texts = [text._replace(against="itself", what=f"{on}: {text.what}") for text in _text(there, alone)]
    report.checks += [check, *texts]


def _limits(theirs: list[Trace], figures: Distance | None) -> tolerances.Limits:
    """The limits of float32; in another type a multiple of the reference's own error in it."""
    if figures is None:
        return tolerances.EXACT
    worst, rms, kl = (tolerances.OWN_ERROR * figure for figure in figures[:3])
    return tolerances.Limits(worst, rms, kl)


def _frequencies(mine: Trace, theirs: Trace) -> list[Check]:
    checks = []
    limit = tolerances.ULPS if theirs.used is None else tolerances.ULPS_READ_BACK
    for name, radians in theirs.radians.items():
        a, b = (x.astype(np.float32).view(np.int32).astype(np.int64) for x in (mine.radians[name], radians))
        checks.append(Check(theirs.name, f"rotary frequencies ({name})", float(np.abs(a - b).max()), limit, "ulp"))
        scale = abs(mine.amplitude[name] / theirs.amplitude[name] - 1)
        checks.append(Check(theirs.name, f"rotary scale ({name})", scale, 1e-6, "relative"))
    return checks


def _states(report: Report, mine: Trace, theirs: list[Trace]) -> list[Check]:
    """Hidden states of every layer. The figure is that of the worst layer; the note names the first divergence."""
    exact, name = theirs[0], theirs[0].name
    if len(mine.hidden) != len(exact.hidden):
        counts = len(mine.hidden) - 1, len(exact.hidden) - 1
        return [Check(name, f"layers: {counts[0]} instead of {counts[1]}", abs(counts[0] - counts[1]), 0, "layers")]
    distances = [distance(a, b) for a, b in zip(mine.hidden, exact.hidden)]
    own = (
        [distance(a, b) for a, b in zip(theirs[1].hidden, exact.hidden)] if len(theirs) > 1 else [None] * len(distances)
    )
    limits = [_limits(theirs, figures) for figures in own]
    # The embedding is a copy without rounding: the reference's own error may be zero there.
    bounds = [max(limit.rms, tolerances.EXACT.rms) for limit in limits]
    report.layers[name] = [each.rms for each in distances]
    report.layer_limits[name] = bounds
    ratios = [each.rms / bound for each, bound in zip(distances, bounds)]
    worst = int(np.argmax(ratios))
    where = _layer(worst, len(ratios))
    check = Check(name, f"hidden states, RMS, worst at {where}", distances[worst].rms, bounds[worst], STD)
    first = next((i for i, ratio in enumerate(ratios) if not ratio <= 1), None)
    if first is not None:
        check = check._replace(note=f"{DIVERGENCE} at {_layer(first, len(ratios))}")
    return [check]


def _layer(i: int, count: int) -> str:
    """The name of hidden state i of `count`."""
    return "the embedding" if i == 0 else f"layer {i - 1}" if i < count - 1 else f"layer {i - 1} + norm"


def _logits(mine: Trace, theirs: list[Trace]) -> list[Check]:
    exact, name = theirs[0], theirs[0].name
    far = logits_distance(mine.logits, exact.logits)
    limits = _limits(theirs, logits_distance(theirs[1].logits, exact.logits) if len(theirs) > 1 else None)
    checks = [
        Check(name, "logits, worst", far.worst, limits.worst, STD),
        Check(name, "logits, RMS", far.rms, limits.rms, STD),
        Check(name, "logits, mean KL", far.kl, limits.kl, "nats"),
    ]
    # Where the reference's top two are closer than the tolerance, either may be the most likely.
    two = np.sort(exact.logits, axis=-1)[..., -2:]
    clear = two[..., 1] - two[..., 0] > 2 * limits.worst * exact.logits.std()
    wrong = clear & (mine.logits.argmax(-1) != exact.logits.argmax(-1))
    note = f"{far.top1:.1%} agree overall"
    return [*checks, Check(name, f"most likely token, of {clear.sum()} clear", int(wrong.sum()), 0, "differ", note)]


def _text(mine: Trace, theirs: Trace) -> list[Check]:
    """Greedy text. In float32 it must be equal, unless the first divergence is at a tie of the reference."""
    shorter = min(len(mine.greedy), len(theirs.greedy))
    same = next((i for i, (a, b) in enumerate(zip(mine.greedy, theirs.greedy)) if a != b), shorter)
    title, missing = f"greedy text, {len(theirs.greedy)} tokens", max(len(mine.greedy), len(theirs.greedy)) - same
    if missing and mine.dtype != "float32":
        return [Check(theirs.name, title, missing, None, "differ", "expected from rounding in this type")]
    tie = 2 * tolerances.EXACT.worst * float(theirs.logits.std())
    if missing and same < len(theirs.gaps) and theirs.gaps[same] <= tie and same < shorter:
        return [Check(theirs.name, title, missing, None, "differ", f"{DIVERGENCE} at a tie of {theirs.gaps[same]:.1e}")]
    return [Check(theirs.name, title, missing, 0, "differ")]


def _tokens(mine: Trace, theirs: Trace) -> list[Check]:
    checks = []
    for what, texts, a, b in (("texts", TEXTS, mine.ids, theirs.ids), ("chats", CHATS, mine.chats, theirs.chats)):
        if a is not None and b is not None:
            wrong = [text for text, x, y in zip(texts, a, b, strict=True) if list(x) != list(y)]
            note = f"first: {str(wrong[0])[:60]!r}" if wrong else ""
            checks.append(Check(theirs.name, f"token ids of {len(texts)} {what}", len(wrong), 0, "differ", note))
    return checks

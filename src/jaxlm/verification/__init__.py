"""Proof that a model on this machine computes what its authors published.

`verify` runs one or more references (transformers, Meta's own code, or a recording of either), frees each, then runs
jaxlm over the same probes and compares: rotary frequencies, the residual stream after every layer, logits, greedy text,
token ids. It also holds jaxlm against itself: cached, chunked, batched and rewound runs must equal the plain one.

    probes.py        what is asked of every model, and what it answers
    torch_models.py  transformers
    meta_code.py     Meta's own; with torch_models.py the one place of the package that imports torch
    recordings.py    a reference's answers in a file, for machines without torch
    ours.py          jaxlm's answers, and jaxlm against itself
    tolerances.py    how far apart two answers may be, and why
    checks.py        answers -> checks
    report.py        checks -> table, JSON, Markdown, plot
"""

import gc
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm.loading import Resolved, placement, spread
from jaxlm.nn import params
from jaxlm.verification import ours, recordings
from jaxlm.verification.checks import Check, compare, compare_places
from jaxlm.verification.probes import Probes, Trace, probes_for
from jaxlm.verification.report import Report
from jaxlm.verification.torch_models import RUNS

__all__ = ["Check", "Report", "verify"]


def verify(
    model: Any,
    against: str | Sequence[str] | None = None,
    *,
    record: str | Path | None = None,
    dtype: str = "float32",
    mesh: Any = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Report:
    """Compares a model with references and with itself; see the module's docstring for what is compared.

    model: what `load` takes, or a Model (then two models share memory while a reference runs). against:
    "transformers", "meta", a file that `record` wrote, "self", or several; the default is transformers where torch is
    installed and the checkpoint is at hand, else "self". record: a file for the answers of the first reference. dtype:
    of jaxlm's weights; float32 proves the mathematics, another type is held against the reference's own error in that
    type. mesh: as `load` takes it; the model then runs there too, and is held against itself on one device. progress
    hears what is being done. options go to `load`. Raises what `load` raises, and ValueError for a reference that
    cannot run.
    """
    subject = ours.subject_of(model, options)
    if mesh is not None:
        _require(mesh, subject.config)
    names = _references(against, subject)
    if record is not None and names[0] not in RUNS:
        raise ValueError("--record writes down a reference that runs: name transformers or meta with --against")
    if record is not None and not Path(record).absolute().parent.is_dir():
        raise FileNotFoundError(f"--record {record}: there is no folder {Path(record).absolute().parent}")
    probes, traces = _answers(names, subject, ours.dtype_of(model, dtype), progress)
    if record is not None:
        recordings.write(record, probes, traces[0], subject.config)
    progress("running jaxlm …")
    alone = {} if mesh is None else {"device": jax.local_devices()[0]}
    one = ours.loaded(model, dtype, options | alone)
    report = compare(one, probes, traces)
    if mesh is not None:
        progress(f"running jaxlm on {mesh} …")
        compare_places(report, one, spread(one, mesh), probes)
    return report


def _require(mesh: Any, cfg: Any) -> None:
    """Refuses, before minutes of work, a mesh that cannot be or on which there is nothing to compare."""
    row = params.TensorSpec("embed", "VD", (cfg.V, cfg.D), (), ())
    if len(placement(cfg, mesh, None)(row).device_set) == 1:
        raise ValueError(f"mesh {mesh} is one device: there is nothing to compare")


def _answers(
    names: list[str], subject: Resolved, dtype: str, progress: Callable[[str], None]
) -> tuple[Probes, list[list[Trace]]]:
    """What the references answer, one after the other: no two models are in memory at once."""
    probes, traces = probes_for(subject.config, subject.tokenizer), []
    for name in names:
        if name in RUNS:
            progress(f"running {name} …")
            traces.append(RUNS[name](subject, probes, dtype))
            gc.collect()
        elif name != "self":
            probes, recorded = recordings.read(name, subject.config, dtype)
            traces.append(recorded)
    return probes, traces


def _references(against: str | Sequence[str] | None, subject: Resolved) -> list[str]:
    """The names asked for, checked; recordings are paths."""
    adapted = subject.checkpoint is not None and subject.checkpoint.adapter is not None
    if against is None:
        has_torch = not adapted and importlib.util.find_spec("torch") is not None and subject.checkpoint is not None
        return ["transformers" if has_torch else "self"]
    names = [name.strip() for name in (against.split(",") if isinstance(against, str) else against)]
    for name in names:
        if name in RUNS:
            if subject.checkpoint is None:
                raise ValueError(f"{name} reads a checkpoint, and this model came from none: save it first")
            if adapted:
                raise ValueError(f"{name} runs models without adapters: jaxlm fuse it first, or --against self")
            RUNS[name].require(subject)
        elif name != "self" and not Path(name).is_file():
            known = ", ".join([*RUNS, "self"])
            raise ValueError(f"--against {name}: neither one of {known} nor a recording (a file that --record wrote)")
    if len(names) > 1 and not set(names) <= {*RUNS, "self"}:
        raise ValueError("a recording brings its own probes: compare with it alone")
    return names

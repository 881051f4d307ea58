"""Proof that a model on this machine computes what its authors published.

`verify` runs one or more references (transformers, Meta's code, or a recording of either), frees each, then runs jaxlm
over the same probes and compares rotary frequencies, the residual stream after every layer, logits, greedy text and
token ids. It also compares jaxlm with itself: decoding through the KV cache, chunked prefill, a rewound cache and
single rows must equal the plain forward pass.

    probes.py        the inputs of every model, and its answers
    torch_models.py  transformers
    meta_code.py     Meta's code; only this file and torch_models.py import torch
    recordings.py    a reference's answers in a file, for machines without torch
    ours.py          jaxlm's answers, and jaxlm against itself
    tolerances.py    tolerances, with their reasons
    checks.py        compares answers
    report.py        the checks as a table, JSON, Markdown and a plot
"""

import gc
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.source import ModelSource
from jaxlm.loading import Resolved, placement, spread
from jaxlm.model import Model
from jaxlm.nn import params
from jaxlm.verification import ours, recordings
from jaxlm.verification.checks import Check, compare, compare_meshes
from jaxlm.verification.probes import Probes, Trace, probes_for
from jaxlm.verification.report import Report
from jaxlm.verification.torch_models import RUNS

__all__ = ["Check", "Report", "verify"]


def verify(
    model: str | Path | ModelSource | Model,
    against: str | Sequence[str] | None = None,
    *,
    record: str | Path | None = None,
    dtype: str = "float32",
    mesh: Any = None,
    progress: Callable[[str], None] = lambda what: None,
    **fields: Any,
) -> Report:
    """Compares a model with reference implementations and with itself. The module's docstring lists what is compared.

    Args:
        model: hub id, folder, ModelSource or Model. A Model stays in memory while a reference runs.
        against: "transformers", "meta", the path of a recording (`record`), "self", or several of them. Default:
            transformers if torch is installed and the checkpoint's files are available, else "self".
        record: file to write the answers of the first reference to.
        dtype: type of jaxlm's weights. float32 proves the mathematics; in another type the tolerance is a multiple of
            the reference's own error in that type.
        mesh: as in `load`. The model also runs sharded over it, and is compared with itself on one device.
        progress: called with what is being done.
        **fields: fields of ModelSource, for a `model` that is a name.

    Raises:
        ValueError, OSError, MemoryError: as `load`; ValueError for a reference that cannot run.
    """
    source = model if isinstance(model, Model) else ModelSource.of(model, **fields)
    subject = ours.subject_of(source)
    if mesh is not None:
        _require_several_devices(mesh, subject.config)
    names = _references(against, subject)
    if record is not None and names[0] not in RUNS:
        raise ValueError("--record needs a reference that runs: add --against transformers or --against meta")
    if record is not None and not Path(record).absolute().parent.is_dir():
        raise FileNotFoundError(f"--record {record}: there is no folder {Path(record).absolute().parent}")
    probes, traces = _answers(names, subject, ours.dtype_of(source, dtype), progress)
    if record is not None:
        recordings.write(record, probes, traces[0], subject.config)
    progress("running jaxlm …")
    one = ours.loaded(source, dtype, None if mesh is None else jax.local_devices()[0])
    report = compare(one, probes, traces)
    if mesh is not None:
        progress(f"running jaxlm on {mesh} …")
        compare_meshes(report, one, spread(one, mesh), probes)
    return report


def _require_several_devices(mesh: Any, cfg: Any) -> None:
    """ValueError, before minutes of work, for a mesh that is invalid or has a single device."""
    row = params.TensorSpec("embed", "VD", (cfg.V, cfg.D), (), ())
    if len(placement(cfg, mesh, None)(row).device_set) == 1:
        raise ValueError(f"mesh {mesh} has a single device: there is nothing to compare")


def _answers(
    names: list[str], subject: Resolved, dtype: str, progress: Callable[[str], None]
) -> tuple[Probes, list[list[Trace]]]:
    """The answers of the references, one after the other: no two models are in memory at once."""
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
    """The names in `against`, checked; recordings are paths."""
    adapted = subject.checkpoint is not None and subject.checkpoint.adapter is not None
    if against is None:
        has_torch = not adapted and importlib.util.find_spec("torch") is not None and subject.checkpoint is not None
        return ["transformers" if has_torch else "self"]
    names = [name.strip() for name in (against.split(",") if isinstance(against, str) else against)]
    for name in names:
        if name in RUNS:
            if subject.checkpoint is None:
                raise ValueError(f"{name} reads a checkpoint, and this model has none: export it first")
            if adapted:
                raise ValueError(
                    f"{name} runs models without adapters: merge it with jaxlm fuse, or use --against self"
                )
            RUNS[name].require(subject)
        elif name != "self" and not Path(name).is_file():
            known = ", ".join([*RUNS, "self"])
            raise ValueError(f"--against {name} is neither one of {known} nor a recording (a file that --record wrote)")
    if len(names) > 1 and not set(names) <= {*RUNS, "self"}:
        raise ValueError("a recording has its own probes: compare with it alone")
    return names

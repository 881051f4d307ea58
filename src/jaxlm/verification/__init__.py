"""Verification: compares the outputs of a model with reference implementations.

`verify` runs one or more references (transformers, Meta's code, or a recording of either), frees each, and then runs
jaxlm on the same inputs (probes). It compares rotary frequencies, the residual stream after every layer, logits, greedy
text and token ids. It also compares jaxlm with itself: decoding through the KV cache, chunked prefill, a rewound cache
and single rows must equal the plain forward pass.

    probes.py        the inputs of every model, and its outputs
    torch_models.py  transformers
    meta_code.py     Meta's code; only this file and torch_models.py import torch
    recordings.py    the outputs of a reference in a file, for machines without torch
    ours.py          the outputs of jaxlm, and jaxlm compared with itself
    tolerances.py    tolerances, with their reasons
    checks.py        compares outputs
    report.py        the checks as a table, JSON, Markdown and a plot
"""

import gc
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint.source import ModelSource
from jaxlm.loading import placement, spread
from jaxlm.loading.resolving import Resolved
from jaxlm.model import Model
from jaxlm.nn import params
from jaxlm.verification import ours, recordings
from jaxlm.verification.checks import Check, compare, compare_meshes, compare_quantized
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
    quantize: str | None = None,
    mesh: Any = None,
    progress: Callable[[str], None] = lambda what: None,
    **fields: Any,
) -> Report:
    """Compares a model with reference implementations and with itself. The module's docstring lists what is compared.

    Args:
        model: Hub id, folder, ModelSource or Model. A Model stays in memory while a reference runs.
        against: "transformers", "meta", the path of a recording (`record`), "self", or several of them. Default:
            transformers if torch is installed, the checkpoint's files are available and it has no adapter, else "self".
        record: File to write the outputs of the first reference to.
        dtype: dtype of jaxlm's weights. Use float32 to check the implementation. In another dtype, the tolerance is a
            multiple of the error of the reference in that dtype.
        quantize: As in `load`. The quantized model is compared with the float model of the same checkpoint, which jaxlm
            loads in `dtype` and frees: KL divergence and top-1 agreement, which are reported, in place of the bounds
            of parity. Not with `against`, `record` and `mesh`.
        mesh: As in `load`. The model also runs sharded over it, and is compared with itself on one device.
        progress: Called with a description of each step.
        **fields: Fields of ModelSource, if `model` is a name.

    Returns:
        The report, with all checks.

    Raises:
        ValueError: A reference cannot run, or as in `load`.
        OSError, MemoryError: As in `load`.
    """
    source = model if isinstance(model, Model) else ModelSource.of(model, **fields)
    subject = ours.subject_of(source)
    if quantize is not None:
        return _quantized(source, subject, dtype, quantize, (against, record, mesh), progress)
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


def _quantized(
    source: Model | ModelSource,
    subject: Resolved,
    dtype: str,
    quantize: str,
    others: tuple[Any, ...],
    progress: Callable[[str], None],
) -> Report:
    """The report of a quantized model, beside the float model of the same checkpoint."""
    if isinstance(source, Model):
        raise ValueError("quantize= needs the name of a checkpoint, which is loaded twice: pass the model's source")
    if any(other is not None for other in others):
        raise ValueError("a quantized model is compared with its own checkpoint on one device: leave out --against, "
                         "--record and --mesh")  # fmt: skip
    probes, device = probes_for(subject.config, subject.tokenizer), jax.local_devices()[0]
    progress(f"running jaxlm in {dtype} …")
    exact = ours.trace(ours.loaded(source, dtype, device), probes, None)
    exact.name = f"jaxlm in {dtype}"
    gc.collect()
    progress(f"running jaxlm in {quantize} …")
    return compare_quantized(ours.loaded(source, dtype, device, quantize), probes, exact)


def _require_several_devices(mesh: Any, cfg: Any) -> None:
    """Raises ValueError for a mesh that is invalid or has a single device, before the long computation."""
    row = params.TensorSpec("embed", "VD", (cfg.V, cfg.D), (), ())
    if len(placement({}, cfg, mesh, None)(row).device_set) == 1:
        raise ValueError(f"mesh {mesh} has a single device: there is nothing to compare")


def _answers(
    names: list[str], subject: Resolved, dtype: str, progress: Callable[[str], None]
) -> tuple[Probes, list[list[Trace]]]:
    """The outputs of the references, computed one after the other, so that only one model is in memory at a time."""
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
    """Checks the names in `against`. Recordings are returned as paths."""
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

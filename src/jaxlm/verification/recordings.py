"""A reference's answers in a file (.npz), made where torch is installed and read where it is not."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.atomic import atomic_file
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.verification.probes import Probes, Trace

FORM = 1  # of the file; raised when its meaning changes


def write(path: str | Path, probes: Probes, traces: list[Trace], config: Any) -> None:
    """All that `verify` needs of a reference. The file is written beside and renamed."""
    arrays: dict[str, np.ndarray] = {name: np.asarray(value) for name, value in vars(probes).items()}
    for i, trace in enumerate(traces):
        arrays[f"{i}.logits"] = trace.logits
        arrays |= {f"{i}.hidden.{n}": state for n, state in enumerate(trace.hidden)}
        arrays |= {f"{i}.radians.{name}": value for name, value in trace.radians.items()}
        arrays |= {f"{i}.used.{name}": value for name, value in (trace.used or {}).items()}
    plain = ("name", "dtype", "amplitude", "greedy", "gaps", "ids", "chats")
    about = {
        "form": FORM,
        "config": _of(config),
        "traces": [{field: getattr(trace, field) for field in plain} for trace in traces],
    }
    arrays["about"] = np.array(json.dumps(about))
    with atomic_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def read(path: str | Path, config: Any, dtype: str) -> tuple[Probes, list[Trace]]:
    """The probes and the answers (in float32, then in `dtype` where that is another) of a recording made of a model
    with this config; ValueError where it is another's, or lacks that type."""
    unreadable = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile)
    with explain_errors(f"{path} is no recording", "record it again with jaxlm verify --record", unreadable):
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        about = json.loads(str(arrays.pop("about")))
        form, of = about["form"], about["config"]
    if form != FORM:
        raise ValueError(f"{path} is a recording of form {form}, this jaxlm reads {FORM}: record it anew")
    if of != _of(config):
        changed = [name for name, value in _of(config).items() if of.get(name) != value]
        raise ValueError(
            f"{path} was recorded of another architecture ({', '.join(changed) or 'more fields'}): record this model"
        )
    recorded = {fields["dtype"]: _trace(arrays, i, fields) for i, fields in enumerate(about["traces"])}
    if dtype not in recorded:
        raise ValueError(f"{path} holds no answers in {dtype}: record with --dtype {dtype}, or verify in float32")
    traces = [recorded[name] for name in dict.fromkeys(("float32", dtype))]
    prompt, steps = arrays["prompt"].tolist(), int(arrays["steps"])
    return Probes(arrays["tokens"], arrays["pos"], arrays["kept"], prompt, steps), traces


def _trace(arrays: dict[str, np.ndarray], i: int, fields: dict[str, Any]) -> Trace:
    def below(what: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{i}.{what}."): a for key, a in arrays.items() if key.startswith(f"{i}.{what}.")}

    hidden = below("hidden")
    states = [hidden[str(n)] for n in range(len(hidden))]
    return Trace(
        radians=below("radians"), used=below("used") or None, hidden=states, logits=arrays[f"{i}.logits"], **fields
    )


def _of(config: Any) -> dict[str, Any]:
    """A config as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))

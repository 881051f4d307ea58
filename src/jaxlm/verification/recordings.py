"""A reference's answers in a file (.npz), written on a machine with torch and read on one without."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.atomic import atomic_file
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.verification.probes import Probes, Trace

INDICES = "kept"  # key of Probes.indices in the file
FORMAT = 1  # of the file ("form" in it); raised when its meaning changes


def write(path: str | Path, probes: Probes, traces: list[Trace], config: Any) -> None:
    """Writes the probes and a reference's answers to them, atomically."""
    arrays: dict[str, np.ndarray] = {
        INDICES if name == "indices" else name: np.asarray(value) for name, value in vars(probes).items()
    }
    for i, trace in enumerate(traces):
        arrays[f"{i}.logits"] = trace.logits
        arrays |= {f"{i}.hidden.{n}": state for n, state in enumerate(trace.hidden)}
        arrays |= {f"{i}.radians.{name}": value for name, value in trace.radians.items()}
        arrays |= {f"{i}.used.{name}": value for name, value in (trace.used or {}).items()}
    plain = ("name", "dtype", "amplitude", "greedy", "gaps", "ids", "chats")
    about = {
        "form": FORMAT,
        "config": _of(config),
        "traces": [{field: getattr(trace, field) for field in plain} for trace in traces],
    }
    arrays["about"] = np.array(json.dumps(about))
    with atomic_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def read(path: str | Path, config: Any, dtype: str) -> tuple[Probes, list[Trace]]:
    """Reads a recording.

    Returns:
        The probes, and the answers in float32, then in `dtype` if that is another.

    Raises:
        ValueError: the recording is of a model with another config, or has no answers in `dtype`.
    """
    unreadable = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile)
    with explain_errors(f"{path} is no recording", "record it again with jaxlm verify --record", unreadable):
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        about = json.loads(str(arrays.pop("about")))
        form, of = about["form"], about["config"]
    if form != FORMAT:
        raise ValueError(f"{path} is a recording of format {form}, this jaxlm reads format {FORMAT}: record it again")
    if of != _of(config):
        changed = [name for name, value in _of(config).items() if of.get(name) != value]
        raise ValueError(
            f"{path} is a recording of another architecture ({', '.join(changed) or 'more fields'}): record this model"
        )
    recorded = {fields["dtype"]: _trace(arrays, i, fields) for i, fields in enumerate(about["traces"])}
    if dtype not in recorded:
        raise ValueError(f"{path} has no answers in {dtype}: record with --dtype {dtype}, or verify in float32")
    traces = [recorded[name] for name in dict.fromkeys(("float32", dtype))]
    prompt, steps = arrays["prompt"].tolist(), int(arrays["steps"])
    return Probes(arrays["tokens"], arrays["pos"], arrays[INDICES], prompt, steps), traces


def _trace(arrays: dict[str, np.ndarray], i: int, fields: dict[str, Any]) -> Trace:
    def below(what: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{i}.{what}."): a for key, a in arrays.items() if key.startswith(f"{i}.{what}.")}

    hidden = below("hidden")
    states = [hidden[str(n)] for n in range(len(hidden))]
    return Trace(
        radians=below("radians"), used=below("used") or None, hidden=states, logits=arrays[f"{i}.logits"], **fields
    )


def _of(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))

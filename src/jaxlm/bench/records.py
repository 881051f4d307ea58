"""The records of `jaxlm check`: a JSON Lines file for each device, with one line for each model.

A record is a dict of JSON values. FIELDS lists what every record has. Others, by method:

    arithmetic  memory: bytes per device by part, and their total; needs: the fewest devices that the model fits on
    compile     compiled: by program ("decode", "prefill") the compiler's account in bytes and the seconds it took;
                same_as: the model of the same shapes whose programs these are
    run         figures: what was timed; verify: the result of `jaxlm.verify`; memory_of: batch and context of `memory`
    any         error: why the status is "fails", or why nothing was compiled; quantize: the type of quantized weights,
                which the name of the device ends with
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.atomic import write_atomically

SCHEMA = 1
Record = dict[str, Any]

# "ran": the model ran on the device. "compiles": its programs compile, and fit by the compiler's account. "fits": it
# fits by arithmetic. "fails": an error other than too little memory, or wrong results.
STATUSES = ("ran", "compiles", "fits", "does not fit", "fails")
# How a status was found, the strongest evidence last.
METHODS = ("arithmetic", "compile", "run with random weights", "run")

FIELDS: dict[str, Any] = {
    "schema": int,
    "model": str,
    "family": str,
    "tuned": bool | None,  # instruction-tuned; None for a model that is not published as either
    "parameters": int,
    "sizes": dict,  # V, D, F, L, N, K, H
    "shapes": str,  # a digest, equal for models of the same shapes
    "page": str | None,
    "config_page": str | None,
    "device": str,  # the name of the device, of the file and of the column
    "platform": str,
    "devices": int,
    "cores": int,  # of a device in the name of a TPU slice: v5p-8 has 4 devices
    "device_memory": int,  # bytes of one device
    "machine": dict | None,  # of a device that was at hand: processor, cores, memory
    "status": str,
    "method": str,
    "date": str,  # ISO 8601, UTC
    "versions": dict,
    "command": str,
    "batch": int,
    "context": int,
    "dtype": str,
    "mesh": dict,
}


def file_of(folder: Path, device: str) -> Path:
    """The file of a device's records."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', device).strip('-.') or 'device'}.jsonl"


def read(folder: Path) -> list[Record]:
    """All records of a folder, by device and model.

    Raises:
        ValueError: A line is not a record, or a model is there twice for one device.
    """
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_file(path)]


def read_file(path: Path) -> list[Record]:
    """The records of a file, by model; none if there is no file.

    Raises:
        ValueError: As in `read`.
    """
    records: dict[str, Record] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            fault = fault_of(record)
        except json.JSONDecodeError as error:
            record, fault = {}, f"not JSON ({error})"
        if not fault and record["model"] in records:
            fault = f"{record['model']} is there twice: delete one of the lines"
        if not fault and file_of(path.parent, record["device"]) != path:
            fault = f"device {record['device']!r} belongs in {file_of(path.parent, record['device']).name}"
        if fault:
            raise ValueError(f"{path}, line {number}: {fault}")
        records[record["model"]] = record
    return [records[name] for name in sorted(records)]


def fault_of(record: Any) -> str:
    """Why a value is not a record; an empty text if it is one."""
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        return "not a record of jaxlm check"
    if record["schema"] != SCHEMA:
        return f"schema {record['schema']}, but this version of jaxlm reads schema {SCHEMA}: upgrade jaxlm"
    for name, kind in FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            return f"{name} is {record.get(name)!r}, which is not {getattr(kind, '__name__', kind)}"
    for name, known in (("status", STATUSES), ("method", METHODS)):
        if record[name] not in known:
            return f"{name} {record[name]!r} is not one of {', '.join(known)}"
    return ""


def write(folder: Path, record: Record) -> Path:
    """Writes a record into the file of its device. It replaces the line of the same model. The file is complete at any
    time.

    Returns:
        The file.

    Raises:
        ValueError: The record or the file is invalid.
    """
    if fault := fault_of(record):
        raise ValueError(f"record of {record.get('model')}: {fault}")
    path = file_of(folder, record["device"])
    others = [old for old in read_file(path) if old["model"] != record["model"]]
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted([*others, record], key=lambda one: one["model"])
    write_atomically(path, "".join(json.dumps(one, sort_keys=True, ensure_ascii=False) + "\n" for one in ordered))
    return path


def keeps(old: Record, new: Record) -> bool:
    """Whether an old record of a model makes a new check unnecessary: it has stronger evidence, or the same command had
    the same versions on the same machine. What fits by arithmetic is compiled once there is a compiler for it.

    Args:
        old: A record.
        new: What the new record would have: `method`, `command`, `versions` and `machine`.
    """
    if METHODS.index(old["method"]) > METHODS.index(new["method"]):
        return True
    if old["status"] == "fits" and new["method"] == "compile":
        return False
    return all(old[name] == new[name] for name in ("command", "versions", "machine"))


def is_stronger(old: Record, result: Record) -> bool:
    """Whether an old record rests on more than the arithmetic that a new result is."""
    return result["method"] == "arithmetic" and METHODS.index(old["method"]) > 0


def twin(records: Iterable[Record], new: Record) -> Record | None:
    """A record of the same shapes, method, settings, versions and machine, whose result is that of the new one too.

    Args:
        records: Of one device.
        new: The new record without a result.
    """
    same = ("shapes", "method", "versions", "machine", "batch", "context", "dtype", "device")
    for old in records:
        if old["model"] != new["model"] and "same_as" not in old and all(old[name] == new[name] for name in same):
            return old
    return None

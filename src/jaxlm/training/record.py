"""What a run is, in its folder: run.json, the configuration with all that was left open filled in, and contents.json, a
digest of what it reads. A run goes on only with the same; what changes nothing that is learned may change."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxlm.devices import distributed
from jaxlm.training.config import to_dict
from jaxlm.training.setup import Setup

# Names of files may change where their contents do not (contents.json), and so may the rate: it is the way out of a
# loss that is no number.
MUTABLE_FIELDS = (
    "log_every", "save_every", "keep", "eval_every", "eval_batches", "samples", "sample_tokens", "resume", "mesh", "out",
    "report", "shape", "tokenizer", "data.train", "data.valid", "data.on_bad", "optimizer.lr",
)  # fmt: skip


def check_resume(setup: Setup, begun: bool) -> list[str]:
    """Writes the record of a run. begun: whether there is a checkpoint, so that the one that stands there must be of
    the same run; ValueError with what differs. -> what may change and did, to be told."""
    run = setup.run
    run.out.mkdir(parents=True, exist_ok=True)
    told, contents = flat(to_dict(run)), contents_of(setup)
    changed = distributed.run_on_coordinator(lambda: _changes(run.out, told, contents)) if begun else {}
    if wrong := [name for name in changed if name not in MUTABLE_FIELDS]:
        shown = [f"{name} ({changed[name]}, not {told[name]})" if name in told else name for name in wrong]
        raise ValueError(
            f"{run.out} holds a run with another {', '.join(shown)}: choose another --out (--model with the old one's "
            "model goes on from its weights)"
        )
    if distributed.is_coordinator():
        write(run.out / "run.json", to_dict(run))
        write(run.out / "contents.json", contents)
    return [f"goes on with another {name}: {told[name]}" for name in changed if name == "optimizer.lr"]


def _changes(folder: Path, told: dict[str, Any], contents: dict[str, str]) -> dict[str, Any]:
    """Names that differ from what the folder's files say, which is given; a field that these do not know is new in this
    version."""
    found = {}
    for name, now in (("run.json", told), ("contents.json", contents)):
        path = folder / name
        if path.exists():
            try:
                before = flat(json.loads(path.read_text()))
            except (ValueError, AttributeError):  # no JSON, or no names and values
                raise ValueError(f"{path} is damaged: take it away, and the run goes on unchecked") from None
            found |= {key: before[key] for key, value in now.items() if key in before and before[key] != value}
    return found


def contents_of(setup: Setup) -> dict[str, str]:
    """Digests of the training data (with tokenizer and options) and of the architecture."""
    architecture = json.dumps(setup.raw, sort_keys=True)
    return {
        "data (contents)": setup.data.corpus.about["digest"],
        "architecture": hashlib.blake2b(architecture.encode(), digest_size=16).hexdigest(),
    }


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def write(path: Path, value: Any) -> None:
    """A JSON file, whole or not there."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)

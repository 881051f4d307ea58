"""Checkpoints of the training state, and the checks before a run resumes from one.

Orbax writes checkpoints asynchronously while training continues; each process writes its own shards. A checkpoint
appears under its step number only when it is complete.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.devices import distributed
from jaxlm.training.config import current_name, to_dict
from jaxlm.training.loaders import streams_of
from jaxlm.training.setup import Setup
from jaxlm.training.step import State

DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
CONTENTS, FILES = "data (contents)", "data (files)"  # in contents.json
# Fields that may change when a run resumes. File names may change, because contents.json has a digest of the contents.
# The learning rate may change, because a lower one is the remedy for a loss that became NaN or Inf.
MUTABLE_FIELDS = (
    "log_every", "save_every", "keep", "eval_every", "eval_batches", "samples", "sample_tokens", "resume", "mesh",
    "remat", "out", "report", "shape", "tokenizer", "data.train", "data.valid", "data.on_bad", "data.revision",
    "optimizer.lr", FILES,
)  # fmt: skip
# Fields of this version whose values in runs of earlier versions are known.
EARLIER_VALUES = dict.fromkeys(("weight_dtype", "grad_dtype", "optimizer.moment_dtype"), "float32") | {"quantize": None}


class EarlierState(NamedTuple):
    """`State` with the field names of earlier versions, which are the keys of their checkpoints."""

    weights: Any
    optimiser: Any
    step: Any


class Checkpoints:
    """The checkpoints of a run, in its folder `checkpoints`, named by the number of steps taken."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp

        self.folder, self._ocp = folder.absolute() / "checkpoints", ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handler = ocp.StandardCheckpointHandler()  # named here so that metadata can be read before the first save
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handler)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Copies the state to host memory and returns; writing continues in the background.

        Raises OSError for the previous save if it failed.
        """
        if step != self.latest:
            with self._explain_errors():
                self._manager.save(step, args=self._ocp.args.StandardSave(state), force=True)

    def restore(self, step: int, like: State) -> State:
        """Returns the state of a step, with the shardings and dtypes of `like` (jax.ShapeDtypeStruct).

        Checkpoints of earlier versions are read too.
        """
        earlier = "optimiser" in self._manager.item_metadata(step).tree
        target = EarlierState(*like) if earlier else like
        return State._make(self._manager.restore(step, args=self._ocp.args.StandardRestore(target)))

    def delete_diverged(self, step: int) -> None:
        """Deletes the checkpoint of a step, if there is an older one to resume from."""
        if step in (steps := self._manager.all_steps()) and min(steps) < step:
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        with self._explain_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._explain_errors():
            self._manager.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Converts disk errors to OSError. The operating system, TensorStore and Orbax raise different types."""
        try:
            yield
        except Exception as error:
            reason = next((text for text in DISK_FULL if text in str(error)), None)
            if reason is None and not isinstance(error, OSError):
                raise
            steps = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
            remaining = f"the checkpoint of step {steps[-1]} is complete" if steps else "there is no earlier one"
            why = f"the disk is full ({reason})" if reason else str(error)
            raise OSError(
                f"a checkpoint could not be saved in {self.folder}: {why}. No older checkpoint is lost: {remaining}. "
                "Free some space and run the same command again to resume"
            ) from error


@contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, and locks its folder against other runs.

    On exit, saves in progress are completed. If the body raises, an error during this completion is added as a note to
    the error of the body.

    Args:
        folder: The run's folder.
        keep: Number of checkpoints to keep.
    """
    with _locked(folder):
        checkpoints = Checkpoints(folder, keep)
        try:
            yield checkpoints
            checkpoints.wait()
        except BaseException as error:
            try:
                checkpoints.close()
            except Exception as other:
                error.add_note(str(other))
            raise
        checkpoints.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises ValueError if another run uses the folder. Each run would delete the incomplete checkpoints of the other,
    which look like those of a crashed run."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)

    def acquire() -> None:
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"another run is using {folder}: wait for it to end, or choose another --out") from None

    distributed.run_on_coordinator(acquire)
    try:
        yield
    finally:
        lock.release()


def check_resume(setup: Setup, latest: int | None) -> list[str]:
    """Writes run.json and contents.json, unless the run has ended. When resuming, first compares the run with those of
    the folder.

    Args:
        setup: The run.
        latest: The step of the folder's newest checkpoint; None without one.

    Returns:
        Notes to log on fields that changed.

    Raises:
        ValueError: A field changed that is not one of MUTABLE_FIELDS.
    """
    run = setup.run
    run.out.mkdir(parents=True, exist_ok=True)
    fields, contents = flatten(to_dict(run)), contents_of(setup)
    changed = distributed.run_on_coordinator(lambda: _changes(run.out, fields, contents)) if latest is not None else {}
    if wrong := [name for name in changed if name not in MUTABLE_FIELDS]:
        if len(wrong) > 1 and CONTENTS in wrong:
            wrong.remove(CONTENTS)  # its digest may differ because of the others
        shown = [f"{name} ({changed[name]}, not {fields[name]})" if name in fields else name for name in wrong]
        if CONTENTS in wrong:
            shown[wrong.index(CONTENTS)] = "training data (other rows, or another tokenizer or way of reading them)"
        made = [f"--{name} {run.out / name}" for name in ("model", "adapter") if (run.out / name).is_dir()]
        hint = f" (to start from the weights of that run: {made[0]})" if made else ""
        raise ValueError(f"{run.out} has a run with other settings: {', '.join(shown)}. Choose another --out{hint}")
    ended = latest == run.steps
    if distributed.is_coordinator() and not ended:
        write_json(run.out / "run.json", to_dict(run))
        write_json(run.out / "contents.json", contents)
    what = "the run has ended, so this has no effect:" if ended else "resuming with another"
    notes = [f"{what} {name}: {fields[name]}" for name in changed if name == "optimizer.lr"]
    if FILES in changed and not ended:
        notes.append("the files of the training data have changed since the run stopped: rows that it has not "
                     "read yet are those of the changed files")  # fmt: skip
    return notes


def _changes(folder: Path, fields: dict[str, Any], contents: dict[str, str]) -> dict[str, Any]:
    """Returns the previous values of fields and digests that differ from the folder's run.json and contents.json.
    A field that is missing in these files is new in this version. It is compared with EARLIER_VALUES, or not at all."""
    changes = {}
    for name, values in (("run.json", fields), ("contents.json", contents)):
        path = folder / name
        if path.exists():
            # ValueError: not JSON; AttributeError: not an object.
            hint = "delete it to resume without this check"
            with explain_errors(f"{path} is damaged", hint, (ValueError, AttributeError)):
                before = {current_name(key): value for key, value in flatten(json.loads(path.read_text())).items()}
            if name == "run.json":
                before = EARLIER_VALUES | before
            changes |= {key: before[key] for key, value in values.items() if key in before and before[key] != value}
    return changes


def contents_of(setup: Setup) -> dict[str, str]:
    """Returns digests of the training data (with tokenizer and options) and of the architecture. Of streamed data, the
    digest has the first rows; that of their files is a second one, which may change."""
    architecture = json.dumps(setup.raw, sort_keys=True)
    contents = {
        CONTENTS: setup.data.digest,
        "architecture": hashlib.blake2b(architecture.encode(), digest_size=16).hexdigest(),
    }
    files = [stream.sources_digest for stream in streams_of(setup.data)]
    return {**contents, FILES: " ".join(files)} if files else contents


def flatten(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Returns {"optimizer.lr": 1} for {"optimizer": {"lr": 1}}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")

"""Checkpoints of a run: Orbax writes them while training goes on, each device its own part.

A checkpoint appears under its number when it is whole; one that was being written when the process died is not there.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.devices import distributed
from jaxlm.training.config import to_dict
from jaxlm.training.setup import Setup

FULL = ("No space left on device", "Disk quota exceeded", "File too large")


class Checkpoints:
    """Those of one run, in its folder `checkpoints`, named by how many steps had been taken."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp

        self.folder, self._ocp = folder.absolute() / "checkpoints", ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The newest whole one; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies the state to host memory and returns; the rest happens beside the next steps. An error of the save
        before is raised here."""
        if step != self.latest:
            with self._explained():
                self._manager.save(step, args=self._ocp.args.StandardSave(state), force=True)

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, in the places and types of `like` (jax.ShapeDtypeStruct with sharding)."""
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))

    def delete_diverged(self, step: int) -> None:
        """Takes a step's checkpoint away if there is an older one to go on from."""
        if step in (steps := self._manager.all_steps()) and min(steps) < step:
            self._manager.delete(step)

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._explained():
            self._manager.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the disk come in many types: from the operating system, from TensorStore, from Orbax."""
        try:
            yield
        except Exception as error:
            reason = next((text for text in FULL if text in str(error)), None)
            if reason is None and not isinstance(error, OSError):
                raise
            steps = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
            kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is no earlier one"
            why = f"the disk is full ({reason})" if reason else str(error)
            raise OSError(
                f"a checkpoint could not be saved in {self.folder}: {why}. Nothing older is lost: {kept}; make room, "
                "and the same command goes on from there"
            ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """ValueError where another run is at work in the folder: each would take the other's half-written checkpoints for
    what a crash has left."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)

    def take() -> None:
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"another run is at work in {folder}: wait for its end, or choose another --out") from None

    distributed.run_on_coordinator(take)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_checkpoints(folder: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of a run, which no other may open meanwhile; on leaving, what is being written is finished. An
    error on the way out of a block that has failed itself is a note to the block's."""
    with _alone(folder):
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


# Names of files may change where their contents do not (contents.json), and so may the rate: it is the way out of a
# loss that is no number.
MUTABLE_FIELDS = (
    "log_every", "save_every", "keep", "eval_every", "eval_batches", "samples", "sample_tokens", "resume", "mesh",
    "out", "report", "shape", "tokenizer", "data.train", "data.valid", "data.on_bad", "optimizer.lr",
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
            # ValueError: no JSON; AttributeError: no names and values.
            with explain_errors(f"{path} is damaged", "delete it to resume unchecked", (ValueError, AttributeError)):
                before = flat(json.loads(path.read_text()))
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
    write_atomically(path, json.dumps(value, indent=2) + "\n")

"""Checkpoints of a run: Orbax writes them while training goes on, each device its own part.

A checkpoint appears under its number when it is whole; one that was being written when the process died is not there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.devices import distributed

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

    def spoiled(self, step: int) -> None:
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

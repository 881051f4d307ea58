"""Resuming from the last checkpoint: bit-exact after an end of any kind, refused in another run's folder."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.training_runs import Stopped, command, lines, run_of, stopping_at

import jaxlm
from jaxlm.cli import main, train
from jaxlm.training import loop, resume
from jaxlm.training.config import Optimizer, Run
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def stopped(files, quick, tmp_path_factory) -> Path:
    """The folder of a run that ended at step 6: its last checkpoint is that of step 5."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        loop.train(run_of(files, out), stopping_at(6))
    return out


@pytest.fixture
def halted(files, stopped, tmp_path) -> Run:
    """The run `stopped`, in a folder of its own."""
    shutil.copytree(stopped, tmp_path / "run")
    return run_of(files, tmp_path / "run")


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("at", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(files, whole, tmp_path, at) -> None:
    """Stopped before the first checkpoint, and after one: metrics and weights are those of the uninterrupted run."""
    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(at))
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_the_run_after_the_current_step(files, whole, tmp_path, number) -> None:
    """The step is saved, and resuming from it is bit-exact."""
    run = run_of(files, tmp_path / "run")

    def log(line: dict[str, Any]) -> None:
        if line == {"step": 7}:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match="step 7") as caught:
        loop.train(run, log)
    assert caught.value.signal == number
    assert signal.getsignal(number) == before
    assert (run.out / "checkpoints/7").is_dir()
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)


def test_an_interrupted_evaluation_is_repeated(files, whole, tmp_path) -> None:
    """If a checkpoint and an evaluation are due at the same step, an end between them loses no metrics."""
    run = run_of(files, tmp_path / "cut", save_every=6)
    broken = pytest.MonkeyPatch()
    broken.setattr(loop.Loop, "evaluate", lambda *_: (_ for _ in ()).throw(Stopped))
    with broken.context(), pytest.raises(Stopped):
        loop.train(run)
    broken.undo()
    loop.train(run)
    assert lines(run.out) == lines(whole)


def test_a_finished_run_may_run_again(files, whole) -> None:
    before = weights(whole), lines(whole)
    loop.train(run_of(files, whole))
    assert (weights(whole), lines(whole)) == before


def test_resume_after_sigkill(files, whole, tmp_path, capsys) -> None:
    """The process dies while it saves and steps. The same command gives the result of the uninterrupted run."""
    out = tmp_path / "run"
    flags = ["train", *command(files, out)]
    line = [sys.executable, "-m", "jaxlm", *flags]
    killed = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for text in killed.stdout:
        if text.startswith("step 6/12 loss"):  # the checkpoint of step 5 may still be in progress
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert main(flags) == 0
    assert str(out / "model") in capsys.readouterr().err
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)


def test_resume_on_another_mesh(halted, whole) -> None:
    """From one device to eight, on both axes. Sums over devices have another order, so that losses agree to float32
    rounding over seven steps, not bit by bit."""
    loop.train(replace(halted, mesh="data=4,model=2"))
    for line, other in zip(lines(halted.out), lines(whole), strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-4)
    ours, theirs = (jaxlm.load(out / "model").weights for out in (halted.out, whole))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_a_full_disk_while_saving(files, whole, tmp_path, monkeypatch, capsys) -> None:
    """The command fails with 1 and names the last complete checkpoint. Resuming from it is bit-exact."""
    out, log = tmp_path / "run", train.Display.log
    flags = ["train", *command(files, out)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == 7:
            while not (out / "checkpoints/5").exists():  # under this name it is complete
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        log(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(train.Display, "log", fill_disk)
        try:
            status = main(flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert status == 1, told
    assert "disk is full" in told
    assert "checkpoint of step 5" in told
    assert "Traceback" not in told
    assert main(flags) == 0
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)


def test_another_run_in_the_folder_is_refused(files, whole) -> None:
    changes = r"optimizer.b1 \(0.9, not 0.8\), batch \(4, not 8\), seed \(0, not 1\).*--model \S*/run/model\)"
    with pytest.raises(ValueError, match=changes):
        loop.train(run_of(files, whole, seed=1, batch=8, optimizer=Optimizer(lr=1e-2, b1=0.8)))
    text = Path(files["train"]).read_text()
    try:
        Path(files["train"]).write_text(text.replace("cat", "bat"))
        with pytest.raises(ValueError, match="settings: training data"):
            loop.train(run_of(files, whole))
    finally:
        Path(files["train"]).write_text(text)
    with pytest.raises(ValueError, match="--resume auto"):
        loop.train(run_of(files, whole, resume="never"))


def test_a_learning_rate_that_was_too_high(halted) -> None:
    """The message names the last checkpoint. The same command with a lower learning rate resumes from it."""
    notes = []
    with pytest.raises(loop.Diverged, match=r"checkpoints/5; .*--optimizer.lr"):
        loop.train(replace(halted, optimizer=Optimizer(lr=1e38)))
    last = loop.train(halted, lambda line: notes.append(line.get("note"))).last
    assert last["step"] == 12
    assert np.isfinite(last["loss"])
    assert any(note and "optimizer.lr: 0.01" in note for note in notes)


def test_a_checkpoint_whose_loss_is_nan_is_deleted(files, tmp_path) -> None:
    """It is saved before the loss of its weights is known. If that is NaN or Inf, the run resumes from the checkpoint
    before it; without one the message says so."""
    often: dict[str, Any] = {"save_every": 1, "keep": 3, "eval_every": 0}
    run = run_of(files, tmp_path / "run", **often)
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(4))
    with pytest.raises(loop.Diverged, match=r"checkpoints/3; .*--optimizer.lr"):
        loop.train(replace(run, optimizer=Optimizer(lr=1e38)))
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["2", "3"]
    assert loop.train(replace(run, save_every=12)).last["step"] == 12
    alone = run_of(files, tmp_path / "alone", optimizer=Optimizer(lr=1e38), **often)
    with pytest.raises(loop.Diverged, match=r"checkpoints/1 .*no older checkpoint"):
        loop.train(alone)


def test_two_runs_in_one_folder(files, whole) -> None:
    with (
        resume.open_checkpoints(whole, 2),
        pytest.raises(ValueError, match="another run"),
    ):
        loop.train(run_of(files, whole))


def test_a_damaged_run_json(files, whole, tmp_path) -> None:
    """run.json that is JSON but no object: the message names the file (metrics.jsonl: test_metrics.py)."""
    shutil.copytree(whole, tmp_path / "run")
    run = run_of(files, tmp_path / "run")
    (run.out / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        loop.train(run)


class EarlierState(NamedTuple):
    """The training state with the field names of earlier versions, which are the keys of their checkpoints."""

    weights: Any
    optimiser: Any
    step: Any


def rewrite_as_earlier(out: Path, run: Any) -> None:
    """Rewrites a run's folder as an earlier version wrote it: keys of its checkpoint, run.json and metrics.jsonl."""
    like = set_up(run).state
    with resume.open_checkpoints(out, 2) as checkpoints:
        step = checkpoints.latest
        assert step is not None
        state = checkpoints.restore(step, like)
    shutil.rmtree(out / "checkpoints")
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        manager.save(step, args=ocp.args.StandardSave(EarlierState(*state)))
    record = json.loads((out / "run.json").read_text())
    record["optimiser"] = record.pop("optimizer")
    record["data"]["form"], record["data"]["learn"] = record["data"].pop("format"), record["data"].pop("train_on")
    (out / "run.json").write_text(json.dumps(record))
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text.replace("grad_norm", "gradient").replace("learning_rate", "rate"))


def test_the_folder_of_an_earlier_version_resumes(halted, whole) -> None:
    """It names some fields otherwise. Metrics and weights are those of an uninterrupted run."""
    out = halted.out
    rewrite_as_earlier(out, halted)
    assert "optimiser" in (out / "checkpoints/5/default/_METADATA").read_text()
    with pytest.raises(ValueError, match=r"optimizer\.b1"):
        loop.train(replace(halted, optimizer=Optimizer(lr=1e-2, b1=0.8)))
    loop.train(halted)
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)
    assert "optimizer" in json.loads((out / "run.json").read_text())


@pytest.mark.slow
def test_activation_checkpointing_may_change(files, whole, tmp_path) -> None:
    """For a run that is out of memory, and for runs of versions with another default. Only rounding differs."""
    run = run_of(files, tmp_path / "run", remat="none")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    loop.train(replace(run, remat="full"))
    ours, theirs = ([line["loss"] for line in lines(out) if "loss" in line] for out in (run.out, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)

"""A run resumes from its last checkpoint after an end of any kind, bit for bit, and refuses another run's folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.training_runs import Stopped, command, lines, run_of, stopping_at

import jaxlm
from jaxlm.cli import main
from jaxlm.training import loop, resume
from jaxlm.training.config import Optimizer
from jaxlm.training.setup import set_up


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("at", [4, 10])
def test_a_run_that_ended_in_the_middle_goes_on_bit_by_bit(files, whole, tmp_path, at) -> None:
    """Before the first checkpoint, and after one: the lines and the weights are those of the undisturbed run."""

    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(at))
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end(files, whole, tmp_path, number) -> None:
    """It ends after the step under way with a checkpoint of it, and goes on from there bit by bit."""
    run = run_of(files, tmp_path / "run")

    def tell(line: dict[str, Any]) -> None:
        if line == {"step": 7}:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(loop.Ended, match="ended after step 7, which is saved: the same command goes on") as caught:
        loop.train(run, tell)
    assert caught.value.signal == number
    assert signal.getsignal(number) == before
    assert (run.out / "checkpoints/7").is_dir()
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)


def test_an_evaluation_that_was_cut_off_is_made_up_for(files, tmp_path) -> None:
    """Where a checkpoint and an evaluation fall on one step, an end between them loses no line."""
    fields = {"save_every": 6, "eval_every": 6}
    loop.train(run_of(files, tmp_path / "whole", **fields))
    run = run_of(files, tmp_path / "cut", **fields)
    broken = pytest.MonkeyPatch()
    broken.setattr(loop.Loop, "evaluate", lambda *_: (_ for _ in ()).throw(Stopped))
    with broken.context(), pytest.raises(Stopped):
        loop.train(run)
    broken.undo()
    loop.train(run)
    assert lines(run.out) == lines(tmp_path / "whole")


def test_a_finished_run_says_the_same_again(files, whole) -> None:
    before = weights(whole), lines(whole)
    loop.train(run_of(files, whole))
    assert (weights(whole), lines(whole)) == before


def test_sigkill_at_any_moment(files, whole, tmp_path) -> None:
    """The process dies while it saves and steps; the same command ends where the undisturbed run did."""
    out = tmp_path / "run"
    line = [sys.executable, "-m", "jaxlm", "train", *command(files, out)]
    killed = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert killed.stdout is not None
    for said in killed.stdout:
        if said.startswith("step 6/12 loss"):  # the checkpoint of step 5 may still be on its way
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"the model is in {out / 'model'}" in done.stderr
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)


def test_a_run_goes_on_over_a_mesh(files, whole, tmp_path) -> None:
    """From one device to eight, on both axes: sums over devices are made in another order, so the losses agree to
    float32's rounding over seven steps, not bit by bit."""
    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    loop.train(replace(run, mesh="data=4,model=2"))
    for line, other in zip(lines(run.out), lines(whole), strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-4)
    ours, theirs = (jaxlm.load(out / "model").weights for out in (run.out, whole))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


FULL = """
import pathlib, resource, sys, time
from jaxlm.cli import main, train
log = train.Display.log
def then_full(self, line):
    if line["step"] == 7:
        while not pathlib.Path(sys.argv[-1], "checkpoints/5").exists():  # under this name it is whole
            time.sleep(0.05)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    log(self, line)
train.Display.log = then_full
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_disk_that_is_full_while_saving(files, whole, tmp_path) -> None:
    """The run ends with 1 and says what is whole; with room it goes on to the same end."""
    out = tmp_path / "run"
    flags = command(files, out)
    full = subprocess.run([sys.executable, "-c", FULL, *flags], capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert "a checkpoint could not be saved" in full.stderr
    assert "Nothing older is lost: the checkpoint of step 5 is whole" in full.stderr
    assert "Traceback" not in full.stderr, full.stderr
    assert main(["train", *flags]) == 0
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)


def test_another_run_in_the_folder_is_refused(files, whole) -> None:
    with pytest.raises(
        ValueError, match=r"another optimizer.b1 \(0.9, not 0.8\), batch \(4, not 8\), seed \(0, not 1\): choose"
    ):
        loop.train(run_of(files, whole, seed=1, batch=8, optimizer=Optimizer(lr=1e-2, b1=0.8)))
    text = Path(files["train"]).read_text()
    try:
        Path(files["train"]).write_text(text.replace("cat", "bat"))
        with pytest.raises(ValueError, match=r"another data \(contents\): choose another --out"):
            loop.train(run_of(files, whole))
    finally:
        Path(files["train"]).write_text(text)
    with pytest.raises(ValueError, match="holds a run already: --resume auto goes on with it"):
        loop.train(run_of(files, whole, resume="never"))


def test_a_rate_that_was_too_high(files, tmp_path) -> None:
    """With a checkpoint before it the message names that, and the same command with a lower rate goes on."""
    run, notes = run_of(files, tmp_path / "run"), []
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    wild = replace(run, optimizer=Optimizer(lr=1e38))
    with pytest.raises(loop.Diverged, match=r"the last checkpoint is .*checkpoints/5; with a lower --optimizer.lr"):
        loop.train(wild)
    calm = replace(run, optimizer=Optimizer(lr=1e-3))
    last = loop.train(calm, lambda line: notes.append(line.get("note"))).last
    assert last["step"] == 12
    assert np.isfinite(last["loss"])
    assert "goes on with another optimizer.lr: 0.001" in notes


def test_weights_that_a_step_ruined_are_not_gone_on_from(files, tmp_path) -> None:
    """A checkpoint is taken before the loss of its weights is known: where that is no number, the one before it counts,
    and where there is none the message says so."""
    calm, wild = (Optimizer(lr=lr, warmup=0, clip=0.0) for lr in (1e-3, 1e38))
    often: dict[str, Any] = {"save_every": 1, "keep": 3, "eval_every": 0}
    run = run_of(files, tmp_path / "run", optimizer=calm, **often)
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(4))
    with pytest.raises(loop.Diverged, match=r"the last checkpoint is .*checkpoints/3; with a lower --optimizer.lr"):
        loop.train(replace(run, optimizer=wild))
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["2", "3"]
    assert loop.train(run).last["step"] == 12
    alone = run_of(files, tmp_path / "alone", optimizer=wild, **often)
    with pytest.raises(loop.Diverged, match=r"checkpoints/1 holds the weights that gave it, and there is no older"):
        loop.train(alone)


def test_two_runs_in_one_folder(files, whole) -> None:
    with (
        resume.open_checkpoints(whole, 2),
        pytest.raises(ValueError, match=r"another run is at work in .*: wait for its end"),
    ):
        loop.train(run_of(files, whole))


def test_files_of_a_run_that_are_damaged(files, whole, tmp_path) -> None:
    """run.json that is JSON and no record: the message names the file (metrics.jsonl: test_metrics.py)."""
    shutil.copytree(whole, tmp_path / "run")
    run = run_of(files, tmp_path / "run")
    (run.out / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run.json is damaged: take it away"):
        loop.train(run)


class OldState(NamedTuple):
    """The training state with the field names of an earlier version, which are the keys of its checkpoints."""

    weights: Any
    optimiser: Any
    step: Any


def rewrite_as_older(out: Path, run: Any) -> None:
    """Rewrites a run's folder as an earlier version wrote it: the keys of its checkpoint and of run.json."""
    like = set_up(run).state_like()
    with resume.open_checkpoints(out, 2) as checkpoints:
        step = checkpoints.latest
        assert step is not None
        state = checkpoints.restore(step, like)
    shutil.rmtree(out / "checkpoints")
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        manager.save(step, args=ocp.args.StandardSave(OldState(*state)))
    record = json.loads((out / "run.json").read_text())
    record["optimiser"] = record.pop("optimizer")
    record["data"]["form"], record["data"]["learn"] = record["data"].pop("format"), record["data"].pop("train_on")
    (out / "run.json").write_text(json.dumps(record))


def test_the_folder_of_an_earlier_version_resumes(files, whole, tmp_path) -> None:
    """Its checkpoint and run.json have other names for some fields. The weights are those of an undisturbed run."""
    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(6))
    rewrite_as_older(run.out, run)
    assert "optimiser" in (run.out / "checkpoints/5/default/_METADATA").read_text()
    with pytest.raises(ValueError, match=r"optimizer\.b1"):
        loop.train(replace(run, optimizer=Optimizer(lr=1e-2, b1=0.8)))
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)
    assert "optimizer" in json.loads((run.out / "run.json").read_text())

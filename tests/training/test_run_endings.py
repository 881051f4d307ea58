"""What a run keeps when it ends early or is run again, what its lines of metrics say, and how often it compiles."""

import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers.training_runs import lines, run_of

from jaxlm.training import loaders, loop
from jaxlm.training.config import Data, LoraOptions, Optimizer
from jaxlm.training.metrics import Interval, MetricsFile
from jaxlm.training.setup import set_up
from jaxlm.training.signals import stop_signals

pytestmark = pytest.mark.usefixtures("quick")


class Broken(Exception):
    """Raised by a callback."""


def breaking_at(step: int) -> Any:
    def log(line: dict[str, Any]) -> None:
        if line["step"] == step and "note" not in line:
            raise Broken

    return log


def test_an_exception_in_the_callback_loses_no_step(files, whole, tmp_path):
    """Neither between two checkpoints, nor in the middle of the interval of a line of metrics."""
    run = run_of(files, tmp_path / "run")
    with pytest.raises(Broken) as error:
        loop.train(run, breaking_at(3))
    assert "step 3 was saved" in error.value.__notes__[0]
    assert (run.out / "checkpoints/3").is_dir()
    seen = []
    loop.train(run, seen.append)
    assert any("resuming after step 3" in line.get("note", "") for line in seen)
    assert lines(run.out) == lines(whole)


def test_a_second_signal_interrupts_whatever_is_raised_in_its_place():
    """numpy raises a ValueError in place of a KeyboardInterrupt while it converts a value."""

    def interrupted(times: int) -> None:
        with stop_signals() as received:
            try:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("setting an array element with a sequence") from None
            raise ValueError(f"the file is damaged, and {received(1)} was received")

    with pytest.raises(ValueError, match=f"damaged, and {int(signal.SIGINT)}"):
        interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)


def test_a_second_signal_says_what_is_kept(files, tmp_path):
    def interrupting(line: dict[str, Any]) -> None:
        if line == {"step": 8}:
            raise KeyboardInterrupt

    with pytest.raises(loop.Interrupted, match="during step 8; the last checkpoint is that of step 6: run the same"):
        loop.train(run_of(files, tmp_path / "run", save_every=3), interrupting)
    assert (tmp_path / "run/checkpoints/6").is_dir()


def test_a_batch_of_more_than_an_epoch_is_told(files, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "the", "completion": "cat"}\n' * 20)
    data = Data((str(path),), (files["valid"],))

    def lines_of(data):
        setup = set_up(run_of(files, tmp_path / "run", data=data, steps=3, batch=8, length=60))
        return loaders.describe(setup.run, setup.data)

    assert "of 60 tokens, and a batch 8: each step" in lines_of(data)[1]
    for enough in (replace(data, packing="none"), Data((str(path),), (files["valid"],), streaming=True)):
        assert len(lines_of(enough)) == 1


def test_an_ended_run_is_not_changed_by_running_it_again(files, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    seen = []
    loop.train(replace(run_of(files, whole), optimizer=Optimizer(lr=0.5)), seen.append)
    notes = " ".join(line.get("note", "") for line in seen)
    assert "all steps are done" in notes
    assert "MFU" not in notes
    assert "no effect: optimizer.lr: 0.5" in notes
    for name in ("run.json", "contents.json"):
        assert (whole / name).read_bytes() == before[name]


def test_the_loss_of_a_line_is_the_mean_since_the_last(files, whole, tmp_path):
    each = run_of(files, tmp_path / "each", log_every=1, save_every=100)
    loop.train(each)
    of_step = {line["step"]: line for line in lines(each.out) if "loss" in line}
    assert [line["loss"] for line in of_step.values()] == [line["batch_loss"] for line in of_step.values()]
    for line in (line for line in lines(whole) if "loss" in line):
        pair = [of_step[line["step"] - 1], of_step[line["step"]]]
        tokens = [one["tokens"] for one in pair]
        assert line["batch_loss"] == pair[1]["loss"]
        np.testing.assert_allclose(line["loss"], np.average([one["loss"] for one in pair], weights=tokens), rtol=1e-6)


def test_the_interval_is_that_of_its_checkpoint(tmp_path):
    interval = Interval(tmp_path)
    interval.add(2.0, 10.0)
    interval.add(4.0, 30.0)
    interval.save(7)
    assert interval.end() == 3.5
    assert interval.end() is None
    assert Interval(tmp_path, 7).end() == 3.5
    assert Interval(tmp_path, 6).end() is None
    assert Interval(tmp_path).end() is None
    (tmp_path / "interval.json").write_text("{")
    with pytest.raises(ValueError, match=r"interval\.json is damaged"):
        Interval(tmp_path, 7)


def test_a_line_without_a_loss_is_kept_when_the_run_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 8, "loss": 1.0}, {"step": 10, "grad_norm": 0.0, "tokens": 0.0}, {"step": 10, "valid_loss": 2.0},
            {"step": 12, "loss": 3.0}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert MetricsFile(path, 10).kept == rows[:2]


@pytest.fixture
def a_loop(files, tmp_path):
    """Returns a Loop whose metrics can be given."""
    made = loop.Loop(set_up(run_of(files, tmp_path / "run")), None, None, lambda line: None)
    made.setup.run.out.mkdir(parents=True, exist_ok=True)
    made.start(0)
    return made


def test_a_step_without_a_token_in_the_loss_has_no_loss(a_loop):
    a_loop.settle((1, SimpleNamespace(loss=-0.0, grad_norm=0.0, tokens=0.0)))
    a_loop.count(1)
    a_loop.log_step(1, SimpleNamespace(loss=-0.0, grad_norm=0.0, tokens=0.0))
    assert not {"loss", "batch_loss"} & a_loop.last.keys()
    assert a_loop.last["loss_tokens_per_second"] == 0 < a_loop.last["tokens_per_second"]


def test_a_run_that_learns_nothing_is_told_once(a_loop):
    chance, seen = math.log(a_loop.setup.config.V), []
    a_loop.log = seen.append

    def log(steps: int, loss: float, norm: float) -> list[str]:
        seen.clear()
        for step in range(2, steps, 2):
            values = SimpleNamespace(loss=loss, grad_norm=norm, tokens=5.0)
            a_loop.settle((step + 1000 * len(seen), values))
            a_loop.settled = -1
            a_loop.log_step(step, values)
        return [line["note"] for line in seen if "note" in line]

    assert log(300, chance - 0.1, 1.0) == []
    assert log(150, chance + 0.1, 1.0) == []
    assert log(150, chance - 0.1, 1.0) == []  # it recovered
    [told] = log(600, chance + 0.1, 1.0)
    assert "uniform guess" in told
    assert "learning rate" in told
    a_loop.warned, a_loop.chance_steps = False, 0
    [told] = log(600, chance - 0.1, 0.0)
    assert "gradient has been 0" in told


def test_a_faster_step_raises_the_peak(a_loop):
    a_loop.peak = 1.0
    a_loop.settle((1, SimpleNamespace(loss=1.0, grad_norm=1.0, tokens=5.0)))
    a_loop.count(1)
    a_loop.log_step(1, SimpleNamespace(loss=1.0, grad_norm=1.0, tokens=5.0))
    assert a_loop.last["mfu"] == 1
    assert a_loop.peak > 1


def test_the_step_of_an_adapter_is_compiled_once(files, tmp_path, monkeypatch):
    """The first state is committed to its device, as those that the step returns are."""
    run = run_of(files, tmp_path / "run", shape=None, tokenizer=None, model=files["tokenizer"], method="lora",
                 lora=LoraOptions(rank=2), steps=3, save_every=100, eval_every=0)  # fmt: skip
    loops: list[Any] = []
    make = loop.Loop.__init__
    monkeypatch.setattr(loop.Loop, "__init__", lambda self, *args: (loops.append(self), make(self, *args))[1])
    loop.train(run)
    assert loops[0].step._cache_size() == 1
    assert json.loads((run.out / "run.json").read_text())["steps"] == 3
    assert all(leaf.committed for leaf in jax.tree.leaves(loop.init_state(loops[0].setup)))

"""A training run from begin to end: what it writes, how it goes on after an end of any kind, and its messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.training_runs import Stopped, lines, made, run_of, stopping_at

import jaxlm
from jaxlm.cli import main
from jaxlm.training import dry_run, loop, resume
from jaxlm.training.config import Data, Optimizer, Run
from jaxlm.training.setup import set_up


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared) -> dict[str, str]:
    return made(tmp_path_factory.mktemp("files"), shared)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    loop.train(run_of(files, out))
    return out


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


def test_what_a_run_leaves(whole) -> None:
    found = lines(whole)
    assert [line["step"] for line in found] == [2, 4, 6, 6, 8, 10, 12, 12]
    assert [line["step"] for line in found if "valid_loss" in line] == [6, 12]
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] - 1
    assert found[-1]["valid_loss"] < found[3]["valid_loss"]
    assert json.loads((whole / "run.json").read_text())["optimizer"]["lr"] == 1e-2
    model = jaxlm.load(whole / "model")
    assert model.tokenizer is not None
    assert len(jaxlm.generate(model, "the cat", max_tokens=4, temperature=0).tokens) > 0


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


def test_the_command_says_why_it_ended(monkeypatch, capsys) -> None:
    def ends(self: Any) -> int:
        raise loop.Ended("ended after step 7, which is saved", signal.SIGTERM)

    monkeypatch.setattr("jaxlm.cli.train.Train.run", ends)
    assert main(["train"]) == 143
    assert capsys.readouterr().err.strip() == "ended after step 7, which is saved"


def test_a_new_model_ends_with_its_tokenizers_token(files, whole, tmp_path) -> None:
    """Whatever ids its shape had, which may be another model's."""
    shape = json.loads(Path(files["shape"]).read_text()) | {"bos_token_id": 7, "eos_token_id": 9}
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text(json.dumps(shape))
    setup = set_up(run_of({**files, "shape": str(tmp_path / "shape")}, tmp_path / "run"))
    assert (setup.raw["bos_token_id"], setup.raw["eos_token_id"]) == (1, 2)
    told = json.loads((whole / "model/generation_config.json").read_text())
    assert (told["eos_token_id"], told["do_sample"]) == (2, True)
    assert json.loads((whole / "model/config.json").read_text())["eos_token_id"] == 2


def test_an_example_shows_what_is_learned(files, tmp_path) -> None:
    """The part of a long row around its first learned token, and the token that ends the answer."""
    rows = [{"question": "the cat sat " * 40 + "home?", "answer": "the dog ran"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    data = Data((str(tmp_path / "data.jsonl"),), packing="none")
    setup = set_up(run_of(files, tmp_path / "run", data=data, length=800))
    [pieces] = dry_run.examples(setup, 1, tokens=60)
    assert pieces[0] == ("… ", False)
    learned = "".join(text for text, learned in pieces if learned)
    assert "the dog ran" in learned
    assert learned.endswith("</s>")
    assert "cat" in "".join(text for text, learned in pieces if not learned)


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


def test_the_resolved_configuration_is_a_configuration(files, whole) -> None:
    """run.json is a file that -c takes, booleans too, and says the same run."""
    from jaxlm import cli

    run = cli.parse(["train", "-c", str(whole / "run.json")])
    assert {field.name: getattr(run, field.name) for field in fields(Run)} == {
        field.name: getattr(replace(run_of(files, whole), dtype="float32", log_every=2), field.name)
        for field in fields(Run)
    }
    path = whole.parent / "lora.yaml"
    path.write_text("lora: {rslora: true}\nmodel: x\n")
    assert cli.parse(["finetune", "-c", str(path)]).lora.rslora
    path.write_text("lora: {rslora: false}\nmodel: x\n")
    assert not cli.parse(["finetune", "-c", str(path)]).lora.rslora


def test_a_finished_run_says_the_same_again(files, whole) -> None:
    before = weights(whole), lines(whole)
    loop.train(run_of(files, whole))
    assert (weights(whole), lines(whole)) == before


def command(files: dict[str, str], out: Path) -> list[str]:
    """`run_of` as flags."""
    return ["--shape", files["shape"], "--tokenizer", files["tokenizer"], "--data.train", files["train"],
            "--data.valid", files["valid"], "--optimizer.lr", "0.01", "--steps", "12", "--batch", "4", "--length", "32",
            "--log-every", "2", "--save-every", "5", "--eval-every", "6", "--eval-batches", "2",
            "--out", str(out)]  # fmt: skip


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
tell = train.Display.tell
def then_full(self, line):
    if line["step"] == 7:
        while not pathlib.Path(sys.argv[-1], "checkpoints/5").exists():  # under this name it is whole
            time.sleep(0.05)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    tell(self, line)
train.Display.tell = then_full
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


def test_a_loss_that_is_no_number_ends_the_run(files, tmp_path) -> None:
    run = run_of(files, tmp_path / "run", optimizer=Optimizer(lr=1e38, clip=0.0, warmup=6, schedule="linear"))
    with pytest.raises(loop.Diverged, match=r"the loss of step \d+ is .*, the norm of its gradient nan: ") as caught:
        loop.train(run)
    assert "there is no checkpoint yet; lower the learning rate" in str(caught.value)
    done = loop.train(run_of(files, run.out))  # nothing stands in the way of a better rate
    assert done.last["step"] == 12


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


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(files, tmp_path) -> None:
    def refused(error: Any, message: str, **fields: Any) -> None:
        with pytest.raises(error, match=message):
            loop.train(run_of(files, tmp_path / "run", **fields))
        assert not (tmp_path / "run/checkpoints").exists()

    optimizer = Optimizer(schedule="wsd", warmup=8, decay=0.5)
    refused(ValueError, r"warm-up \(8 steps\) and decay \(6\) leave nothing of 12 steps", optimizer=optimizer)
    refused(ValueError, "the prompt is empty", samples=("",))
    refused(ValueError, "the prompt has .* tokens, the context of .*: shorten it", samples=("cat " * 40_000,))
    with pytest.MonkeyPatch.context() as absent:
        absent.setitem(sys.modules, "wandb", None)
        refused(ValueError, r"pip install 'jaxlm\[wandb\]'", report=("wandb",))
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/diary.txt").write_text("dear")
    refused(FileExistsError, "is in use and not a checkpoint, it holds .*diary.txt.: choose another folder")


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
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        loop.train(run)


def test_validation_in_which_nothing_is_learned(files, whole, tmp_path) -> None:
    """Its first batches are a long prompt: there is no loss of them to tell, and the run goes on."""
    rows = [{"prompt": "the cat " * 60, "completion": " sat"}]
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data((files["train"],), (str(tmp_path / "valid.jsonl"),), packing="split")
    run = run_of(files, tmp_path / "run", data=data, steps=2, batch=1, length=16, eval_batches=1, eval_every=1)
    loop.train(run)
    assert [line["step"] for line in lines(run.out) if "valid_loss" in line] == [2]


def test_samples_have_as_much_room_as_there_is(files, tmp_path) -> None:
    shape = json.loads(Path(files["shape"]).read_text()) | {"max_position_embeddings": 32}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    run = run_of({**files, "shape": str(tmp_path / "shape.json")}, tmp_path / "run", steps=1, samples=("the cat",))
    done = loop.train(run)
    assert done.last["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a checkpoint (--model) or a config.json for random weights (--shape)"),
        (["--model", "x"], "name what to learn from: --data.train FILES"),
        (["--model", "x", "--data.train", "y", "--save-every", "0"], "save_every is 0, but must be at least 1"),
        (["--model", "x", "--data.train", "y", "--steps", "-1"], "steps is -1, but must not be below 0"),
        (["--model", "x", "--data.train", "y", "--sample-tokens", "0"], "sample_tokens is 0, but must be at least 1"),
        (["--model", "x", "--data.train", "y", "--seed", "4294967296"], "seed is 4294967296, but must be from 0 to"),
        (["--model", "x", "--data.train", "y", "--optimizer.b1", "1"], "optimizer.b1 is 1.0, but must be from 0 to"),
        (["--shape", "x", "--data.train", "y", "--method", "lora"], "LoRA adapts a checkpoint: name it (--model)"),
        (["--model", "x", "--data.train", "y", "--adapter", "z"], "an adapter goes on with --method lora"),
        (
            ["--model", "x", "--data.train", "y", "--batch", "3", "--accumulate", "2"],
            "batch 3 cannot be cut into 2 equal",
        ),
    ],
)
def test_runs_that_cannot_be(flags, message, capsys) -> None:
    assert main(["train", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_flags(tmp_path, capsys) -> None:
    """What stands in the file counts unless a flag says otherwise."""
    from jaxlm import cli

    path = tmp_path / "run.yaml"
    path.write_text(
        "shape: a.json\nsteps: 7\nbatch: 16\noptimiser: {name: muon, lr: 0.02}\ndata: {train: [x.txt, y.txt]}\n"
    )
    run = cli.parse(["train", "-c", str(path), "--batch", "8", "--data.train", "z.txt"])
    assert (run.steps, run.batch, run.optimizer.name, run.optimizer.lr) == (7, 8, "muon", 0.02)
    assert (run.shape, run.data.train) == (Path("a.json"), ("z.txt",))
    for text, message in (("stepps: 7\n", "--stepps"), ("- 7\n", "should hold fields"), ("a: [", "cannot be read")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            cli.parse(["train", "-c", str(path)])
        assert message in capsys.readouterr().err


def test_a_hub_dataset_by_name(files, monkeypatch, tmp_path) -> None:
    """`--dataset wikitext` is learned from; for the validation of a name its own split is asked for."""
    from jaxlm import cli
    from jaxlm.data import corpus
    from jaxlm.training import setup

    asked = []

    def prepare(names, *rest, split, config, revision, **more):
        asked.append((names, split, config, revision))
        return theirs((files["train"],), *rest, split="train", **more)

    theirs = corpus.prepare
    monkeypatch.setattr(corpus, "prepare", prepare)
    flags = ["--shape", files["shape"], "--tokenizer", files["tokenizer"], "--data.config", "small"]
    run = cli.parse(["train", *flags, "--dataset", "wikitext", "--data.valid", "wikitext", "--data.revision", "abc"])
    assert setup.set_up(run).run.steps == 1000
    assert list(dict.fromkeys(asked)) == [
        (("wikitext",), "train", "small", "abc"),
        (("wikitext",), "validation", "small", "abc"),
    ]


def test_what_was_dropped_is_told(files, tmp_path, capsys) -> None:
    """Rows that cannot be used end the run with file and line, or are counted."""
    told: list[str] = []

    def first(line: dict[str, Any]) -> None:
        told.append(line["note"])
        raise Stopped

    bad = tmp_path / "bad.jsonl"
    rows = [{"text": "the cat sat home"}, {"txt": "no"}, {"text": "the dog ran home"}] * 4
    bad.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = command({**files, "train": str(bad)}, tmp_path / "run")
    assert main(["train", *flags]) == 1
    assert f"{bad}:2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(Stopped):
        loop.train(run_of({**files, "train": str(bad)}, tmp_path / "run", data=Data((str(bad),), on_bad="skip")), first)
    assert "8 documents (text)" in told[0]
    assert "dropped: 4 " in told[0]

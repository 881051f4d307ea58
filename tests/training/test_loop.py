"""A training run from begin to end: what it writes, how it goes on after an end of any kind, and its messages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings.tiny import SIZES

import jaxlm
from jaxlm.cli import main
from jaxlm.training import loop
from jaxlm.training.config import Data, Optimiser, Run

SHAPE = {"model_type": "llama", **SIZES, "vocab_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared) -> dict[str, str]:
    """A config.json, a tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "ran", "home", "and", "a", "big", "red"]
    for name in ("train", "valid"):
        stories = [" ".join(rng.choice(words, 30)) for _ in range(40)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    return {"shape": str(folder / "shape.json"), "tokenizer": str(shared / "checkpoints/stories260K"),
            "train": str(folder / "train.txt"), "valid": str(folder / "valid.txt")}  # fmt: skip


def run_of(files: dict[str, str], out: Path, **fields: Any) -> Run:
    data = Data(train=(files["train"],), valid=(files["valid"],))
    sizes: dict[str, Any] = {"steps": 12, "batch": 4, "length": 32, "log_every": 2, "save_every": 5, "eval_every": 6}
    given = {"shape": Path(files["shape"]), "tokenizer": Path(files["tokenizer"]), "data": data, **sizes}
    return Run(out=out, **{**given, "optimiser": Optimiser(lr=1e-2), "eval_batches": 2, **fields})


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("tokens_per_second", "mfu")} for line in found]


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
    assert json.loads((whole / "run.json").read_text())["optimiser"]["lr"] == 1e-2
    model = jaxlm.load(whole / "model")
    assert model.tokenizer is not None
    assert len(jaxlm.generate(model, "the cat", max_tokens=4, temperature=0).tokens) > 0


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [4, 10])
def test_a_run_that_ended_in_the_middle_goes_on_bit_by_bit(files, whole, tmp_path, at) -> None:
    """Before the first checkpoint, and after one: the lines and the weights are those of the undisturbed run."""

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == at:
            raise Stopped

    run = run_of(files, tmp_path / "run")
    with pytest.raises(Stopped):
        loop.train(run, stop)
    loop.train(run)
    assert lines(run.out) == lines(whole)
    assert weights(run.out) == weights(whole)


def test_a_finished_run_says_the_same_again(files, whole) -> None:
    before = weights(whole), lines(whole)
    loop.train(run_of(files, whole))
    assert (weights(whole), lines(whole)) == before


def test_sigkill_at_any_moment(files, whole, tmp_path) -> None:
    """The process dies while it saves and steps; the same command ends where the undisturbed run did."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jaxlm", "train", "--shape", files["shape"], "--tokenizer", files["tokenizer"],
               "--data.train", files["train"], "--data.valid", files["valid"], "--optimiser.lr", "0.01",
               "--steps", "12", "--batch", "4", "--length", "32", "--log-every", "2", "--save-every", "5",
               "--eval-every", "6", "--eval-batches", "2", "--out", str(out)]  # fmt: skip
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("step 6/12 loss"):  # the checkpoint of step 5 may still be on its way
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"the model is in {out / 'model'}" in done.stderr
    assert lines(out) == lines(whole)
    assert weights(out) == weights(whole)


def test_another_run_in_the_folder_is_refused(files, whole) -> None:
    with pytest.raises(ValueError, match="holds a run with another batch, seed: choose another --out"):
        loop.train(run_of(files, whole, seed=1, batch=8))
    with pytest.raises(ValueError, match="holds a run already: --resume auto goes on with it"):
        loop.train(run_of(files, whole, resume="never"))


def test_a_loss_that_is_no_number_ends_the_run(files, tmp_path) -> None:
    run = run_of(files, tmp_path / "run", optimiser=Optimiser(lr=1e38, clip=0.0, warmup=6, schedule="linear"))
    with pytest.raises(loop.Diverged, match=r"the loss of step \d+ is .*, the norm of its gradient nan: ") as caught:
        loop.train(run)
    assert "there is no checkpoint yet; lower the learning rate" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a checkpoint (--model) or a config.json for random weights (--shape)"),
        (["--model", "x"], "name what to learn from: --data.train FILES"),
        (["--model", "x", "--data.train", "y", "--steps", "0"], "steps is 0, but must be at least 1"),
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
    assert (run.steps, run.batch, run.optimiser.name, run.optimiser.lr) == (7, 8, "muon", 0.02)
    assert (run.shape, run.data.train) == (Path("a.json"), ("z.txt",))
    for text, message in (("stepps: 7\n", "--stepps"), ("- 7\n", "should hold fields"), ("a: [", "cannot be read")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            cli.parse(["train", "-c", str(path)])
        assert message in capsys.readouterr().err

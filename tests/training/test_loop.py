"""A training run from start to finish: what it writes, and its messages. Resuming: test_resume.py."""

import json
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.training_runs import Stopped, command, lines, run_of

import jaxlm
from jaxlm.cli import main
from jaxlm.training import dry_run, loop
from jaxlm.training.config import Data, Optimizer, Run
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")


def test_the_files_of_a_run(whole) -> None:
    found = lines(whole)
    assert [line["step"] for line in found] == [2, 4, 6, 6, 8, 10, 12, 12]
    assert [line["step"] for line in found if "valid_loss" in line] == [6, 12]
    losses = [line["loss"] for line in found if "loss" in line]
    assert losses[-1] < losses[0] - 1
    assert found[-1]["valid_loss"] < found[3]["valid_loss"]
    assert {"learning_rate", "grad_norm"} <= found[0].keys()
    assert json.loads((whole / "run.json").read_text())["optimizer"]["lr"] == 1e-2
    assert (whole / "loss.png").is_file()
    model = jaxlm.load(whole / "model")
    assert model.tokenizer is not None
    assert len(jaxlm.generate(model, "the cat", max_tokens=4, temperature=0).tokens) > 0


def test_jaxlm_train_is_imported_on_access() -> None:
    assert jaxlm.train is loop.train
    assert "train" in dir(jaxlm)
    code = "import sys, jaxlm; assert not sys.modules.keys() & {'jax', 'optax', 'jaxlm.training'}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_prints_why_it_was_interrupted(monkeypatch, capsys) -> None:
    def interrupted(self: Any) -> int:
        raise loop.Interrupted("stopped after step 7", signal.SIGTERM)

    monkeypatch.setattr("jaxlm.cli.train.Train.run", interrupted)
    assert main(["train"]) == 143
    assert capsys.readouterr().err.strip() == "stopped after step 7"


def test_a_new_model_has_the_special_tokens_of_its_tokenizer(files, whole, tmp_path) -> None:
    """Whatever ids --shape has, which may be another model's."""
    shape = json.loads(Path(files["shape"]).read_text()) | {"bos_token_id": 7, "eos_token_id": 9}
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text(json.dumps(shape))
    setup = set_up(run_of({**files, "shape": str(tmp_path / "shape")}, tmp_path / "run"))
    assert (setup.raw["bos_token_id"], setup.raw["eos_token_id"]) == (1, 2)
    config = json.loads((whole / "model/generation_config.json").read_text())
    assert (config["eos_token_id"], config["do_sample"]) == (2, True)
    assert json.loads((whole / "model/config.json").read_text())["eos_token_id"] == 2


def test_an_example_shows_the_loss_mask(files, tmp_path) -> None:
    """Of a long row, the part around its first token in the loss mask, and the token that ends the answer."""
    rows = [{"question": "the cat sat " * 40 + "home?", "answer": "the dog ran"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    data = Data((str(tmp_path / "data.jsonl"),), packing="none")
    setup = set_up(run_of(files, tmp_path / "run", data=data, length=800))
    [pieces] = dry_run.examples(setup, 1, tokens=60)
    assert pieces[0] == ("… ", False)
    trained_on, rest = ("".join(text for text, flag in pieces if flag == wanted) for wanted in (True, False))
    assert "the dog ran" in trained_on
    assert trained_on.endswith("</s>")
    assert "cat" in rest


def test_run_json_is_a_configuration_file(files, whole) -> None:
    """-c run.json gives the same run, booleans too."""
    from jaxlm import cli

    run = cli.parse(["train", "-c", str(whole / "run.json")])
    assert {field.name: getattr(run, field.name) for field in fields(Run)} == {
        field.name: getattr(replace(run_of(files, whole), dtype="float32", remat="dots", log_every=2), field.name)
        for field in fields(Run)
    }
    path = whole.parent / "lora.yaml"
    path.write_text("lora: {rslora: true}\nmodel: x\n")
    assert cli.parse(["finetune", "-c", str(path)]).lora.rslora
    path.write_text("lora: {rslora: false}\nmodel: x\n")
    assert not cli.parse(["finetune", "-c", str(path)]).lora.rslora


def test_a_loss_of_nan_stops_the_run(files, tmp_path) -> None:
    run = run_of(files, tmp_path / "run", optimizer=Optimizer(lr=1e38, clip=0.0, warmup=6, schedule="linear"))
    with pytest.raises(loop.Diverged, match="gradient norm nan") as caught:
        loop.train(run)
    assert "--optimizer.lr" in str(caught.value)
    assert loop.train(run_of(files, run.out)).last["step"] == 12  # in the same folder


def test_what_would_fail_at_the_end_is_refused_at_the_start(files, tmp_path) -> None:
    def refused(error: Any, message: str, **fields: Any) -> None:
        with pytest.raises(error, match=message):
            loop.train(run_of(files, tmp_path / "run", **fields))
        assert not (tmp_path / "run/checkpoints").exists()

    optimizer = Optimizer(schedule="wsd", warmup=8, decay=0.5)
    refused(ValueError, "8 steps of warmup and 6 of decay", optimizer=optimizer)
    refused(ValueError, "prompt", samples=("",))
    refused(ValueError, "context", samples=("cat " * 40_000,))
    with pytest.MonkeyPatch.context() as absent:
        absent.setitem(sys.modules, "wandb", None)
        refused(ValueError, r"pip install 'jaxlm\[wandb\]'", report=("wandb",))
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/diary.txt").write_text("dear")
    refused(FileExistsError, "diary.txt")


def test_validation_data_with_an_empty_loss_mask(files, whole, tmp_path) -> None:
    """The first batches are a long prompt. They have no loss, and the run continues."""
    rows = [{"prompt": "the cat " * 90, "completion": " sat"}]  # more than a batch
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data((files["train"],), (str(tmp_path / "valid.jsonl"),), packing="split")
    run = run_of(files, tmp_path / "run", data=data, eval_batches=1)
    loop.train(run)
    assert [line["step"] for line in lines(run.out) if "valid_loss" in line] == [12]


def test_samples_end_at_the_context_length(files, tmp_path) -> None:
    shape = json.loads(Path(files["shape"]).read_text()) | {"max_position_embeddings": 32}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    run = run_of({**files, "shape": str(tmp_path / "shape.json")}, tmp_path / "run", steps=1, samples=("the cat",))
    done = loop.train(run)
    assert done.last["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--shape"),
        (["--model", "x"], "--data.train"),
        (["--model", "x", "--data.train", "y", "--save-every", "0"], "save_every is 0"),
        (["--model", "x", "--data.train", "y", "--steps", "-1"], "steps is -1"),
        (["--model", "x", "--data.train", "y", "--sample-tokens", "0"], "sample_tokens is 0"),
        (["--model", "x", "--data.train", "y", "--seed", "4294967296"], "seed is 4294967296"),
        (["--model", "x", "--data.train", "y", "--optimizer.b1", "1"], "optimizer.b1 is 1.0"),
        (["--shape", "x", "--data.train", "y", "--method", "lora"], "--model"),
        (["--model", "x", "--data.train", "y", "--adapter", "z"], "--method lora"),
        (["--model", "x", "--data.train", "y", "--lora.rank", "0"], "lora.rank is 0"),
        (["--model", "x", "--data.train", "y", "--batch", "3", "--accumulate", "2"], "accumulate"),
    ],
)
def test_inconsistent_runs_are_refused(flags, message, capsys) -> None:
    assert main(["train", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_file(tmp_path, capsys) -> None:
    """Flags override the file."""
    from jaxlm import cli

    path = tmp_path / "run.yaml"
    path.write_text(
        "shape: a.json\nsteps: 7\nbatch: 16\noptimizer: {name: muon, lr: 0.02}\ndata: {train: [x.txt, y.txt]}\n"
    )
    run = cli.parse(["train", "-c", str(path), "--batch", "8", "--data.train", "z.txt"])
    assert (run.steps, run.batch, run.optimizer.name, run.optimizer.lr) == (7, 8, "muon", 0.02)
    assert (run.shape, run.data.train) == (Path("a.json"), ("z.txt",))
    for text, message in (("stepps: 7\n", "stepps"), ("- 7\n", "mapping"), ("a: [", "run.yaml:1 is not valid YAML")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            cli.parse(["train", "-c", str(path)])
        assert message in capsys.readouterr().err


def test_a_hub_dataset_by_name(files, monkeypatch, tmp_path) -> None:
    """`--dataset wikitext` trains on its train split; --data.valid wikitext uses its validation split."""
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


def test_invalid_rows(files, tmp_path, capsys) -> None:
    """They stop the run with file and line, or are counted in a note."""
    notes: list[str] = []

    def first(line: dict[str, Any]) -> None:
        notes.append(line["note"])
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
    assert "8 documents (text)" in notes[0]
    assert "dropped: 4 " in notes[0]

"""Runs on mixtures, with documents held out, and with several validation sets: losses, resume and the dry run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training_runs import Stopped, command, lines, run_of, stopping_at

from jaxlm import cli
from jaxlm.cli import main
from jaxlm.cli.train import metrics_line
from jaxlm.data.sources import File
from jaxlm.data.streaming import StreamingLoader, UnreadableSource
from jaxlm.training import loaders, loop, metrics
from jaxlm.training.config import Data, Run
from jaxlm.training.setup import set_up

pytestmark = pytest.mark.usefixtures("quick")
WORDS = ["the", "cat", "dog", "sat", "ran", "home", "and", "a", "big", "red"]


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """Two data sets of different formats, beside each other."""
    rows = {
        "texts": [{"text": " ".join(WORDS[(i + k) % 10] for k in range(12))} for i in range(40)],
        "pairs": [{"prompt": f"the {WORDS[i % 10]}", "completion": WORDS[i % 7]} for i in range(40)],
    }
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def data_of(sources: dict[str, str], weights=(0.75, 0.25), **options: Any) -> Data:
    return Data(tuple(f"{path}={weight}" for path, weight in zip(sources.values(), weights)), **options)


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


def test_a_mixture_resumes_bit_exactly(files, sources, tmp_path) -> None:
    data = data_of(sources, valid=(files["valid"],))
    whole, halted = (run_of(files, tmp_path / name, data=data) for name in ("whole", "halted"))
    loop.train(whole)
    with pytest.raises(Stopped):
        loop.train(halted, stopping_at(8))
    changed = run_of(files, halted.out, data=data_of(sources, (0.5, 0.5), valid=(files["valid"],)))
    with pytest.raises(ValueError, match="other settings: training data"):
        loop.train(changed)
    # The same proportions and other names of the same files are the same data.
    moved = {name: str(Path(path).rename(tmp_path / f"{name}_moved.jsonl")) for name, path in sources.items()}
    loop.train(run_of(files, halted.out, data=data_of(moved, (3, 1), valid=(files["valid"],))))
    assert lines(halted.out) == lines(whole.out)
    assert weights(halted.out) == weights(whole.out)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_process_loads_its_rows_of_a_mixture(files, sources, tmp_path, monkeypatch, streaming) -> None:
    run = run_of(
        files,
        tmp_path / "run",
        data=data_of(sources, **({"streaming": True, "shuffle_buffer": 7} if streaming else {})),
    )
    whole = set_up(run).data
    shares = []
    for share in (slice(0, 1), slice(1, 4)):
        monkeypatch.setattr(loaders, "local_rows", lambda B, over, share=share: share)
        shares.append(set_up(run).data)
    for step in (0, 9, 100):
        for wanted, *parts in zip(whole.batch(step), *(data.batch(step) for data in shares), strict=True):
            assert (np.concatenate(parts) == wanted).all()


def test_the_dry_run_of_a_mixture(files, sources, tmp_path, capsys) -> None:
    flags = command(files, tmp_path / "run")
    at = flags.index("--data.train")
    flags[at : at + 2] = ["--data.train", *data_of(sources).train]
    assert main(["train", *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"data        75.0% {sources['texts']}: 40 documents (text)" in out
    assert f"            25.0% {sources['pairs']}: 40 documents (prompt)" in out
    epochs = set_up(run_of(files, tmp_path / "run", data=data_of(sources))).data.describe_epochs(12)
    assert f"of {sources['texts']}, " in epochs
    assert f"steps       12 of 4 x 32 tokens: 1,536 tokens, {epochs}; rows are " in out
    flags[at + 1 : at + 3] = [sources["texts"], f"{sources['pairs']}=1"]
    assert main(["train", *flags]) == 1
    assert "has no weight" in capsys.readouterr().err


def test_held_out_documents_are_a_validation_set(files, sources, tmp_path) -> None:
    data = Data((files["train"],), valid_split=0.2)
    whole, halted = (run_of(files, tmp_path / name, data=data) for name in ("whole", "halted"))
    loop.train(whole)
    assert [line["step"] for line in lines(whole.out) if "valid_loss" in line] == [6, 12]
    with pytest.raises(Stopped):
        loop.train(halted, stopping_at(8))
    for other in (Data((files["train"],)), Data((files["train"],), valid_split=0.3)):
        with pytest.raises(ValueError, match=r"other settings: .*data"):
            loop.train(run_of(files, halted.out, data=other))
    loop.train(halted)
    assert lines(halted.out) == lines(whole.out)
    setup = set_up(whole)
    held = set(setup.valid[""].lengths.nonzero()[0])
    trained = set(setup.data.lengths.nonzero()[0])
    assert held
    assert not held & trained
    assert len(held | trained) == 40


def test_documents_are_held_out_of_each_source_of_a_mixture(files, sources, tmp_path) -> None:
    run = run_of(files, tmp_path / "run", data=data_of(sources, valid_split=0.2))
    last = loop.train(run).last
    assert {"valid_loss_texts", "valid_loss_pairs"} <= last.keys()
    assert "valid_loss" not in last


def test_a_run_without_held_out_documents_does_not_resume_with_them(files, tmp_path) -> None:
    """Also a run of an earlier version, whose run.json has no such field."""
    run = run_of(files, tmp_path / "run", data=Data((files["train"],)))
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(8))
    path = run.out / "run.json"
    fields = json.loads(path.read_text())
    del fields["data"]["valid_split"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="other settings: training data"):
        loop.train(run_of(files, run.out, data=Data((files["train"],), valid_split=0.2)))
    loop.train(run)


def test_named_validation_sets(files, sources, tmp_path) -> None:
    valid = (f"words={files['valid']}", f"pairs={sources['pairs']}")
    run = run_of(files, tmp_path / "run", data=Data((files["train"],), valid))
    notes: list[str] = []
    loop.train(run, lambda line: notes.append(line.get("note", "")))
    found = [line for line in lines(run.out) if "valid_loss_words" in line]
    assert [line.keys() for line in found] == [{"step", "valid_loss_words", "valid_loss_pairs"}] * 2
    assert [line["step"] for line in found] == [6, 12]
    assert any(note.startswith("validation pairs: 40 documents (prompt)") for note in notes)
    text = metrics_line(found[0], 12)
    assert text.startswith(f"step 6/12 valid_loss_words {found[0]['valid_loss_words']:.4f} valid_loss_pairs ")
    alone = run_of(files, tmp_path / "alone", data=Data((files["train"],), (files["valid"],)))
    loop.train(alone)
    losses = [line["valid_loss"] for line in lines(alone.out) if "valid_loss" in line]
    assert losses == [line["valid_loss_words"] for line in found]


def test_all_validation_losses_are_plotted(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    labels: list[str] = []
    plot = Axes.plot

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        labels.append(options["label"])
        return plot(self, *args, **options)

    monkeypatch.undo()  # the fixture quick replaces plot_loss of the module alone
    monkeypatch.setattr(Axes, "plot", noting)
    found = [{"step": n, "loss": 1 / n, "valid_loss_a_b": 2.0, "valid_loss_c": 3.0, "valid_loss": 1.5} for n in (1, 2)]
    PLOT(found, tmp_path / "loss.png", "a run")
    assert labels == ["training", "validation a_b, 2.000 at the end", "validation c, 3.000 at the end",
                      "validation, 1.500 at the end"]  # fmt: skip


PLOT = metrics.plot_loss  # as it is before the fixture replaces it


def test_what_cannot_be_combined(files, tmp_path) -> None:
    for data, message in (
        (Data((files["train"],), (files["valid"],), valid_split=0.1), "cannot be combined with data.valid"),
        (Data((files["train"],), valid_split=1.0), "valid_split is 1.0, but must be at least 0 and below 1"),
        (Data((files["train"],), valid_split=-0.1), "must be at least 0"),
        (Data((files["train"],), (f"{files['valid']}=0.5",)), "which only training data have"),
        (Data((files["train"],), valid_split=1e-6), "holds out 0 of 40 documents"),
    ):
        with pytest.raises(ValueError, match=message):
            set_up(run_of(files, tmp_path / "run", data=data))
    run = cli.parse(["train", "--shape", "s", "--data.train", "a=0.7", "b=0.3", "--data.valid", "x=a", "y=b"])
    assert (run.data.train, run.data.valid) == (("a=0.7", "b=0.3"), ("x=a", "y=b"))
    assert Run(data=Data(train=["a=0.7", "b=0.3"], valid="x=a")).data.train == run.data.train


# Streaming


def streamed(sources: dict[str, str], files: dict[str, str], **options: Any) -> Data:
    return data_of(sources, **{"valid": (files["valid"],), "streaming": True, "shuffle_buffer": 7, **options})


def test_streamed_data_resume_bit_exactly(files, sources, tmp_path) -> None:
    data = streamed(sources, files)
    whole, halted, moved = (run_of(files, tmp_path / name, data=data) for name in ("whole", "halted", "moved"))
    loop.train(whole)
    assert not list((tmp_path / "whole").glob("*.bin"))
    for run in (halted, moved):
        with pytest.raises(Stopped):
            loop.train(run, stopping_at(8))
    assert len(json.loads((halted.out / "windows.json").read_text())) == 2
    (moved.out / "windows.json").unlink()  # then they are read from the beginning
    for run in (halted, moved):
        loop.train(run)
        assert lines(run.out) == lines(whole.out)
        assert weights(run.out) == weights(whole.out)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the", "completion": "cat"}\n' * 9)
    with pytest.raises(ValueError, match="other settings: training data"):
        loop.train(whole)


def test_streamed_data_resume_at_the_window_of_the_step(files, tmp_path, monkeypatch) -> None:
    data = Data((files["train"],), (files["valid"],), streaming=True, shuffle_buffer=5)
    run = run_of(files, tmp_path / "run", data=data)
    with pytest.raises(Stopped):
        loop.train(run, stopping_at(10))
    read: list[int] = []
    theirs = StreamingLoader._read
    monkeypatch.setattr(
        StreamingLoader, "_read", lambda self, n, begin, *rest: read.append(n) or theirs(self, n, begin, *rest)
    )
    loop.train(run)
    assert read[0] == 0  # for the format of the rows
    assert min(read[1:]) > 1


def test_the_dry_run_of_streamed_data(files, tmp_path, capsys) -> None:
    flags = [*command(files, tmp_path / "run"), "--data.streaming", "--data.shuffle-buffer", "9"]
    assert main(["train", *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "streamed, 9 documents shuffled together" in out
    assert "an unknown number of epochs" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_split": 0.1, "valid": ()}, "--data.valid"),
        ({"shuffle_buffer": 0}, "at least 1"),
        ({"streaming": False}, "data.shuffle_buffer needs data.streaming"),
    ],
)
def test_what_streaming_cannot_do(files, sources, tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(files, tmp_path / "run", data=streamed(sources, files, **options)).check()


def test_finetune_streams_as_many_steps_as_are_given(files, sources, tmp_path) -> None:
    """Although it has a default of epochs."""
    flags = ["finetune", "-m", files["tokenizer"], "--data.train", sources["texts"], "--data.streaming"]
    run = cli.parse([*flags, "--steps", "3"])
    assert run.epochs
    run.check()


def test_streaming_needs_steps(files, sources, tmp_path) -> None:
    with pytest.raises(ValueError, match="--steps"):
        run_of(files, tmp_path / "run", data=streamed(sources, files), steps=0, epochs=1.0).check()


def test_rows_left_out_of_streamed_data_are_logged(files, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(WORDS)}) + "\n" if i % 9 else "{\n" for i in range(1, 90)))
    data = Data((str(path),), (files["valid"],), streaming=True, shuffle_buffer=5, on_bad="skip")
    notes: list[str] = []
    loop.train(run_of(files, tmp_path / "run", data=data), lambda line: notes.append(line.get("note", "")))
    assert any("invalid JSON (" in note and "a.jsonl:9" in note for note in notes)
    stopping = run_of(files, tmp_path / "other", data=replace(data, on_bad="stop"))
    with pytest.raises(ValueError, match=r"a\.jsonl:9") as raised:
        loop.train(stopping)
    assert "grain" not in str(raised.value).lower()
    loop.train(replace(stopping, data=data))  # the way out that the message names
    assert lines(stopping.out)[-1]["step"] == 12


def test_a_run_resumes_after_a_row_is_repaired(files, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": " ".join(WORDS[i % 7 :])}) + "\n" for i in range(200)]
    repaired, broken = "".join(rows), "".join([*rows[:60], rows[60][:-3] + "\n", *rows[61:]])
    data = Data((str(path),), (files["valid"],), streaming=True, shuffle_buffer=5)
    run, whole = (run_of(files, tmp_path / name, data=data, save_every=100) for name in ("run", "whole"))
    path.write_text(broken)
    with pytest.raises(ValueError, match=r"a\.jsonl:61"):
        loop.train(run)
    before = (run.out / "windows.json").read_text()
    path.write_text(repaired)
    notes: list[str] = []
    loop.train(run, lambda line: notes.append(line.get("note", "")))
    assert sum("files of the training data have changed" in note for note in notes) == 1
    loop.train(whole)
    assert lines(run.out) == lines(whole.out)
    assert weights(run.out) == weights(whole.out)
    assert json.loads((run.out / "windows.json").read_text())[0][1][:5] == json.loads(before)[0][1][:5]


def test_a_source_that_fails_loses_no_step(files, tmp_path, monkeypatch) -> None:
    """A lost connection is an OSError, but not one of the disk to which the run is saved."""
    data = Data((files["train"],), (files["valid"],), streaming=True, shuffle_buffer=5)
    run, whole = (run_of(files, tmp_path / name, data=data, save_every=100) for name in ("run", "whole"))
    theirs = File.rows

    def failing(self, start=0):
        for i, row in enumerate(theirs(self, start), start):
            if i == 30:
                raise ConnectionError("reset by peer")
            yield row

    with monkeypatch.context() as patched:
        patched.setattr(File, "rows", failing)
        with pytest.raises(UnreadableSource, match=r"train\.txt cannot be read after row 30: reset by peer") as raised:
            loop.train(run)
    assert "was saved" in raised.value.__notes__[0]
    for one in (run, whole):
        loop.train(one)
    assert lines(run.out) == lines(whole.out)
    assert weights(run.out) == weights(whole.out)

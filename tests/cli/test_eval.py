"""`jaxlm eval` on the command line. Tasks of lm-eval: tests/oracle/test_lm_eval.py."""

import io
import json
import math
import sys

import pytest
from helpers import tiny_files

from jaxlm.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_files.write(path)
    return str(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Once upon a time"}\n{"text": ""}\n{"text": "é"}\n')
    return str(path)


def test_the_table(folder, text, capsys):
    assert main(["eval", "-m", folder, text, "--length", "16"]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.replace("bits per byte", "bits").splitlines())
    assert list(lines) == ["documents", "tokens", "bytes", "perplexity", "bits"]
    assert (lines["documents"], lines["tokens"], lines["bytes"]) == ("2", "18", "18")
    perplexity, unit = lines["perplexity"].split(maxsplit=1)
    assert unit == "per token"
    assert float(lines["bits"]) == pytest.approx(math.log2(float(perplexity)), rel=1e-3)  # of bytes
    assert err == "dropped: 1 empty text\n"


def test_json(folder, text, capsys):
    assert main(["eval", "-m", folder, text, "--json", "--length", "16", "--stride", "4", "--batch", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["files"], found["length"], found["stride"]) == (folder, [text], 16, 4)
    assert (found["documents"], found["tokens"], found["bytes"]) == (2, 18, 18)
    assert found["dropped"] == {"empty text": 1}
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"] / 18))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / 18)
    assert found["seconds"] > 0


def test_several_files_and_formats(folder, text, tmp_path, capsys):
    (tmp_path / "b.txt").write_text("abc")
    assert main(["eval", "-m", folder, text, str(tmp_path / "b.txt"), "--json", "--length", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 21
    (tmp_path / "c.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n')
    assert main(["eval", "-m", folder, str(tmp_path / "c.jsonl"), "--json", "--length", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 1
    whole = ["--data-format", "prompt", "--train-on", "all"]
    assert main(["eval", "-m", folder, str(tmp_path / "c.jsonl"), "--json", "--length", "16", *whole]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 4  # and the line's end between them


def test_progress_on_a_terminal(folder, text, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["eval", "-m", folder, text, "--length", "16"]) == 0
    _, shown, after = terminal.getvalue().partition("\r\033[K\033[2m2 documents, 16 tokens\033[0m\r\033[K")
    assert shown
    assert "dropped" in after


def test_invalid_rows(folder, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": \n')
    assert main(["eval", "-m", folder, str(path), "--length", "16"]) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: " in err
    assert " --on-bad skip" in err
    assert "--data." not in err  # the flags are those of this command
    assert main(["eval", "-m", folder, str(path), "--length", "16", "--on-bad", "skip"]) == 0
    assert capsys.readouterr().err == "dropped: 1 invalid JSON\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "pass either files or --tasks"),
        (["a.txt", "--tasks", "x"], "pass either files or --tasks"),
        (["a.txt", "--shots", "2"], "--shots applies to --tasks only"),
        (["a.txt", "--tasks-folder", "x"], "--tasks-folder applies to --tasks only"),
        (["--tasks", "x", "--stride", "2"], "--stride applies to files only"),
        (["--tasks", "x", "--on-bad", "skip"], "--on-bad applies to files only"),
        (["--tasks", "x", "--limit", "0"], "--limit is 0, but must be at least 1"),
        (["--tasks", "x", "--shots", "-1"], "--shots is -1, but must be at least 0"),
        (["a.txt", "--batch", "0"], "--batch is 0, but must be at least 1"),
        (["a.txt", "--length", "0"], "--length is 0, but must be at least 1"),
    ],
)
def test_usage(argv, message, capsys):
    assert main(["eval", *argv]) == 2
    assert capsys.readouterr().err == f"jaxlm: {message} (jaxlm eval --help)\n"


def test_errors(folder, text, capsys, monkeypatch):
    assert main(["eval", "-m", folder, "no.txt"]) == 1
    assert "no.txt" in capsys.readouterr().err
    assert main(["eval", "-m", folder, text, "--length", "4096"]) == 1
    assert "length is 4,096" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "-m", folder, "--tasks", "hellaswag"]) == 1
    assert "lm_eval: pip install 'jaxlm[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["eval", "-m", folder, "wikitext"]) == 1
    assert "pip install 'jaxlm[train]'" in capsys.readouterr().err

"""`jaxlm check`: records are written, kept, shared and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_files

from jaxlm import models
from jaxlm.bench import checking, limits, matrix, programs
from jaxlm.bench.matrix import Subject
from jaxlm.cli import main

FLAGS = ["--batch", "2", "--context", "64", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    tiny_files.write(path)
    return path


def read(path: str = "compat/cpu.jsonl") -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {record["model"]: record for record in found}


def published(*names: str, **fields: Any) -> list[Subject]:
    """Published models, all with tiny shapes."""
    family = models.family_of("llama")
    cfg = family.Config.from_hf(tiny_files.CONFIG | fields)
    return [Subject(name, family, cfg, False, f"https://example.org/{name}", None) for name in names]


def test_compiles_for_a_named_device_once(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(["check", str(folder), "--device", "cpu", *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny  cpu  compiles; compiler: decode ")
    assert "[1/1] tiny on cpu" in err
    record = read()["tiny"]
    assert record["command"] == "jaxlm check tiny --device cpu --batch 2 --context 64 --dtype float32"
    assert str(folder.parent) not in Path("compat/cpu.jsonl").read_text()
    assert (record["batch"], record["context"], record["dtype"]) == (2, 64, "float32")

    monkeypatch.setattr(programs, "decode", None)  # it is not called again
    assert main(["check", str(folder), "--device", "cpu", *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "--again" in err
    assert read()["tiny"]["status"] == "compiles"
    assert main(["check", str(folder), "--device", "cpu", *FLAGS, "--again"]) == 1
    assert read()["tiny"]["status"] == "fails"
    assert "TypeError" in read()["tiny"]["error"]


def test_models_of_equal_shapes_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "published", lambda: published("org/a", "org/b") + published("org/c", vocab_size=300))
    calls, decode = [], programs.decode
    monkeypatch.setattr(programs, "decode", lambda *args: calls.append(args) or decode(*args))
    assert main(["check", "--device", "cpu", *FLAGS]) == 0
    assert len(calls) == 2
    found = read()
    assert found["org/b"]["same_as"] == "org/a"
    assert found["org/b"]["compiled"] == found["org/a"]["compiled"]
    assert "same_as" not in found["org/a"]
    assert "same_as" not in found["org/c"]
    assert found["org/b"]["command"].startswith("jaxlm check org/b --device cpu ")


def test_an_interrupted_call_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    subjects = published("org/a") + published("org/b", vocab_size=300)
    monkeypatch.setattr(matrix, "published", lambda: subjects)
    decode, done = programs.decode, []

    def second_is_interrupted(where: Any, *args: Any) -> Any:
        if where.cfg.V == 300 and not done:
            done.append(where)
            raise KeyboardInterrupt
        return decode(where, *args)

    monkeypatch.setattr(programs, "decode", second_is_interrupted)
    assert main(["check", "--device", "cpu", *FLAGS]) == 130
    assert list(read()) == ["org/a"]
    capsys.readouterr()
    assert main(["check", "--device", "cpu", *FLAGS]) == 0
    assert list(read()) == ["org/a", "org/b"]
    assert "[1/1] org/b" in capsys.readouterr().err


def test_a_failure_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    subjects = published("org/a") + published("org/b", vocab_size=300)
    monkeypatch.setattr(matrix, "published", lambda: subjects)
    decode = programs.decode

    def first_fails(where: Any, *args: Any) -> Any:
        if where.cfg.V != 300:
            raise RuntimeError("INTERNAL: no such layout")
        return decode(where, *args)

    monkeypatch.setattr(programs, "decode", first_fails)
    assert main(["check", "--device", "cpu", *FLAGS]) == 1
    found = read()
    assert [found[name]["status"] for name in ("org/a", "org/b")] == ["fails", "compiles"]
    assert "no such layout" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(checking, "ROUNDS", 1)
    monkeypatch.setattr(checking, "PROMPT", 16)
    monkeypatch.setattr(checking, "GENERATED", 4)


@pytest.mark.usefixtures("quick")
def test_runs_and_verifies_at_hand(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    from jaxlm import verification

    verify = verification.verify
    monkeypatch.setattr(verification, "verify", lambda model, against=None, **more: verify(model, "self", **more))
    assert main(["check", str(folder), "--as", "org/tiny", "--name", "My CPU", *FLAGS]) == 0
    assert capsys.readouterr().out.startswith("org/tiny  My CPU  ◐ ")
    record = read("compat/My-CPU.jsonl")["org/tiny"]
    assert (record["status"], record["method"]) == ("ran", "run")
    assert [(one["name"], one["batch"]) for one in record["figures"]] == [("pp16", 1), ("tg4", 1), ("tg4", 2)]
    assert all(one["tokens_per_second"] > 0 for one in record["figures"])
    assert record["verify"]["passed"]
    assert record["verify"]["checks"] == 4
    assert record["verify"]["dtype"] == "float32"
    words = ["jaxlm", "check", "tiny", "--as", "org/tiny", "--name", "'My", "CPU'", *FLAGS]
    assert record["command"] == " ".join(words)


@pytest.mark.usefixtures("quick")
def test_wrong_results_are_a_failure(folder: Path, monkeypatch: Any) -> None:
    from jaxlm import verification
    from jaxlm.verification.report import Check

    def wrong(model: Any, *args: Any, **more: Any) -> Any:
        report = verification.Report.of(verification.ours.loaded(model, "float32"))
        report.checks += [Check("itself", "fine", 0, 1, "std"), Check("itself", "decode = forward", 2, 1, "std")]
        return report

    monkeypatch.setattr(verification, "verify", wrong)
    assert main(["check", str(folder), *FLAGS]) == 1
    record = read()["tiny"]
    assert record["status"] == "fails"
    assert record["verify"]["failed"] == ["itself: decode = forward"]


@pytest.mark.usefixtures("quick")
def test_random_weights_need_no_checkpoint_and_a_run_is_kept(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(matrix, "published", lambda: published("org/a", "org/b"))
    assert main(["check", "--random-weights", *FLAGS]) == 0
    found = read()
    assert found["org/a"]["method"] == "run with random weights"
    assert "verify" not in found["org/a"]
    assert found["org/b"]["figures"] == found["org/a"]["figures"]
    assert found["org/b"]["same_as"] == "org/a"
    assert "○" in capsys.readouterr().out
    assert main(["check", "--device", "cpu", *FLAGS]) == 0  # says less than a run
    assert read() == found


def test_only_models_that_are_named_are_downloaded(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(matrix, "published", lambda: published("org/a"))
    sources = []

    def running(subject: Any, device: Any, settings: Any, source: Any, progress: Any) -> Any:
        sources.append(source)
        raise OSError("no weights")

    monkeypatch.setattr(checking, "running", running)
    assert main(["check", *FLAGS]) == 0
    assert main(["check", "qwen3-0.6b", *FLAGS]) == 1
    assert main(["check", str(folder), *FLAGS]) == 1
    assert [(source.name, source.offline) for source in sources[:2]] == [("org/a", True), ("Qwen/Qwen3-0.6B", False)]
    assert sources[2].name == str(folder)


def test_weights_that_are_not_at_hand(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(matrix, "published", lambda: published("org/a"))
    assert main(["check", *FLAGS]) == 0
    assert "1 of 1 models are not in the Hugging Face cache" in capsys.readouterr().err
    assert not Path("compat").exists()
    assert main(["check", "no/such-model", *FLAGS]) == 1


def test_the_page_alone_checks_nothing(folder: Path, capsys: Any) -> None:
    assert main(["check", "--page", "page.md"]) == 1
    assert "no records" in capsys.readouterr().err
    assert main(["check", str(folder), "--device", "L4", "--page", "page.md", *FLAGS]) == 0
    text = Path("page.md").read_text()
    assert "| tiny | D 64, L 2 |" in text
    Path("page.md").unlink()
    assert main(["check", "--page", "page.md"]) == 0
    assert Path("page.md").read_text() == text


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--as", "org/a"], "--as"),
        (["a", "b", "--as", "org/a"], "--as"),
        (["--batch", "0"], "--batch"),
        (["--device", "cpu", "--random-weights"], "--random-weights"),
        (["--device", "cpu", "--name", "a"], "--name"),
    ],
)
def test_wrong_usage(argv: list[str], word: str, capsys: Any) -> None:
    assert main(["check", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert word in err


def test_an_unknown_device_names_a_known_one(capsys: Any) -> None:
    assert main(["check", "--device", "v6-8"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "v6e" in err


def test_records_of_another_machine_are_kept_apart(folder: Path, capsys: Any) -> None:
    """The column CPU is of one machine."""
    assert main(["check", "--device", "cpu", str(folder), "--as", "org/tiny", *FLAGS]) == 0
    path = Path("compat/cpu.jsonl")
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"machine": line["machine"] | {"processor": "Other"}}) + "\n")
    before = path.read_text()
    assert main(["check", str(folder), "--as", "org/tiny", *FLAGS]) == 1
    assert "of another machine (Other): name yours with --name" in capsys.readouterr().err
    assert path.read_text() == before

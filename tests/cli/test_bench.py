"""`jaxlm bench` on the command line: usage, tables, JSON, an interrupt, and what is not installed."""

import json
from pathlib import Path

import pytest
from helpers import tiny_files

from jaxlm.bench import load_time
from jaxlm.bench.measure import Jaxlm
from jaxlm.cli import main
from jaxlm.devices import hardware

SHORT = ["-p", "8", "-n", "4", "-r", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_files.write(path)
    return str(path)


@pytest.fixture(autouse=True)
def rates(monkeypatch) -> None:
    monkeypatch.setattr("jaxlm.bench.limits.read_rate", lambda device: 2e9)
    monkeypatch.setattr("jaxlm.bench.limits.matmul_rate", lambda device, dtype: 3e12)


def cells(out: str) -> list[dict[str, str]]:
    """The rows of the table in the output."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["x", "-p", "0"], "-p is 0"),
        (["x", "-p", "abc"], "-p takes whole numbers"),
        (["x", "-b", "1,0"], "-b is 1,0"),
        (["x", "-n", "1,,2"], "-n takes"),
        (["x", "-d", "-1"], "-d is -1"),
        (["x", "-r", "0"], "-r is 0"),
        (["x", "-r", "many"], "integer"),
        (["x", "--against", "transformers,vllm"], "'vllm'"),
        (["x", "--plot", "/absent/a.png"], "--plot"),
        (["x", "--plot", "a.pdf"], ".png"),
        ([], "pass one model"),
        (["train"], "pass one model"),
        (["x", "--random-weights", "y"], "pass one model"),
        (["x", "y"], "unexpected argument 'y'"),
        (["load", "x", "-p", "8"], "--prompt does not apply to load"),
        (["train", "x", "--against", "transformers"], "--against does not apply to train"),
        (["x", "--method", "lora"], "--method does not apply to generation"),
    ],
)
def test_wrong_usage_is_one_line(argv, words, capsys) -> None:
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_the_table(folder, capsys) -> None:
    assert main(["bench", folder, *SHORT, "-b", "2", "-d", "0,16"]) == 0
    out, err = capsys.readouterr()
    found = [(row["test"], row["batch"]) for row in cells(out)]
    assert found == [("pp8", "2"), ("tg4", "2"), ("pp8 @ d16", "2"), ("tg4 @ d16", "2")]
    assert "llama3, 102,848 parameters, 0.4 MB as float32" in out
    assert "memory read 2.0 GB/s; matmul 3,000 GFLOP/s" in out
    assert "round 2 of 2: tg4 @ d16, batch 2, jaxlm" in err
    for row in cells(out):
        first, inter = (row[name] for name in ("first token, ms", "inter-token p50, ms"))
        assert bool(first) == row["test"].startswith("pp") != bool(inter)


def test_json_and_the_plot(folder, tmp_path, capsys) -> None:
    png = tmp_path / "speed.png"
    assert main(["bench", "-m", folder, *SHORT, "-b", "1,2", "--json", "--plot", str(png)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == folder
    assert found["rates"]["read_bytes_per_second"] == 2e9
    assert [row["test"] for row in found["results"]] == ["pp8", "tg4"] * 2
    decode = found["results"][1]
    assert decode["rounds"] == 2
    assert decode["fraction_of_limit"] == pytest.approx(decode["tokens_per_second"] / decode["limit_tokens_per_second"])
    # Steps behind 1 to 4 tokens: 102,848 parameters, and 512 bytes of keys and values per token and row.
    seconds = sum((102_848 * 4 + 512 * length) / 2e9 for length in range(2, 6))
    assert decode["limit_tokens_per_second"] == pytest.approx(4 / seconds)
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_an_interrupt_prints_what_was_measured(folder, monkeypatch, capsys) -> None:
    runs, original = [], Jaxlm.run

    def run(self, case, prompts):
        runs.append(case)
        if len(runs) == 4:  # after the warm-up of two cases, and the first round of the first
            raise KeyboardInterrupt
        return original(self, case, prompts)

    monkeypatch.setattr(Jaxlm, "run", run)
    assert main(["bench", folder, *SHORT]) == 130
    out, err = capsys.readouterr()
    assert [row["test"] for row in cells(out)] == ["pp8"]
    assert err.endswith("interrupted\n")


def test_a_batch_that_does_not_fit(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(hardware, "available_memory", lambda device: 4_000_000)
    assert main(["bench", folder, "-p", "1000", "-n", "8", "-b", "1,512"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "512 sequences of 1,001 tokens need" in err
    assert "(-b " in err
    assert "--batch-size" not in err


def test_more_tokens_than_the_context(folder, capsys) -> None:
    assert main(["bench", folder, "-p", "8", "-n", "3000"]) == 1
    assert "(-n " in capsys.readouterr().err


def test_random_weights(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_files.CONFIG, "torch_dtype": "bfloat16"}))
    assert main(["bench", "--random-weights", str(path), *SHORT]) == 0
    out = capsys.readouterr().out
    assert "102,848 parameters, 0.2 MB as bfloat16" in out
    assert main(["bench", "--random-weights", "qwen3-0.7b", *SHORT]) == 1
    assert "Qwen/Qwen3-0.6B" in capsys.readouterr().err


def test_a_rival_that_is_not_installed(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("jaxlm.bench.rivals.PACKAGES", {"llama.cpp": ("absent_package", "pip install it")})
    assert main(["bench", folder, *SHORT, "--against", "llama.cpp"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "jaxlm: --against llama.cpp needs absent_package: pip install it\n")


def test_train(folder, capsys) -> None:
    assert main(["bench", "train", folder, "-p", "16", "-b", "2", "-r", "2", "--method", "lora", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert [(row["test"], row["batch"]) for row in cells(out)] == [("train16", "2")]
    assert "a LoRA adapter of rank 2, computed in float32" in out


def test_load(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(load_time, "in_fresh_process", load_time.load_once)
    assert main(["bench", "load", folder, "-r", "1", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["file_bytes"] == (Path(folder) / "model.safetensors").stat().st_size
    assert main(["bench", "load", str(Path(folder) / "absent"), "-r", "1"]) == 1

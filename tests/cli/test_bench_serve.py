"""`jaxlm bench serve` on the command line: usage, messages, and a run against a server in this process."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.http_server import interrupt_after, running
from helpers.tiny_chat import quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.cli import main, parse
from jaxlm.cli.bench import Bench
from jaxlm.cli.serve import Serve
from jaxlm.server.app import create_app
from jaxlm.server.state import Server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer_of(None))
    with (
        quick_compilation(),
        jaxlm.Engine(model, 1) as engine,
        running(create_app(Server(model, engine, "m"))) as found,
    ):
        yield found


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "pass one model, or --url"),
        (["x", "--url", "http://a/v1"], "pass one model, or --url"),
        (["--url", "http://a/v1", "--against", "llama.cpp"], "--against needs a model"),
        (["x", "--against", "transformers"], "--against must be llama.cpp with serve"),
        (["x", "--clients", "0"], "--clients is 0"),
        (["x", "--clients", "two"], "--clients takes whole numbers"),
        (["x", "--rate", "1,-1"], "--rate is 1,-1, but must be above 0"),
        (["x", "--rate", "nan"], "--rate is nan"),
        (["x", "--rate", "fast"], "--rate takes numbers"),
        (["x", "--requests", "0"], "--requests is 0"),
        (["x", "--requests", "4", "--clients", "8"], "at least the number of clients, 8"),
        (["x", "--seconds", "inf"], "--seconds is inf"),
        (["x", "--prompts", "f", "-p", "3"], "not both"),
        (["--url", "http://a/v1", "--slots", "3"], "--slots and --max-length do not apply"),
        (["x", "--plot", "a.png"], "--plot does not apply to serve"),
        (["x", "-r", "0"], "-r is 0"),
    ],
)
def test_wrong_usage_is_one_line(argv, words, capsys) -> None:
    assert main(["bench", "serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_flags_of_serve_do_not_apply_to_others(capsys) -> None:
    assert main(["bench", "load", "x", "--clients", "3"]) == 2
    assert "--clients does not apply to load" in capsys.readouterr().err


def test_no_server(capsys) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1/v1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("start the server, or correct the URL\n")


def test_a_rival_that_is_not_installed(monkeypatch, capsys) -> None:
    monkeypatch.setattr("jaxlm.bench.rivals.PACKAGES", {"llama.cpp": ("absent_package", "pip install it")})
    assert main(["bench", "serve", "x", "--against", "llama.cpp"]) == 1
    assert capsys.readouterr().err == "jaxlm: --against llama.cpp needs absent_package: pip install it\n"


def test_a_run(url, tmp_path, capsys) -> None:
    lines = [{"prompt": "once " * (n % 3 + 1) + str(n), "completion": "word" * (n % 4 + 1)} for n in range(30)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["bench", "serve", "--url", url, "--prompts", str(file), "--clients", "3", "--rate", "40", "--requests", "9"]
    assert main([*argv, "-r", "2", "--json", "--first-token-limit", "60000"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["environment"]["commit"] is None or found["environment"]["commit"]
    closed, open_ = found["results"]
    assert (closed["load"], closed["clients"], closed["rate"]) == ("3 clients", 3, None)
    assert (open_["load"], open_["clients"], open_["rate"]) == ("40 requests/s", None, 40.0)
    for record in (closed, open_):
        assert (record["requests"], record["failed"], record["rounds"]) == (18, 0, 2)
        assert 18 <= record["completion_tokens"] <= 18 * 4
        assert record["prompt_tokens"] > 18 * 2
        assert record["first_token_ms"]["p50"] <= record["latency_ms"]["p50"]
        assert record["goodput"] == record["requests_per_second"]
        assert record["total_tokens_per_second"] * record["seconds"] == pytest.approx(
            record["prompt_tokens"] + record["completion_tokens"]
        )
    assert "round 2 of 2: prompts.jsonl+answers, 40 requests/s, server" in err


def test_an_interrupt_prints_what_was_measured(url, monkeypatch, capsys) -> None:
    interrupt_after(3, monkeypatch)  # the warm-up has two requests
    assert main(["bench", "serve", "--url", url, "-p", "3", "-n", "4", "--clients", "2", "--requests", "300"]) == 130
    out, err = capsys.readouterr()
    assert "| 3+4" in out
    assert "| 2 clients | server |" in out
    assert err.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "messages need the chat template"),
        ({"prompt": "a", "completion": 3}, "the field 'completion' must be a text"),
        ({"prompt": "a"}, "a line has no answer in the field completion: pass -n"),
    ],
)
def test_prompts_that_cannot_be_sent(line, words, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert main(["bench", "serve", "x", "--prompts", str(file)]) == 1
    assert words in capsys.readouterr().err


def test_flags_of_the_model_reach_the_server(monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    flags: dict[str, Any] = {"dtype": "bfloat16", "offline": True, "allow_field": ("a", "b"), "tokenizer": Path("-t")}
    arguments = Bench(**flags, token="secret", quiet=True)._model_arguments("m")
    assert parse(["serve", *arguments]) == Serve(model="m", **flags)
    assert os.environ.pop("HF_TOKEN") == "secret"

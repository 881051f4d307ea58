"""`jaxlm bench --against`: transformers and llama.cpp run the same cases in processes of their own."""

import json

import pytest
from helpers import tiny_files

from jaxlm.bench import rival_files, rivals
from jaxlm.bench.cases import Case
from jaxlm.cli import main

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_files.write(path)
    return path


def test_the_ratios(folder, capsys, monkeypatch) -> None:
    """Without the compiled contestant, which takes a minute."""
    monkeypatch.delitem(rivals.TRANSFORMERS, "transformers bfloat16 compiled")
    command = ["bench", str(folder), "--against", "transformers,llama.cpp", "-p", "8", "-n", "4", "-d", "0,16"]
    assert main([*command, "-b", "1,2", "-r", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"torch", "transformers", "xllamacpp"} <= set(found["environment"])
    assert len(found["results"]) == 8
    for row in found["results"]:
        for name in ("transformers", "llama.cpp"):
            ours, theirs = row["tokens_per_second"], row[name]["tokens_per_second"]
            assert row[name]["ratio"] == pytest.approx(ours / theirs)
            assert 1 < theirs < 1e6


@pytest.mark.parametrize("rival", ["transformers float32", "llama.cpp"])
def test_a_longer_case_takes_longer(rival, folder) -> None:
    """The seconds are those of the tokens of the case."""
    import jaxlm

    model = jaxlm.load(folder)
    if rival == "llama.cpp":
        process = rivals.start_llama_cpp(rival_files.gguf_for_llama_cpp(model, None, print), "float32", 1, 1200)
    else:
        process = rivals.start_transformers(rival, folder, "cpu")
    try:
        for kind, short, long in (("prefill", 16, 1024), ("decode", 4, 64)):
            best = {short: float("inf"), long: float("inf")}
            for n, tokens in enumerate([short, long] * 25):  # on a busy machine the best of a few is not the best
                case = Case(kind, tokens, 0, 1)
                sample = process.run(case, case.prompts(258))
                assert sample is not None
                best[tokens] = min(best[tokens], sample.seconds)
                if n >= 9 and best[long] > 2 * best[short]:
                    break
            assert best[long] > 2 * best[short], kind
    finally:
        process.close()


def test_servers(folder, tmp_path, monkeypatch, capsys) -> None:
    """Both servers do the same work: the same tokens, and the same greedy texts up to what float16 weights change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # of the server: compiling takes nearly all the time
    command = ["bench", "serve", str(folder), "--against", "llama.cpp", "--clients", "1,3", "--rate", "20", "-p", "8"]
    assert main([*command, "-n", "4", "--requests", "6", "--slots", "2", "-r", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["load"], r["server"]) for r in found["results"]] == [
        (load, server) for load in ("1 client", "3 clients", "20 requests/s") for server in ("jaxlm", "llama.cpp")
    ]
    texts = equal = 0
    for ours, theirs in zip(found["results"][::2], found["results"][1::2]):
        assert (ours["failed"], theirs["failed"]) == (0, 0)
        # A token per letter: prompts have the BOS token and perhaps a letter in common.
        assert max(ours["cached_tokens"], theirs["cached_tokens"]) < 0.1 * ours["prompt_tokens"]
        for name in ("requests", "prompt_tokens", "completion_tokens"):
            assert ours[name] == theirs[name]
        assert (ours["requests"], ours["completion_tokens"]) == (12, 48)
        beside = ours["llama.cpp"]
        assert (beside["rounds"], beside["rounds_with_equal_work"], len(beside["throughput_ratios"])) == (2, 2, 2)
        texts, equal = texts + beside["texts"], equal + beside["equal_texts"]
    assert texts == 36
    assert equal >= 24


def test_a_model_that_does_not_exist(tmp_path, capsys) -> None:
    """The message is that of the process of `jaxlm serve`."""
    assert main(["bench", "serve", str(tmp_path / "absent")]) == 1
    err = capsys.readouterr().err
    assert "jaxlm: jaxlm ended with status 1: " in err
    assert "absent" in err

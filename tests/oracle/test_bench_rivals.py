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
            for tokens in [short, long] * 5:
                case = Case(kind, tokens, 0, 1)
                sample = process.run(case, case.prompts(258))
                assert sample is not None
                best[tokens] = min(best[tokens], sample.seconds)
            assert best[long] > 2 * best[short], kind
    finally:
        process.close()

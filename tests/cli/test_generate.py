"""The generate command as a user types it."""

import json
import os
import subprocess
import sys

import pytest

from jaxlm import decoding
from jaxlm.cli import main


@pytest.fixture
def stories(shared):
    return str(shared / "checkpoints/stories260K")


def test_the_published_text_through_the_command(stories, shared, capsys):
    reference = json.loads((shared / "checkpoints/stories260K/greedy_reference.json").read_text())
    assert main(["generate", "<s>", "-m", stories, "--temperature", "0", "--max-tokens", "200", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [1, *out["tokens"]] == reference["greedy_ids"]
    assert (out["finish_reason"], out["prompt_tokens"], out["generation_tokens"]) == ("length", 1, 200)


def test_streamed_text_and_statistics(stories, capsys):
    decoding.compiled_for.cache_clear()  # other tests may have compiled the same programs
    assert main(["generate", "-m", stories, "Once upon", "--temperature", "0", "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out == " a time, there was a little g\n"
    assert "8 generated" in err
    assert "peak memory" in err
    assert "compiling prefill" in err


def test_without_a_model_it_says_what_it_uses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["generate", "Once upon a time", "--max-tokens", "4", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out
    assert "random weights" in err
    assert str(tmp_path) in err


def test_a_file_of_prompts(stories, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Once upon"\n\n{"prompt": "The dog"}\n"Lily"\n')
    command = ["generate", "-m", stories, "--prompts", str(file), "--temperature", "0", "--max-tokens", "6"]
    assert main([*command, "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    for line, prompt in zip(lines, ("Once upon", "The dog", "Lily")):
        assert main(["generate", "-m", stories, prompt, "--temperature", "0", "--max-tokens", "6", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == line["text"]


def test_logprobs(stories, capsys):
    assert main(["generate", "-m", stories, "Once", "--temperature", "0", "--max-tokens", "3", "--logprobs", "2"]) == 0
    logprobs = json.loads(capsys.readouterr().out)["logprobs"]
    assert len(logprobs) == 3
    assert logprobs[0]["logprob"] == logprobs[0]["top"][0]["logprob"] > logprobs[0]["top"][1]["logprob"]


FAILS = [
    (["hi", "--temperature", "-1"], 1, "temperature"),
    (["hi", "--max-tokens", "9999"], 1, "512"),
    (["hi", "--system", "be kind"], 1, "template"),
    (["hi", "--no-think"], 1, "template"),
    (["hi", "--template-arg", "nonsense"], 1, "KEY=VALUE"),
    (["x" * 4000], 1, "context"),
    ([""], 1, "<s>"),
    ([], 2, "give a prompt"),
    (["a", "--prompts", "b.jsonl"], 2, "give a prompt"),
    (["hi", "--prompt-file", "b"], 2, "prompt-file"),
    (["hi", "--dtype", "int4"], 2, "int4"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), FAILS, ids=lambda x: str(x)[:40])
def test_bad_input_gets_one_message(stories, capsys, arguments, status, words):
    try:
        got = main(["generate", "-m", stories, *arguments])
    except SystemExit as end:
        got = end.code
    out, err = capsys.readouterr()
    assert got == status
    assert words in out + err
    assert "Traceback" not in err
    assert not out or status == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "line 1 is not JSON"), ('"a"\n5\n', "line 2"), ("", "no prompts"), ('{"text": "x"}', "line 1")],
)
def test_bad_prompt_files(stories, tmp_path, capsys, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert main(["generate", "-m", stories, "--prompts", str(file)]) == 1
    assert words in capsys.readouterr().err


def test_unknown_model_type_lists_what_is_known(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["generate", "-m", str(tmp_path), "hi"]) == 1
    err = capsys.readouterr().err
    assert "qwen3_moe" in err
    assert "gemma3" in err
    assert "olmo2" in err


def run(*arguments, **more):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **more)


def test_help_does_not_import_jax():
    code = "import sys, jaxlm.cli\ntry: jaxlm.cli.main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'jax', 'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    assert run("-c", code + heavy).stdout.splitlines()[-1] == "[]"


def test_module_reads_stdin(stories):
    arguments = ["generate", "-", "-m", stories, "--temperature", "0", "--max-tokens", "4"]
    done = run("-m", "jaxlm", *arguments, input="Once upon")
    assert (done.returncode, done.stdout) == (0, " a time, there\n")


def test_a_reader_that_leaves(stories):
    """`jaxlm generate … | head -c 1` ends quietly."""
    command = f'"{sys.executable}" -m jaxlm generate "Once" -m "{stories}" --max-tokens 100 | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=os.environ)
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr

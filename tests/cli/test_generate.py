"""`jaxlm generate` as a user types it, with the story model of the package. What any model shows runs on a tiny one."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny_files

import jaxlm
from jaxlm.cli import main, parse
from jaxlm.cli.common import STORIES
from jaxlm.cli.prompt_lines import PROMPT_FIELDS
from jaxlm.inference import compilation

# The same number of tokens and dtype in every test, so that they share compiled programs.
GREEDY = ["--temperature", "0", "--max-tokens", "48", "--dtype", "float32"]


@pytest.fixture
def stories():
    return str(STORIES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of two layers with random weights."""
    path = tmp_path_factory.mktemp("small")
    tiny_files.write(path)
    return str(path)


def test_greedy_tokens_are_the_likeliest_of_a_full_forward_pass(stories, capsys):
    """Without a cache, over the prompt and the answer at once."""
    assert main(["generate", "<|endoftext|>", "-m", stories, *GREEDY, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    model = jaxlm.load(stories, dtype="float32")
    logits, _ = model.forward(np.array([[0, *out["tokens"][:-1]]]), model.weights)
    assert out["tokens"] == np.asarray(logits)[0].argmax(-1).tolist()
    assert out["text"] == model.tokenizer.decode(out["tokens"])
    assert (out["finish_reason"], out["prompt_tokens"], out["generation_tokens"]) == ("length", 1, 48)


def test_streamed_text_and_statistics(stories, capsys):
    compilation.clear_executables()  # other tests may have compiled them
    assert main(["generate", "-m", stories, "Once upon", *GREEDY, "--stop", "irl"]) == 0
    out, err = capsys.readouterr()
    assert out == " a time, there was a little g\n"
    assert "8 generated" in err
    assert "peak memory" in err
    assert "compiling prefill" in err


def test_the_default_is_the_story_model(capsys):
    """In a few words of its own. A run without any flags: test_a_closed_pipe_ends_without_an_error."""
    assert main(["generate", "Once upon a time", "--seed", "1", "--max-tokens", "48", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "story model" in err
    assert len(set(re.findall("[a-z]+", out))) > 20


def test_a_file_of_prompts(small, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Once upon"\n\n{"prompt": "The dog"}\n"Lily"\n')
    assert main(["generate", "-m", small, "--prompts", str(file), *GREEDY, "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert len({line["text"] for line in lines}) == 3
    for line, prompt in zip(lines, ("Once upon", "The dog", "Lily")):
        assert main(["generate", "-m", small, prompt, *GREEDY, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == line["text"]


def test_logprobs(small, capsys):
    assert main(["generate", "-m", small, "Once", *GREEDY, "--logprobs", "2"]) == 0
    logprobs = json.loads(capsys.readouterr().out)["logprobs"]
    assert len(logprobs) == 48
    assert logprobs[0]["logprob"] == logprobs[0]["top"][0]["logprob"] > logprobs[0]["top"][1]["logprob"]


FAILS = [
    (["hi", "--temperature", "-1"], 1, "temperature"),
    (["hi", "--max-tokens", "9999"], 1, "512"),
    (["hi", "--system", "be kind"], 1, "template"),
    (["hi", "--no-think"], 1, "template"),
    (["hi", "--template-arg", "nonsense"], 1, "KEY=VALUE"),
    (["x" * 4000], 1, "context"),
    ([""], 2, "<s>"),
    ([], 2, "pass a prompt"),
    (["a", "--prompts", "b.jsonl"], 2, "not both"),
    (["hi", "--prompt-file", "b"], 2, "prompt-file"),
    (["hi", "--dtype", "int4"], 2, "int4"),
    (["--prompts", "nowhere.jsonl"], 1, "nowhere.jsonl cannot be read (No such file or directory)"),
    (["--prompts", "/"], 1, "/ cannot be read (Is a directory)"),
    (["hi", "--top-k", "many"], 2, "jaxlm generate --help"),
    (["hi", "--nonsense"], 2, "jaxlm generate --help"),
    (["hi", "--stop-token-ids", "4096"], 1, "stop_token_ids has 4096; this model's ids are 0 to 4095"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), FAILS, ids=lambda x: str(x)[:40])
def test_invalid_input_gives_one_message(stories, capsys, monkeypatch, arguments, status, words):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
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
    [
        ("{", ":1: the line is not valid JSON"),
        ('"a"\n5\n', ":2: expected a string"),
        ("", " has no prompts"),
        ('{"text": "x"}', ":1: the line has 'text': expected one of 'prompt', 'messages'"),
        (b'"a"\n"\xff"', ":2: byte 2 of the line is not UTF-8"),
        # Errors that need the model.
        ('"a"\n\n[1, 4096]\n', ":3: the prompt has token id 4096"),
        ('"a"\n["b"]\n', ":2: a prompt must be a str, a list of messages or a list of token ids"),
        ('"a"\n{"messages": [{"role": "user", "content": "hi"}]}', ":2: this tokenizer has no chat template"),
        ('{"prompt": "a", "chat_template_kwargs": {"x": 1}}', ":1: chat_template_kwargs needs a chat template"),
        (f'"a\u2028b"\n"{"x" * 4000}"\n', ":2: the prompt has"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_prompt_files(stories, tmp_path, capsys, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["generate", "-m", stories, "--prompts", str(file)]) == 1
    assert f"jaxlm: {file}{words}" in capsys.readouterr().err


def test_an_unknown_model_type_lists_the_supported_ones(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["generate", "-m", str(tmp_path), "hi"]) == 1
    err = capsys.readouterr().err
    assert "qwen3_moe" in err
    assert "gemma3" in err
    assert "olmo2" in err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "--max-length", "5"]])
def test_help_and_usage_errors_do_not_import_jax(arguments):
    code = f"import sys, jaxlm.cli\ntry: jaxlm.cli.main({arguments})\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'jax', 'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_piped_input_is_the_prompt(stories, monkeypatch, capsys):
    """With a dash in place of the prompt, and without."""
    command = ["generate", "-m", stories, *GREEDY, "--stop", " was"]
    for arguments, typed in ((["-"], "Once upon"), ([], "Once upon\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main([*command, *arguments]) == 0
        assert capsys.readouterr().out == " a time, there\n"
    for empty in (io.StringIO(""), None):  # None: a process without stdin
        monkeypatch.setattr("sys.stdin", empty)
        assert main(command) == 2
        assert "pass a prompt, as an argument or on stdin" in capsys.readouterr().err


def test_repeated_flags():
    line = "generate None --stop a --stop b --logit-bias 5 -1.5 --logit-bias 7 2 --stop-token-ids 3 --stop-token-ids 4"
    command = parse(line.split())
    assert command.prompt == "None"  # a text as any other
    assert command.sampling() == {"stop": ("a", "b"), "logit_bias": {5: -1.5, 7: 2.0}, "stop_token_ids": (3, 4),
                                  "ignore_eos": False}  # fmt: skip
    assert parse(["chat", "--top-k", "0"]).sampling() == {"top_k": 0, "ignore_eos": False}


def test_help_names_plain_types(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: jaxlm generate [PROMPT] [flags]" in out
    assert "--system STR" in out
    assert all(f'"{field}": …' in out or f'"{field}": […]' in out for field in PROMPT_FIELDS)
    assert "None}" not in out
    assert "Stop strings" in out


def test_a_closed_pipe_ends_without_an_error():
    """`jaxlm generate Once | head -c 1`: a prompt on the command line, and the default of every flag."""
    command = f'"{sys.executable}" -m jaxlm generate Once | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
    assert "broken pipe" not in done.stderr.lower().replace("brokenpipe", "broken pipe")

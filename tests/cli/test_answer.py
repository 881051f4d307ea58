"""How an answer is printed."""

import json

import pytest
from helpers.tiny_chat import SIZES, TEMPLATE, model_of, quick_compilation, tokenizer_of

from jaxlm.cli import main
from jaxlm.cli.answer import print_answer
from jaxlm.cli.common import ModelFlags
from jaxlm.inference.completion import CompletionChunk
from jaxlm.models import llama3
from jaxlm.nn import Rope

DIM, RESET = "\033[2m", "\033[0m"
THINKING = tokenizer_of(TEMPLATE, thinking=True)


def shown(capsys, monkeypatch, *chunks, opened=False, tokenizer=THINKING, tty=True, before="") -> str:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    last = print_answer(iter(map(CompletionChunk, chunks)), tokenizer, opened, before)
    assert last == chunks[-1]
    return capsys.readouterr().out


def test_reasoning_is_dim_on_a_terminal(capsys, monkeypatch):
    chunks = ("<think>", "hm", "</think>", "yes")
    assert shown(capsys, monkeypatch, *chunks) == f"{DIM}<think>hm</think>{RESET}yes{RESET}\n"
    assert shown(capsys, monkeypatch, *chunks[1:], opened=True) == f"{DIM}hm</think>{RESET}yes{RESET}\n"
    assert shown(capsys, monkeypatch, *chunks, tty=False) == "<think>hm</think>yes\n"
    assert shown(capsys, monkeypatch, *chunks, tokenizer=None) == "<think>hm</think>yes\n"
    assert shown(capsys, monkeypatch, *chunks, tokenizer=tokenizer_of(TEMPLATE)) == "<think>hm</think>yes\n"


def test_a_terminal_shows_the_text_that_is_continued(capsys, monkeypatch):
    given = {"before": "Once upon\x07", "tokenizer": None}
    assert shown(capsys, monkeypatch, " a time", **given) == f"{DIM}Once upon\\x07{RESET} a time\n"
    assert shown(capsys, monkeypatch, " a time", **given, tty=False) == " a time\n"


def test_an_interrupt_resets_the_terminal(capsys, monkeypatch):
    def chunks():
        yield CompletionChunk("<think>")
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        print_answer(chunks(), THINKING, False)
    assert capsys.readouterr().out == f"{DIM}<think>{RESET}"


@pytest.mark.parametrize("opened", [False, True])
def test_generate_prints_reasoning_as_chat_does(capsys, monkeypatch, opened):
    template = TEMPLATE.replace("<assistant>", "<assistant><think>") if opened else TEMPLATE
    config = llama3.Config(**SIZES, L=1, rope=Rope(), context=128)
    model = model_of(llama3, config, tokenizer_of(template, thinking=True))
    monkeypatch.setattr(ModelFlags, "load", lambda flags: model)
    tag = "</think>" if opened else "<think>"
    force = ["--logit-bias", str(model.tokenizer.convert_tokens_to_ids(tag)), "1e4"]
    command = ["generate", "hi", "--max-tokens", "2", "--temperature", "0", *force]
    with quick_compilation():
        assert main(command) == 0
        assert capsys.readouterr().out == f"{tag}{tag}\n"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert main(command) == 0
        want = DIM + 2 * f"{tag}{RESET}" if opened else 2 * f"{DIM}{tag}"
        assert capsys.readouterr().out == f"{want}{RESET}\n"
        assert main([*command, "--json"]) == 0  # for programs: no escape codes, and reasoning apart
        record = json.loads(capsys.readouterr().out)
        assert (record["reasoning"], record["text"]) == (("", tag) if opened else (tag, ""))

"""Tokenizers with their chat templates: templates written here (helpers.chat_templates), and published ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import chat_templates
from helpers.published import TEMPLATES, TOKENIZERS
from helpers.tiny_tokenizers import byte_fallback, byte_level, load, load_once, write_tiktoken

from jaxlm.processing.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "system", "content": " Be brief. "}, USER, {"role": "assistant", "content": "a\n"}, USER]


def check_one_bos(tok: Tokenizer, bos: int, what: str) -> None:
    ids = tok.chat([USER])
    assert ids[0] == bos, what
    assert ids.count(bos) == 1, what
    header = tok.encode("<|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    assert ids[-len(header) :] == header, what
    assert len(header) >= 4, what


def check_reasoning(tok: Tokenizer) -> None:
    assert tok.template_accepts("enable_thinking")
    assert tok.render([USER], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert tok.thinking == ("<think>", "</think>")


def check_date(tok: Tokenizer) -> None:
    assert tok.template_accepts("date_string")
    assert not tok.template_accepts("enable_thinking")
    assert "1 May 2000" in tok.render([USER], date_string="1 May 2000")
    assert tok.thinking is None


def check_refusals(tok: Tokenizer, no_system: str, alternating: str) -> None:
    """Of a template without system messages, and of one whose roles alternate."""
    tok.hf.chat_template = no_system
    with pytest.raises(ValueError, match="System role not supported"):
        tok.chat([SYSTEM, USER])
    tok.hf.chat_template = alternating
    with pytest.raises(ValueError, match="must alternate"):
        tok.chat([USER, USER])
    ids = tok.chat([SYSTEM, USER])
    assert ids[:2] == [2, 105]
    assert ids.count(2) == 1
    assert tok.stop_ids == (1, 106)


@pytest.mark.parametrize("name", chat_templates.MADE)
def test_the_template_closes_the_turn_with_a_stop(name, tmp_path):
    template, write, stop = chat_templates.MADE[name]
    tok = load(write(tmp_path))
    tok.hf.chat_template, tok.hf.eos_token = template, stop if name == "roles" else None
    assert tok.stop_ids == (tok.convert_tokens_to_ids(stop),)


def test_templates_with_a_header_per_turn(tmp_path):
    tok = load(write_tiktoken(tmp_path))
    tok.hf.chat_template = chat_templates.HEADERS
    check_one_bos(tok, 400, "headers")
    check_date(tok)
    assert re.search(r"The day is \d\d \w{3} \d{4}\.", tok.render([USER]))  # strftime_now is there


def test_templates_with_reasoning(tmp_path):
    tok = load(byte_level(tmp_path))
    tok.hf.chat_template = chat_templates.THINKING
    check_reasoning(tok)


def test_refusals(tmp_path):
    check_refusals(load(byte_fallback(tmp_path)), chat_templates.NO_SYSTEM, chat_templates.TURNS)


def test_ids_of_generation_config(tmp_path):
    """Ids that the vocabulary lacks too."""
    assert load(byte_level(tmp_path), {"eos_token_id": [128001, 128008, 128009]}).stop_ids == (128001, 128008, 128009)


def test_metas_chat_format(tmp_path):
    tok = load(write_tiktoken(tmp_path).parent)
    assert tok.stop_ids == (401, 409)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}".format
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "a"), ("user", "Hi")]
    text = "<|begin_of_text|>" + "".join(head(*turn) + "<|eot_id|>" for turn in said) + head("assistant", "")
    assert tok.render(TURNS) == text
    assert tok.chat(TURNS) == tok.encode(text)


# Published tokenizers and templates


@pytest.fixture
def published(shared):
    """Returns a function from names to a published tokenizer with a published template, until the test ends."""
    undo = []

    def combine(name: str, template: str, **tokens: str | None) -> Tokenizer:
        tok = load_once(shared / "tokenizers" / name)
        text = (shared / "chat_templates" / f"{template}.jinja").read_text()
        for which, value in {"chat_template": text, **tokens}.items():
            undo.append((tok.hf, which, getattr(tok.hf, which)))
            setattr(tok.hf, which, value)
        return tok

    yield combine
    for change in reversed(undo):
        setattr(*change)


def check_gemma(shared: Path, folder: Path) -> None:
    texts = ((shared / f"chat_templates/google-{name}-it.jinja").read_text() for name in ("gemma-2-2b", "gemma-3-1b"))
    check_refusals(load(byte_fallback(folder)), *texts)
    config = json.loads((shared / "generation_configs/google-gemma-3-1b-it.json").read_text())
    assert load(folder, config).stop_ids == (1, 106)
    config = json.loads((shared / "generation_configs/meta-llama-Meta-Llama-3.1-8B-Instruct.json").read_text())
    assert load(folder, config).stop_ids == (1, 128001, 128008, 128009)


def test_published_formats(shared, published, tmp_path):
    assert {f"tokenizers/{name}" for name, _ in TEMPLATES.values()} <= set(TOKENIZERS)
    assert load_once(shared / "tokenizers/qwen3").encode("") == []
    assert load_once(shared / "tokenizers/llama3").encode("<|begin_of_text|>a") == [128000, 64]
    for template in list(TEMPLATES)[:4]:
        check_one_bos(published("llama3", template), 128000, template)
    check_reasoning(published("qwen3", "Qwen-Qwen3-0.6B"))
    llama = published("llama3", "meta-llama-Llama-3.2-3B-Instruct")
    check_date(llama)
    assert "Today Date: 26 Jul 2024" not in llama.render([USER])  # strftime_now is there
    # OLMo's templates write the tokenizer's eos_token; the others must be found without its help
    for template, (name, stop) in TEMPLATES.items():
        tok = published(name, template, eos_token=stop if name == "olmo2" else None)
        assert tok.stop_ids == (tok.convert_tokens_to_ids(stop),), template
    check_gemma(shared, tmp_path)
    (tmp_path / "meta").mkdir()
    shutil.copy(shared / "tokenizers/llama3/tokenizer.model", tmp_path / "meta")
    tok, theirs = load(tmp_path / "meta"), published("llama3", "meta-llama-Meta-Llama-3-8B-Instruct")
    assert tok.stop_ids == (128001, 128009)
    assert tok.chat(TURNS) == theirs.chat(TURNS)

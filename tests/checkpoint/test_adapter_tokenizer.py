"""The tokenizer and chat template that tools save beside an adapter, and adapters of another base or tool."""

from pathlib import Path

import jax
import pytest
from helpers import tiny_files
from helpers.tiny_chat import TEMPLATE
from helpers.tiny_tokenizers import byte_level

import jaxlm
from jaxlm.checkpoint import peft
from jaxlm.cli import main
from jaxlm.models import llama3
from jaxlm.nn import lora

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of a base model without chat template."""
    base = tmp_path / "base"
    base.mkdir()
    tiny_files.write(base)
    cfg = llama3.Config.from_hf(tiny_files.CONFIG)
    tree = lora.init(lora.targets(llama3.PARAMS, cfg, ["q"]), cfg.L, 2, 0.5, jax.random.key(0))
    peft.write(tmp_path / "adapter", tree, llama3.PARAMS, cfg, base=str(base))
    return tmp_path / "adapter"


def beside(folder: Path, template: str | None = TEMPLATE) -> None:
    """Saves the base's tokenizer beside the adapter, with a chat template, as trainers do."""
    tokenizer = jaxlm.load(folder.parent / "base").tokenizer.hf
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_a_chat_template_beside_the_adapter_is_used_told_and_kept(adapter: Path, capsys) -> None:
    assert not jaxlm.load(adapter).tokenizer.has_template
    assert jaxlm.load(adapter).checkpoint.notes == ()
    beside(adapter)
    model = jaxlm.load(adapter)
    assert model.tokenizer.render(CHAT).endswith("<user>Hi<end><assistant>")
    [note] = model.checkpoint.notes
    assert "chat template" in note
    assert main(["generate", "-m", str(adapter), "Hi", "--max-tokens", "1"]) == 0
    assert note in capsys.readouterr().err
    assert main(["fuse", "-m", str(adapter), "--out", str(adapter.parent / "fused")]) == 0
    assert note in capsys.readouterr().err
    fused = jaxlm.load(adapter.parent / "fused").tokenizer
    assert fused.hf.chat_template == TEMPLATE
    jaxlm.export(jaxlm.fuse(model), adapter.parent / "exported")
    assert jaxlm.load(adapter.parent / "exported").tokenizer.hf.chat_template == TEMPLATE
    given = jaxlm.load(adapter, tokenizer=adapter.parent / "base")
    assert not given.tokenizer.has_template
    assert given.checkpoint.notes == ()


def test_a_tokenizer_without_a_template_keeps_that_of_the_base(adapter: Path) -> None:
    base = adapter.parent / "base"
    (base / "chat_template.jinja").write_text(TEMPLATE)
    beside(adapter, None)
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    model = jaxlm.load(adapter)
    assert model.tokenizer.hf.chat_template == TEMPLATE
    assert model.checkpoint.notes == ()
    jaxlm.export(jaxlm.fuse(model), adapter.parent / "exported")
    assert (adapter.parent / "exported/chat_template.jinja").read_text() == TEMPLATE


def test_added_tokens_that_no_text_needs(adapter: Path) -> None:
    """As of adapters that were saved with a token for padding, which the base does not have."""
    tokenizer = jaxlm.load(adapter.parent / "base").tokenizer.hf
    size = len(tokenizer)
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)
    model = jaxlm.load(adapter)
    assert model.tokenizer.vocab_size == size
    assert model.tokenizer.hf.chat_template == TEMPLATE
    assert "without 1 tokens" in model.checkpoint.notes[0]


def test_a_template_alone(adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    model = jaxlm.load(adapter)
    assert model.tokenizer.hf.chat_template == TEMPLATE
    assert "chat template" in model.checkpoint.notes[0]
    jaxlm.export(jaxlm.fuse(model), adapter.parent / "exported")
    assert (adapter.parent / "exported/chat_template.jinja").read_text() == TEMPLATE


def test_the_same_tokenizer_is_no_news(adapter: Path) -> None:
    beside(adapter, None)
    assert jaxlm.load(adapter).checkpoint.notes == ()


def test_a_tokenizer_with_more_tokens_than_the_base(adapter: Path) -> None:
    tokens = [f"<token {n}>" for n in range(600)]
    byte_level(adapter, additional_special_tokens=tokens)
    with pytest.raises(ValueError, match=r"beside the adapter .* tokens, and the base model has 258: .*--tokenizer"):
        jaxlm.load(adapter)


def test_another_base_than_the_named_one_is_told(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    tiny_files.write(tmp_path / "other")
    [note] = jaxlm.load(tmp_path / "other", adapter=adapter).checkpoint.notes
    assert str(tmp_path / "base") in note
    assert jaxlm.load(tmp_path / "base", adapter=adapter).checkpoint.notes == ()

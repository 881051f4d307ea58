"""The chat templates that training gives base models: texts of their formats, masks, and special tokens."""

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_chat import tokenizer_of
from helpers.tiny_tokenizers import byte_fallback, byte_level, load

from jaxlm.data.documents import DocumentTokenizer
from jaxlm.data.sources import Row
from jaxlm.processing.chat_formats import FORMATS, chat_format
from jaxlm.processing.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello.\n\nYes"},
    {"role": "user", "content": "Bye"},
]
TEXTS = {
    "chatml": "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    "Hello.\n\nYes<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.\n\nYes<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.\n\nYes"
    "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
}


def with_format(name: str, tokenizer: Tokenizer) -> Tokenizer:
    template, tokens = chat_format(name, tokenizer.hf)
    tokenizer.hf.chat_template = template
    tokenizer.add_special_tokens(tokens)
    return tokenizer


@pytest.fixture(params=FORMATS)
def tokenizer(request) -> Tokenizer:
    return with_format(request.param, tokenizer_of(None))


@pytest.mark.parametrize("name", FORMATS)
def test_texts(name) -> None:
    tokenizer = with_format(name, tokenizer_of(None))
    assert tokenizer.render(CHAT) == TEXTS[name]
    assert tokenizer.hf.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == TEXTS[name]
    end = tokenizer.convert_tokens_to_ids(FORMATS[name].tokens[-1])
    assert end in tokenizer.stop_ids
    assert tokenizer.chat(CHAT).count(tokenizer.bos_id) == 1


def test_masks_are_those_of_transformers(tokenizer) -> None:
    """Of an answer the text and the token that ends the turn are learned."""
    chat = CHAT[:3]
    [document] = DocumentTokenizer(tokenizer).documents([Row("a", 1, {"messages": chat})])
    theirs = tokenizer.hf.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert document.ids.tolist() == theirs["input_ids"]
    np.testing.assert_array_equal(document.loss_mask, np.array(theirs["assistant_masks"], bool))
    answer = tokenizer.decode(document.ids[document.loss_mask], skip_special=False)
    assert answer.startswith("Hello.\n\nYes<")


def test_a_system_message_alone_is_kept_or_refused(tokenizer) -> None:
    messages = [{"role": "system", "content": "Only this."}, {"role": "assistant", "content": "ok"}]
    assert "Only this." in tokenizer.render(messages)


def test_llama3_is_metas_text(tmp_path) -> None:
    from jaxlm.processing.tokenizer_files import META_CHAT_TEMPLATE

    tokenizer = with_format("llama3", tokenizer_of(None))
    assert tokenizer.render(CHAT, chat_template=META_CHAT_TEMPLATE) == TEXTS["llama3"]


def test_bos_is_written_where_the_tokenizer_adds_it(tmp_path) -> None:
    """A tokenizer may name a BOS token that it does not put before texts."""
    tokenizer = with_format("chatml", load(byte_level(tmp_path, bos_token="<|begin|>", eos_token="<|end|>")))
    assert tokenizer.render(CHAT[1:2]).startswith("<|im_start|>user")


def test_tokens_that_exist_keep_their_ids(tmp_path) -> None:
    before = load(byte_fallback(tmp_path))
    ids = before.convert_tokens_to_ids(list(FORMATS["gemma"].tokens))
    tokenizer = with_format("gemma", before)
    assert not tokenizer.has_new_tokens
    assert tokenizer.convert_tokens_to_ids(list(FORMATS["gemma"].tokens)) == ids
    size = tokenizer.vocab_size
    tokenizer.add_special_tokens(["the", "<new>"])  # one is a plain token of the vocabulary
    assert tokenizer.has_new_tokens
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("<new>", add_special_tokens=False) == [size]
    assert {size, tokenizer.convert_tokens_to_ids("the")} <= tokenizer.special_ids


def test_files(tmp_path: Path) -> None:
    hf = tokenizer_of(None).hf
    path = tmp_path / "a.jinja"
    path.write_text("{{ messages }}")
    assert chat_format(str(path), hf) == ("{{ messages }}", ())
    path.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        chat_format(str(path), hf)
    path.write_text("{{ messages }}\n{% for m in messages %}{{ m }}\n{% if m %}")
    with pytest.raises(ValueError, match=rf"{path} is not a valid jinja template: line 3: "):
        chat_format(str(path), hf)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        chat_format(str(path), hf)
    with pytest.raises(ValueError, match="neither a file nor one of chatml, llama3, gemma"):
        chat_format("alpaca", hf)

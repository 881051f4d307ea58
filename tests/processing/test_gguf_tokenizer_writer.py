"""Tokenizers as the metadata of GGUF files, read back: the same ids, special tokens and chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_chat import TEMPLATE
from helpers.tiny_tokenizers import SMALL, save
from helpers.tiny_tokenizers import load as load_tiny
from helpers.tiny_tokenizers import write as write_tiny
from helpers.varied_text import texts

from jaxlm.processing import gguf_tokenizer_writer as writer
from jaxlm.processing.gguf_tokenizer import PREFIX, from_metadata
from jaxlm.processing.gguf_tokenizer_writer import tokenizer_metadata, without_row
from jaxlm.processing.tokenizer import Tokenizer

TEXTS = texts(None)[::7]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return load_tiny(write_tiny("byte_level", tmp_path))


def read_back(tokenizer: Tokenizer, rows: int, ends: tuple[int, ...] | None = None) -> tuple[Any, dict[str, Any]]:
    metadata = tokenizer_metadata(tokenizer.hf, tokenizer.stop_ids if ends is None else ends, rows)
    return from_metadata(metadata, "x"), metadata


@pytest.mark.parametrize("kind", SMALL)
def test_small_tokenizers_come_back(kind, tmp_path):
    tokenizer = load_tiny(write_tiny(kind, tmp_path))
    tokenizer.hf.chat_template = TEMPLATE
    again, metadata = read_back(tokenizer, rows := tokenizer.vocab_size + 5)
    assert metadata[PREFIX + "model"] == ("gpt2" if kind == "byte_level" else "llama")
    assert len(metadata[PREFIX + "tokens"]) == rows
    assert again(TEXTS)["input_ids"] == tokenizer.hf(TEXTS)["input_ids"]
    assert again.get_vocab() == tokenizer.hf.get_vocab()
    assert again.chat_template == TEMPLATE
    assert (again.bos_token, again.eos_token) == (tokenizer.hf.bos_token, tokenizer.hf.eos_token)
    ids = tokenizer.encode("hello the cat\n 日本")
    assert again.decode(ids) == tokenizer.hf.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pre", "rows", "end"),
    [
        ("llama3", "llama-bpe", 128_256, "<|end_of_text|>"),
        ("qwen3", "qwen2", 151_936, "<|im_end|>"),
        ("olmo2", "dbrx", 100_352, "<|endoftext|>"),
    ],
)
def test_published_tokenizers_come_back(name, pre, rows, end, shared):
    tokenizer = load_tiny(shared / "tokenizers" / name)
    again, metadata = read_back(tokenizer, rows, (tokenizer.convert_tokens_to_ids(end),))
    assert metadata[PREFIX + "pre"] == pre
    assert again(TEXTS)["input_ids"] == tokenizer.hf(TEXTS)["input_ids"]
    assert again.get_vocab() == tokenizer.hf.get_vocab()


def test_special_tokens_and_what_surrounds_a_text(tokenizer):
    tokenizer.hf.chat_template = {"default": TEMPLATE, "tool_use": "x"}
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|im_end|>", "<|im_start|>")]
    again, metadata = read_back(tokenizer, 512, tuple(ends))
    assert (metadata[PREFIX + "add_bos_token"], metadata[PREFIX + "add_eos_token"]) == (True, False)
    assert metadata[PREFIX + "eos_token_id"] == ends[0]
    assert {metadata[PREFIX + "eot_token_id"], metadata[PREFIX + "eom_token_id"]} == set(ends[1:])
    assert again.chat_template == {"default": TEMPLATE, "tool_use": "x"}
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    kinds = dict(zip(metadata[PREFIX + "tokens"], metadata[PREFIX + "token_type"].tolist()))
    assert (kinds["<|end|>"], kinds["<think>"], kinds["a"], kinds["[PAD511]"]) == (3, 4, 1, 5)


def test_tokens_without_a_row_are_left_out(tokenizer):
    """Gemma 3's tokenizer has a token for images that text models have no row for."""
    tokenizer.hf.add_tokens(["<image>"])
    rows = tokenizer.vocab_size - 1
    assert without_row(tokenizer.hf, rows) == ["<image>"]
    again, metadata = read_back(tokenizer, rows)
    assert len(metadata[PREFIX + "tokens"]) == rows
    assert "<image>" not in again.get_vocab()


def changed(folder: Path, **fields: Any) -> Tokenizer:
    """The byte-level tokenizer of SMALL with these fields of tokenizer.json changed."""
    folder.mkdir(exist_ok=True)
    path = write_tiny("byte_level", folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    for name, value in fields.items():
        part, _, inner = name.partition("__")
        if inner:
            content[part][inner] = value
        else:
            content[part] = value
    path.write_text(json.dumps(content))
    return load_tiny(folder)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "words": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]}},
        r"no name in tokenizer\.ggml\.pre .*\\w\+.*known are gpt-2, smollm",
    ),
    "another step": ({"pre_tokenizer": {"type": "Whitespace"}}, "divides a text into words.*Whitespace"),
    "a prefix": ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}}, "add_prefix_space"),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, "normalizer.*Lowercase"),
    "two tokens before a text": (
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}}}},
        "more than BOS and EOS around it",
    ),
    "no merges of words": ({"model__ignore_merges": True}, "no name in tokenizer.ggml.pre"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_gguf_cannot_express_is_refused(case, tmp_path):
    fields, message = REFUSED[case]
    tokenizer = changed(tmp_path, **fields)
    with pytest.raises(ValueError, match=rf"cannot be written as GGUF.*{message}.*export to a folder"):
        tokenizer_metadata(tokenizer.hf, [1], 400)


def test_other_kinds_are_refused(tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Rust
    from tokenizers.models import BPE, Unigram

    unigram = Rust(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    characters = Rust(BPE({**{f"<0x{i:02X}>": i for i in range(256)}, "a": 256}, [], byte_fallback=True))
    cases = [(unigram, "its kind, Unigram"), (characters, "how it treats spaces")]
    for i, (rust, message) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        tokenizer = load_tiny(save(rust, tmp_path / str(i), {"eos_token": "a"}))
        with pytest.raises(ValueError, match=message):
            tokenizer_metadata(tokenizer.hf, [1], 400)
    flagged = load_tiny(write_tiny("byte_level", tmp_path))
    flagged.hf.add_tokens([AddedToken("<strip>", lstrip=True)])
    with pytest.raises(ValueError, match=r"'<strip>'.*take the spaces around them"):
        tokenizer_metadata(flagged.hf, [1], 400)


def test_merges_that_no_scores_give(tmp_path):
    """th and e are merged before t and h in other words: scores belong to tokens, not to pairs."""
    path = write_tiny("byte_fallback", tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["he"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content))  # t and he make "the" too, and there is no such merge
    with pytest.raises(ValueError, match="merges are not those that scores of tokens give"):
        tokenizer_metadata(load_tiny(tmp_path).hf, [1], 600)


def test_ends_and_rows_that_are_missing(tokenizer):
    with pytest.raises(ValueError, match="4 tokens end a text, and there are keys for 3"):
        tokenizer_metadata(tokenizer.hf, range(4), 512)
    with pytest.raises(ValueError, match="the embedding has 20 rows, and none for"):
        tokenizer_metadata(tokenizer.hf, [1], 20)
    tokenizer.hf.eos_token = None
    with pytest.raises(ValueError, match=r"no token ends a text.*eos_token_id in generation_config\.json"):
        tokenizer_metadata(tokenizer.hf, [], 512)


def test_metadata_that_give_other_ids_are_refused(tokenizer, monkeypatch):
    """What is written is read back and compared."""
    byte_level = writer._byte_level
    monkeypatch.setattr(writer, "_byte_level", lambda content: byte_level(content) | {"merges": []})
    with pytest.raises(ValueError, match=r"llama\.cpp's rules give other ids for"):
        tokenizer_metadata(tokenizer.hf, tokenizer.stop_ids, 512)

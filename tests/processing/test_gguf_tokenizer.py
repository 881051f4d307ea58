"""Tokenizers of GGUF files against the tokenizer.json that their metadata come from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers.gguf_writer import write
from helpers.varied_text import texts

from jaxlm.checkpoint import gguf
from jaxlm.processing.gguf_tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import Uncopied, import_transformers

BYTE = 6
ENDS = {"llama3": ["<|end_of_text|>", "<|eot_id|>"], "qwen3": ["<|im_end|>"], "olmo2": ["<|endoftext|>"]}
PRE = {"llama3": "llama-bpe", "qwen3": "qwen2", "olmo2": "dbrx"}


def metadata_of(content: dict[str, Any], pre: str) -> dict[str, Any]:
    """The metadata that llama.cpp writes for a byte-level tokenizer.json."""
    added = {token["id"]: token for token in content["added_tokens"]}
    ids = {i: token for token, i in content["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 4)]
    types = [
        (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL if i in ids else UNUSED
        for i in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name == "llama3" else pytest.param(name, marks=pytest.mark.slow) for name in PRE]
)
def test_byte_level_ids_equal_those_of_tokenizer_json(name, shared, tmp_path):
    folder = shared / "tokenizers" / name
    content = json.loads((folder / "tokenizer.json").read_text())
    theirs = import_transformers().PreTrainedTokenizerFast.from_pretrained(folder)
    metadata = metadata_of(content, PRE[name])
    ends = [theirs.convert_tokens_to_ids(token) for token in ENDS[name]]
    metadata |= {"tokenizer.ggml.eos_token_id": ends[0], "tokenizer.ggml.eot_token_id": ends[-1]}
    if name == "llama3":
        metadata["tokenizer.ggml.bos_token_id"] = theirs.convert_tokens_to_ids("<|begin_of_text|>")
    ours = Tokenizer.load(write(tmp_path / "model.gguf", metadata, {}))
    assert ours is not None
    found = texts(shared, corpus=50_000)
    assert ours.hf(found)["input_ids"] == theirs(found)["input_ids"]
    assert ours.hf.get_vocab() == theirs.get_vocab()
    assert ours.eos_ids == set(ends)
    ids = ours.encode("naïve 日本語 <|eot_id|>\n  x")
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


def test_a_wrong_kind_of_words_changes_ids(shared, tmp_path):
    """The texts tell the kinds apart: the test above can fail."""
    content = json.loads((shared / "tokenizers" / "qwen3" / "tokenizer.json").read_text())
    right, wrong = (
        Tokenizer.load(write(tmp_path / f"{pre}.gguf", metadata_of(content, pre), {})) for pre in ("qwen2", "smollm")
    )
    assert right is not None
    assert wrong is not None
    assert right.encode("foo.bar(x)\n\n  y") != wrong.encode("foo.bar(x)\n\n  y")


SPM = {
    "<unk>": (0.0, UNKNOWN), "<s>": (0.0, CONTROL), "</s>": (0.0, CONTROL),
    **{f"<0x{i:02X}>": (0.0, BYTE) for i in range(256)},
    "▁▁": (0.0, USER_DEFINED), "▁": (-9.0, NORMAL), "a": (-10.0, NORMAL), "b": (-11.0, NORMAL), "c": (-12.0, NORMAL),
    "ab": (-3.0, NORMAL), "bc": (-2.0, NORMAL), "▁a": (-1.0, NORMAL), "▁ab": (-4.0, NORMAL), "abc": (-5.0, NORMAL),
    "<turn>": (0.0, USER_DEFINED),
}  # fmt: skip


def sentencepiece(**fields: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": list(SPM),
        "tokenizer.ggml.scores": [score for score, _ in SPM.values()],
        "tokenizer.ggml.token_type": [kind for _, kind in SPM.values()],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("written", "fields", "expected"),
    [
        ("abc", {"add_space_prefix": False}, ["<s>", "abc"]),
        ("abc", {}, ["<s>", "▁a", "bc"]),  # not ▁ab and c: bc has a better score
        ("ab", {}, ["<s>", "▁ab"]),
        ("a<turn>b", {"add_space_prefix": False}, ["<s>", "a", "<turn>", "b"]),
        ("a  b", {"add_space_prefix": False}, ["<s>", "a", "▁▁", "b"]),
        ("é", {"add_space_prefix": False}, ["<s>", "<0xC3>", "<0xA9>"]),
        ("a", {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}, ["a", "</s>"]),
    ],
)
def test_sentencepiece_merges_by_score(written, fields, expected, tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "model.gguf", sentencepiece(**fields), {}))
    assert tokenizer is not None
    ids = tokenizer.encode(written)
    assert tokenizer.hf.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == written


def test_runs_of_spaces_are_written_with_spaces_or_with_marks(tmp_path):
    metadata = sentencepiece(add_space_prefix=False)
    spaces = ["  " if token == "▁▁" else token for token in SPM]
    one, other = (
        Tokenizer.load(write(tmp_path / f"{i}.gguf", {**metadata, "tokenizer.ggml.tokens": tokens}, {}))
        for i, tokens in enumerate((list(SPM), spaces))
    )
    assert one is not None
    assert other is not None
    assert one.encode("a  b ▁▁") == other.encode("a  b ▁▁")
    assert one.hf.get_vocab() == other.hf.get_vocab()


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["<s>", "abc"]), ("dbrx", ["ab", "c"])])
def test_llama_3_takes_words_that_are_tokens_and_adds_bos(pre, expected, tmp_path):
    """No merge makes abc."""
    tokens = ["<s>", "a", "b", "c", "ab", "abc"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, *[NORMAL] * 5], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
    }  # fmt: skip
    tokenizer = Tokenizer.load(write(tmp_path / "model.gguf", metadata, {}))
    assert tokenizer is not None
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("abc")) == expected


def test_chat_templates(tmp_path):
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    metadata = {**sentencepiece(), "tokenizer.chat_template": template}
    tokenizer = Tokenizer.load(write(tmp_path / "one.gguf", metadata, {}))
    assert tokenizer is not None
    assert tokenizer.hf.chat_template == template
    assert tokenizer.stop_ids == (2,)
    named = Tokenizer.load(write(tmp_path / "two.gguf", {**metadata, "tokenizer.chat_template.tool_use": "x"}, {}))
    assert named is not None
    assert named.hf.chat_template == {"default": template, "tool_use": "x"}


def test_a_tokenizer_is_not_copied():
    """transformers would copy it through JSON, which takes seconds and hundreds of megabytes for Gemma's."""
    from tokenizers import models

    rust = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    hf = import_transformers().PreTrainedTokenizerFast(tokenizer_object=Uncopied(rust))
    assert hf.backend_tokenizer is rust


def test_a_file_without_a_tokenizer(tmp_path):
    for metadata in ({}, {"tokenizer.ggml.model": "none"}):
        assert Tokenizer.load(write(tmp_path / "model.gguf", metadata, {})) is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"model": "t5"}, "'t5', is not supported .*--tokenizer"),
    "words": ({"model": "gpt2", "pre": "tekken"}, "'tekken', is not supported .*llama-bpe"),
    "no words": ({"model": "gpt2"}, "'None', is not supported"),
    "no tokens": ({"tokens": []}, "not a list of tokens"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "not a list of tokens"),
    "a long token": ({"tokens": ["a" * 1001] * len(SPM)}, "more than 1,000 characters"),
    "few scores": ({"scores": [1.0]}, "scores does not have a number for each"),
    "scores that are text": ({"scores": "x"}, "scores does not have a number for each"),
    "many special tokens": (
        {"tokens": ["a"] * 10_001, "scores": [0.0] * 10_001, "token_type": [CONTROL] * 10_001},
        "more than 10,000 special tokens",
    ),
    "no such id": ({"bos_token_id": 10_000}, "bos_token_id is not the id of a token"),
    "merges": ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b c"]}, "merges is not a list of pairs"),
    "a merge of no token": ({"model": "gpt2", "pre": "gpt-2", "merges": ["x y"]}, "out of vocabulary"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, tmp_path):
    fields, message = WRONG[case]
    path = write(tmp_path / "model.gguf", sentencepiece(**fields), {})
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_arrays_keep_their_numbers(tmp_path):
    read = gguf.read(Path(write(tmp_path / "model.gguf", sentencepiece(), {}))).metadata
    assert read["tokenizer.ggml.scores"].dtype == np.float32
    assert read["tokenizer.ggml.token_type"].tolist() == [kind for _, kind in SPM.values()]

"""The metadata of a GGUF file that stand for a transformers tokenizer: the inverse of gguf_tokenizer.py.

GGUF has names for the ways in which llama.cpp divides a text into words, not the rules themselves. A tokenizer is
written only if a name stands for its rules, and if the metadata, read back, give the same token ids for a text.
Source: convert_hf_to_gguf.py and src/llama-vocab.cpp in ggml-org/llama.cpp.
"""

import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxlm.processing.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PREFIX,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
    from_metadata,
)

WAY_OUT = "export to a folder, in Hugging Face's format (a name without .gguf)"
SPECIAL_SCORE = -1000.0  # of tokens that no merge makes: the converter's value
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
# Every rule by which published tokenizers divide a text gives other ids for a part of this.
PROBE = (
    "Hello world, it's naïve: DON'T we'll I've\n\n  x=  12 345\t31415 (a_b){y}[0] != 3.14e-10…\r\n"
    "Straße ΑΒΓ Привет שָׁלוֹם مرحبا हिन्दी ไทย 日本語 한국어 ½ ² 👩\u200d👧 🇩🇪   \u3000\xa0 ▁▁ Ġ <0x0A> ends  \n"
)
PROBE_TOKENS = 8  # of the added tokens, the first and the last ones that are put into the text


def tokenizer_metadata(hf: Any, ends: Collection[int], rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer, its special tokens and its chat template.

    Args:
        hf: A fast transformers tokenizer.
        ends: Ids of the tokens that end an answer.
        rows: Number of rows of the embedding. Added tokens beyond it are left out (`without_row`), and rows without a
            token get one that no text has.

    Raises:
        ValueError: GGUF cannot express the tokenizer; the message says why.
    """
    try:
        own = {**_vocabulary(hf, rows), **_special(hf, ends, rows)}
        metadata = {PREFIX + key: value for key, value in own.items()} | _chat_template(hf.chat_template)
        _check(hf, metadata, rows)
    except ValueError as error:
        raise ValueError(f"the tokenizer cannot be written as GGUF ({error}): {WAY_OUT}") from None
    return metadata


def _vocabulary(hf: Any, rows: int) -> dict[str, Any]:
    """The kind of tokenizer, its rules, and its tokens."""
    content = json.loads(hf.backend_tokenizer.to_str())
    tokens, types = _tokens(content, hf, rows)
    is_bpe = content["model"]["type"] == "BPE"
    if is_bpe and content["model"].get("byte_fallback"):
        own = _sentencepiece(content, tokens, types)
    elif is_bpe and content["decoder"] and content["decoder"]["type"] == "ByteLevel":
        own = _byte_level(content)
    else:
        raise ValueError(f"its kind, {content['model']['type']}, is not byte-level BPE or SentencePiece's BPE")
    return {**own, "tokens": tokens, "token_type": types}


def without_row(hf: Any, rows: int) -> list[str]:
    """The tokens that a model with this number of rows in its embedding cannot read."""
    return sorted(token for token, token_id in hf.get_vocab().items() if token_id >= rows)


def _tokens(content: Mapping[str, Any], hf: Any, rows: int) -> tuple[list[str], np.ndarray]:
    """The token of each row, and its type."""
    added = {token["id"]: token for token in content["added_tokens"]}
    if flagged := [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]:
        raise ValueError(f"{flagged[0]!r} and perhaps others take the spaces around them, or are whole words")
    vocabulary = hf.get_vocab()
    if beyond := [token for token, i in vocabulary.items() if i >= rows and i not in added]:
        raise ValueError(f"the embedding has {rows:,} rows, and none for {beyond[0]!r}")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = np.full(rows, UNUSED, np.int32)
    has_bytes = bool(content["model"].get("byte_fallback"))
    for token, i in vocabulary.items():
        if i >= rows:
            continue
        tokens[i], types[i] = token, BYTE if has_bytes and token in BYTES else NORMAL
        if i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
    if has_bytes and hf.unk_token_id is not None and hf.unk_token_id < rows:
        types[hf.unk_token_id] = UNKNOWN
    return tokens, types


# Byte-level BPE


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    pre = _pre_tokenizer(content)
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == pre), None)
    if name is None:
        raise ValueError(
            f"no name in tokenizer.ggml.pre stands for how it divides a text into words: {_brief(pre)}; known are "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def _pre_tokenizer(content: Mapping[str, Any]) -> PreTokenizer:
    """How a tokenizer.json divides a text into words. ValueError for a step that no entry of PRE_TOKENIZERS has."""
    normalizers = _steps(content["normalizer"], "normalizers")
    if normalizers not in ([], [{"type": "NFC"}]):
        raise ValueError(f"its normalizer, {_brief(normalizers)}, is not NFC")
    steps, found = _steps(content["pre_tokenizer"], "pretokenizers"), PreTokenizer(nfc=bool(normalizers))
    if steps and steps[0] == {"type": "Digits", "individual_digits": True}:
        found, steps = found._replace(digits=True), steps[1:]
    if steps and steps[0]["type"] == "Split" and "Regex" in steps[0]["pattern"]:
        # A regular expression of words that matches all of a text: what is between two matches is empty.
        if (steps[0]["behavior"], steps[0]["invert"]) not in (("Isolated", False), ("Removed", True)):
            raise ValueError(f"how it divides a text into words, {_brief(steps[0])}")
        found, steps = found._replace(words=steps[0]["pattern"]["Regex"]), steps[1:]
    last = steps[0] if len(steps) == 1 else {}
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": found.words is None}
    if {key: last.get(key) for key in wanted} != wanted:
        raise ValueError(f"how it divides a text into words, {_brief(content['pre_tokenizer'])}")
    return found._replace(is_llama3=bool(content["model"].get("ignore_merges")))


def _steps(step: Any, name: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer; `name` is the field of a sequence."""
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:300] + "…"


# SentencePiece's BPE

_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
# Divides at spaces, of which there are none behind the normalizer.
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _sentencepiece(content: Mapping[str, Any], tokens: list[str], types: np.ndarray) -> dict[str, Any]:
    """Scores in the order of the merges. Runs of spaces are written with spaces, as llama.cpp finds them."""
    normalizers = _steps(content["normalizer"], "normalizers")
    if normalizers not in ([_SPACES], [_PREPEND, _SPACES]) or content["pre_tokenizer"] not in (None, _NO_SPLIT):
        raise ValueError(f"how it treats spaces: {_brief([content['normalizer'], content['pre_tokenizer']])}")
    if absent := BYTES - set(tokens):
        raise ValueError(f"it has no token for the byte {min(absent)}")
    scores = _scores(content["model"]["merges"], tokens, types)
    for i, token in enumerate(tokens):
        if types[i] == USER_DEFINED and not token.strip(SPACE):
            tokens[i] = " " * len(token)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": len(normalizers) == 2}


def _scores(merges: list[Any], tokens: list[str], types: np.ndarray) -> np.ndarray:
    """The score of each token [V] float32: less the later it is merged. llama.cpp merges the pair whose token has the
    best score, whatever the pair is. So the merges must be all pairs that make a token, and those of a token must
    follow each other."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    kinds = dict(zip(tokens, types))
    pairs = [pair for pair in pairs if kinds.get("".join(pair)) == NORMAL]
    order = [token for token, _ in itertools.groupby("".join(pair) for pair in pairs)]
    parts = {token for token, kind in kinds.items() if kind in (NORMAL, USER_DEFINED)}
    splits = {
        (token[:at], token[at:])
        for token in parts
        if kinds[token] == NORMAL
        for at in range(1, len(token))
        if token[:at] in parts and token[at:] in parts
    }
    if len(set(order)) < len(order) or splits != set(pairs):
        raise ValueError("its merges are not those that scores of tokens give")
    rank = {token: i for i, token in enumerate(order)}
    scores = [-float(rank.get(token, len(rank) + i)) for i, token in enumerate(tokens)]
    return np.where(np.isin(types, (NORMAL, UNUSED)), scores, SPECIAL_SCORE).astype(np.float32)


# Special tokens and the chat template


def _special(hf: Any, ends: Collection[int], rows: int) -> dict[str, Any]:
    """Ids of the special tokens, and which of them surround every text."""
    plain, whole = (hf.encode("a", add_special_tokens=add) for add in (False, True))
    before = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else whole[:1]
    after = whole[len(before) + len(plain) :]
    bos = hf.bos_token_id if hf.bos_token_id is not None else (before[0] if before else None)
    eos = hf.eos_token_id if hf.eos_token_id is not None else min(ends, default=None)
    if before not in ([], [bos]) or after not in ([], [eos]) or before + plain + after != whole:
        raise ValueError(f"it puts {hf.convert_ids_to_tokens(whole)} for 'a', more than BOS and EOS around it")
    if eos is None:
        raise ValueError("no token ends a text, and llama.cpp would choose one: set eos_token_id in "
                         "generation_config.json")  # fmt: skip
    others = sorted({*ends} - {eos})
    if len(others) > 2:
        raise ValueError(f"{1 + len(others)} tokens end a text, and there are keys for 3: {[eos, *others]}")
    ids = {"bos": bos, "eos": eos, "unknown": hf.unk_token_id, "padding": hf.pad_token_id}
    ids |= dict(zip(("eot", "eom"), others))
    found = {f"{name}_token_id": token_id for name, token_id in ids.items() if token_id is not None}
    if beyond := [name for name, token_id in found.items() if token_id >= rows]:
        raise ValueError(f"the embedding has no row for {beyond[0]} {found[beyond[0]]}")
    return {**found, "add_bos_token": bool(before), "add_eos_token": bool(after)}


def _chat_template(template: Any) -> dict[str, Any]:
    """The chat template, or several by name."""
    key = "tokenizer.chat_template"
    if not template:
        return {}
    if isinstance(template, str):
        return {key: template}
    named = {name: text for name, text in template.items() if name != "default"}
    default = {key: template["default"]} if "default" in template else {}
    return {**default, "tokenizer.chat_templates": list(named), **{f"{key}.{n}": text for n, text in named.items()}}


def _check(hf: Any, metadata: Mapping[str, Any], rows: int) -> None:
    """ValueError unless the metadata, read back, give the same ids for a text that tokenizers treat differently."""
    added = [token for token, i in hf.get_added_vocab().items() if i < rows]
    text = PROBE + "a ".join([*added[:PROBE_TOKENS], *added[-PROBE_TOKENS:], ""])
    if (theirs := from_metadata(metadata, "GGUF").encode(text)) != (ours := hf.encode(text)):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        raise ValueError(f"llama.cpp's rules give other ids for {hf.decode(ours[max(at - 3, 0) : at + 3])!r}")

"""The tokenizer in the metadata of a GGUF file, as a transformers tokenizer.

Source: convert_hf_to_gguf.py and src/llama-vocab.cpp in ggml-org/llama.cpp; convert_slow_tokenizer.py in transformers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint import gguf
from jaxlm.processing.tokenizer_files import (
    MAX_SPECIAL_TOKENS,
    META_WORDS,
    Uncopied,
    import_transformers,
    naming_errors,
)

# Values of tokenizer.ggml.token_type. A byte is <0x0A>.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PREFIX = "tokenizer.ggml."
MAX_LENGTH = 1_000  # characters of a token: the time to find its merges is quadratic in this
SPACE = "▁"  # in SentencePiece's tokens
QWEN_WORDS = META_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizer(NamedTuple):
    """What a value of tokenizer.ggml.pre stands for.

    Attributes:
        words: regular expression of a word; None: GPT-2's, which tokenizers has built in.
        digits: every digit is a word of its own.
        nfc: normalize to Unicode's NFC.
        is_llama3: a word that is a token is not split, and texts begin with BOS unless the file says otherwise.
    """

    words: str | None = None
    digits: bool = False
    nfc: bool = False
    is_llama3: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "refact": PreTokenizer(digits=True),
    "llama-bpe": PreTokenizer(META_WORDS, is_llama3=True),
    "llama3": PreTokenizer(META_WORDS, is_llama3=True),
    "llama-v3": PreTokenizer(META_WORDS, is_llama3=True),
    "dbrx": PreTokenizer(META_WORDS),
    "smaug-bpe": PreTokenizer(META_WORDS),
    "qwen2": PreTokenizer(QWEN_WORDS, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(QWEN_WORDS, nfc=True),
}


def from_gguf(path: Path) -> tuple[Any, list[int]] | None:
    """The transformers tokenizer of a GGUF file and the EOS ids in its metadata; None if the file has no tokenizer.

    Raises:
        ValueError: the file is damaged, or the tokenizer is of a kind that is not supported.
    """
    file = gguf.read(path)
    kind = file.metadata.get(PREFIX + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: its kind of tokenizer, {str(kind)[:80]!r}, is not supported (supported: gpt2, "
                         "llama): pass the tokenizer of the original model (--tokenizer FOLDER)")  # fmt: skip
    with naming_errors(f"the tokenizer in {file.path} cannot be read"):
        hf = from_metadata(file.metadata, str(file.path))
        hf.encode("a")  # some errors occur only when a text is encoded
    return hf, gguf.eos_ids(file.metadata)


def from_metadata(metadata: Mapping[str, Any], name: str) -> Any:
    """The transformers tokenizer of metadata whose tokenizer.ggml.model is gpt2 or llama."""
    vocabulary = Vocabulary.of(metadata)
    is_sentencepiece = metadata[PREFIX + "model"] == "llama"
    tokenizer = (_sentencepiece if is_sentencepiece else _byte_level)(vocabulary, metadata)
    tokenizer.add_tokens(vocabulary.added())
    tokenizer.post_processor = vocabulary.around(is_sentencepiece or _pre_tokenizer(metadata).is_llama3)
    names = ("bos", "eos", "unk", "pad")
    special = {f"{name}_token": token for name in names if (token := vocabulary.special(name)) is not None}
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=Uncopied(tokenizer),
        name_or_path=name,
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        **special,
    )


class Vocabulary(NamedTuple):
    """The tokens of a file by id, their types, and the metadata."""

    tokens: list[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        tokens = metadata.get(PREFIX + "tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise ValueError("tokenizer.ggml.tokens is not a list of tokens")
        if max(map(len, tokens)) > MAX_LENGTH:
            raise ValueError(f"it has a token of more than {MAX_LENGTH:,} characters")
        types = _numbers(metadata, "token_type", len(tokens)) or [NORMAL] * len(tokens)
        if sum(kind in (UNKNOWN, CONTROL, USER_DEFINED) for kind in types) > MAX_SPECIAL_TOKENS:
            raise ValueError(f"it has more than {MAX_SPECIAL_TOKENS:,} special tokens")
        if metadata.get(PREFIX + "model") == "llama":  # llama.cpp writes tokens that are runs of spaces with spaces
            tokens = [token if token.strip(" ") else SPACE * len(token) for token in tokens]
        return cls(tokens, types, metadata)

    def ids(self) -> dict[str, int]:
        """Id by token, without tokens that only fill the embedding."""
        used = [(token, i) for i, token in enumerate(self.tokens) if not self._is_padding(i)]
        return dict(reversed(used))  # the first of equal tokens counts

    def _is_padding(self, i: int) -> bool:
        return self.types[i] == UNUSED and re.fullmatch(r"\[PAD\d+\]", self.tokens[i]) is not None

    def added(self) -> list[Any]:
        """The tokens that are found in a text before it is divided into words."""
        from tokenizers import AddedToken

        found = ((token, kind) for token, kind in zip(self.tokens, self.types) if token)
        return [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in found
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def special(self, name: str) -> str | None:
        """A special token (bos, eos, unk, pad); None if the file does not name it."""
        key = PREFIX + {"unk": "unknown", "pad": "padding"}.get(name, name) + "_token_id"
        if key not in self.metadata:
            return None
        if not 0 <= (token_id := gguf.integer(self.metadata, key, -1)) < len(self.tokens):
            raise ValueError(f"{key} is not the id of a token")
        return self.tokens[token_id]

    def around(self, bos: bool) -> Any:
        """What the tokenizer puts around a text: BOS and EOS. `bos` is the default for BOS."""
        from tokenizers.processors import TemplateProcessing

        add = {"bos": self.metadata.get(PREFIX + "add_bos_token", bos),
               "eos": self.metadata.get(PREFIX + "add_eos_token", False)}  # fmt: skip
        tokens = {name: token for name, wanted in add.items() if wanted and (token := self.special(name))}
        pieces = [
            tokens[name] if name != "text" else "$A" for name in ("bos", "text", "eos") if name in {*tokens, "text"}
        ]
        ids = self.ids()
        return TemplateProcessing(single=pieces, special_tokens=[(token, ids[token]) for token in set(tokens.values())])


def _numbers(metadata: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """An array with a number per token; empty if it is absent."""
    values = metadata.get(PREFIX + name)
    if values is None:
        return []
    if not hasattr(values, "tolist") or len(values) != count:
        raise ValueError(f"{PREFIX}{name} does not have a number for each of {count:,} tokens")
    return values.tolist()


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get(PREFIX + "pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"how it divides a text into words, tokenizer.ggml.pre {str(name)[:80]!r}, is not supported (supported: "
            f"{', '.join(PRE_TOKENIZERS)}): pass the tokenizer of the original model (--tokenizer FOLDER)"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Any:
    """A byte-level BPE tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre, merges = _pre_tokenizer(metadata), metadata.get(PREFIX + "merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise ValueError("tokenizer.ggml.merges is not a list of pairs")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids(), merges=pairs, ignore_merges=pre.is_llama3))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.words is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> Any:
    """SentencePiece's BPE, like those of Llama 2 and Gemma: pairs are merged in the order of the scores of tokens, and
    characters without a token are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _numbers(metadata, "scores", len(vocabulary.tokens))
    if not scores:
        raise ValueError("it has no tokenizer.ggml.scores")
    pairs = _merges(vocabulary, scores)
    unknown = vocabulary.special("unk")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    starts_with_space = metadata.get(PREFIX + "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if starts_with_space else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if starts_with_space else steps)
    return tokenizer


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs of tokens that make another token, best score first. Tokens defined by the user come before all others:
    SentencePiece finds them first."""
    kinds = {NORMAL: 0.0, USER_DEFINED: math.inf}
    entries = zip(vocabulary.tokens, scores, vocabulary.types)
    score = {token: value + kinds[kind] for token, value, kind in entries if kind in kinds}
    found = []
    for token, value in score.items():
        length = len(token)
        for at in range(1, length):
            if token[:at] in score and token[at:] in score:
                found.append((-value, -at, at - length, token))
    return [(token[:-at], token[-at:]) for _, at, _, token in sorted(found)]


def _chat_template(metadata: Mapping[str, Any]) -> Any:
    """The chat template, or several by name; None if the file has none."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(key + "."): text for name, text in metadata.items() if name.startswith(key + ".")}
    found = {name: text for name, text in {"default": metadata.get(key), **named}.items() if isinstance(text, str)}
    return found.get("default") if found.keys() <= {"default"} else found

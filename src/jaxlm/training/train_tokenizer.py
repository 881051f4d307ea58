"""Trains tokenizers with the tokenizers library: byte-level BPE, byte-level unigram, characters.

Encoding and decoding are lossless for every text: BPE and unigram have all 256 bytes as tokens, and characters outside
the vocabulary of a character tokenizer are encoded as bytes. Nothing is normalized.

One special token, <|endoftext|>, begins and ends every document. One is enough, because a BOS after an EOS adds no
information. It is this one, because text files separate documents with it; "<s>" is also markup.

The same texts give the same tokenizer, byte for byte.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.data.formats import InvalidRowError, TextOptions, conversation, text_of
from jaxlm.data.readers import SEPARATOR, InvalidRow, Row, location
from jaxlm.data.sources import Source, find_sources

BYTES = 256
VOCAB_SIZE = 8192  # default
MEASURED = 10_000_000  # characters on which the compression is measured
Kind = Literal["bpe", "unigram", "char"]


class Trained(NamedTuple):
    """A trained tokenizer.

    Attributes:
        folder: Where it was written.
        vocabulary: Number of tokens.
        characters, tokens: Length of the first texts, for the compression.
        notes: What is worth a word about the sources.
    """

    folder: Path
    vocabulary: int
    characters: int
    tokens: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ratio = f"{self.characters / self.tokens:.2f} characters per token on {self.characters:,} characters"
        return f"{self.vocabulary:,} tokens, {ratio}"


def train_tokenizer(
    names: str | Path | Sequence[str | Path],
    out: str | Path,
    kind: Kind = "bpe",
    vocab_size: int | None = None,
    special: Sequence[str] = (),
    options: TextOptions | None = None,
    force: bool = False,
    **source: Any,
) -> Trained:
    """Trains a tokenizer on files, folders, globs or hub datasets, and writes tokenizer.json and tokenizer_config.json.

    Args:
        names: What to read.
        out: Folder to write to; other files in it stay.
        kind: "bpe", "unigram" or "char".
        vocab_size: Number of tokens, including bytes and special tokens. Default: 8,192; for characters, all that
            occur. A small text gives fewer.
        special: Special tokens besides <|endoftext|>.
        options: Which fields of rows are read; of conversations, the contents of all messages.
        force: Replace a tokenizer in the folder.
        source: split, config, revision, offline, as in data.sources.find_sources.

    Raises:
        ValueError: An argument is out of range, or a row cannot be used.
        OSError: A source cannot be read, or the folder cannot be written.
    """
    out = Path(out)
    if (out / "tokenizer.json").exists() and not force:
        raise FileExistsError(f"{out} already has a tokenizer: choose another folder, or replace it with --force")
    tokens = [SEPARATOR, *special]
    if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
        raise ValueError(f"special tokens must be distinct and not blank, got {', '.join(map(repr, tokens))}")
    if kind not in TRAINERS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(TRAINERS)}")
    least = BYTES + len(tokens)
    if vocab_size is not None and vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and special tokens alone are {least}")
    sources = find_sources(names, **source)
    texts = lambda: _texts(sources, options or TextOptions())  # noqa: E731
    rust = TRAINERS[kind](texts(), vocab_size, tokens)
    _add_bos(rust)
    _save(rust, out)
    return _measure(rust, out, texts())._replace(notes=tuple(source.note for source in sources if source.note))


def _texts(sources: Iterable[Source], options: TextOptions) -> Iterator[str]:
    """Yields all texts of sources. Raises ValueError for a row that cannot be used, and if there is no text."""
    any_text = False
    for source in sources:
        for row in source.rows():
            if isinstance(row, InvalidRow):
                raise ValueError(str(row))
            for text in _of_row(row, options):
                any_text = any_text or bool(text)
                yield text
    if not any_text:
        raise ValueError("no text to train on")


def _of_row(row: Row, options: TextOptions) -> list[str]:
    format = options.format_of(row.value)
    where = location(row.source, row.number)
    if format is None:
        raise ValueError(f"{where}: no known field among {', '.join(row.value)}: name one (--text-field)")
    with explain_errors(where, on=InvalidRowError):
        if format == "text":
            return [text_of(row.value, options)]
        chat = conversation(row.value, format, options, train_on="all", template=True)
        return [message["content"] for message in getattr(chat, "messages", [])]


def _bpe(texts: Iterator[str], size: int | None, special: list[str]) -> Any:
    from tokenizers import models, trainers

    rust = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size or VOCAB_SIZE, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    rust.train_from_iterator(texts, trainer)
    return rust


def _unigram(texts: Iterator[str], size: int | None, special: list[str]) -> Any:
    from tokenizers import models, trainers

    rust = _byte_level(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=size or VOCAB_SIZE, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    rust.train_from_iterator(texts, trainer)
    # The trainer sums in the order of a hash table, which also decides the scores of bytes that do not occur (the least
    # score and steps of 0.0001 above it). Rounding and equal scores for those make every run give the same file.
    pieces = json.loads(rust.to_str())["model"]["vocab"][len(special) :]
    least = min(score for _, score in pieces)
    even = [(piece, least if len(piece) == 1 and score < least + BYTES * 1e-4 else score) for piece, score in pieces]
    ordered = sorted(((piece, round(score, 6)) for piece, score in even), key=lambda item: (-item[1], item[0]))
    rust = _byte_level(models.Unigram([*((token, 0.0) for token in special), *ordered]))
    rust.add_special_tokens(special)
    return rust


def _char(texts: Iterator[str], size: int | None, special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ordered = sorted(counts, key=lambda char: (-counts[char], char))
    chars = sorted(ordered[: None if size is None else size - BYTES - len(special)])
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(BYTES)), *chars]
    rust = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
    rust.add_special_tokens(special)
    return rust


TRAINERS = {"bpe": _bpe, "unigram": _unigram, "char": _char}


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    rust = Tokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    rust.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return rust


def _add_bos(rust: Any) -> None:
    """Adds BOS to every text: the token that ends a document begins the next one."""
    from tokenizers.processors import TemplateProcessing

    rust.post_processor = TemplateProcessing(
        f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, rust.token_to_id(SEPARATOR))]
    )


def _save(rust: Any, out: Path) -> None:
    """Writes both files atomically, the tokenizer last."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR, "eos_token": SEPARATOR,
              "clean_up_tokenization_spaces": False}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("tokenizer_config.json", json.dumps(config, indent=2)), ("tokenizer.json", rust.to_str(True))):
        write_atomically(out / name, text)


def _measure(rust: Any, out: Path, texts: Iterator[str]) -> Trained:
    characters = tokens = 0
    for text in texts:
        part = text[: MEASURED - characters]
        characters += len(part)
        tokens += len(rust.encode(part, add_special_tokens=False).ids)
        if characters >= MEASURED:
            break
    return Trained(out, rust.get_vocab_size(), characters, tokens)

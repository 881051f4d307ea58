"""New tokenizers, trained by the tokenizers library: byte-level BPE, byte-level unigram, characters.

Whatever the kind, every text survives there and back, to the byte: BPE and unigram have all 256 bytes as pieces, and
what no character of the vocabulary can say is spelled in bytes. Nothing is normalized.

One special token, <|endoftext|>, begins and ends every document. It is one because a begin that follows an end says
nothing new; it is this one because files of documents hold it already between them, where "<s>" is also markup.

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
from jaxlm.data.sources import SEPARATOR, File, Hub, InvalidRow, Row, find, place

BYTES = 256
SIZE = 8192  # of a vocabulary, where none is asked for
MEASURED = 10_000_000  # characters, on which a tokenizer is measured
Kind = Literal["bpe", "unigram", "char"]


class Trained(NamedTuple):
    """Where a tokenizer was written, how many tokens it has, and what it makes of the first texts."""

    folder: Path
    vocabulary: int
    characters: int
    tokens: int

    def __str__(self) -> str:
        measured = f"{self.characters / self.tokens:.2f} characters a token on {self.characters:,} characters"
        return f"{self.vocabulary:,} tokens, {measured}"


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
        out: a folder; other files in it stay.
        vocab_size: tokens in all, bytes and special ones included. None: 8,192; of characters all that occur.
            A small text gives fewer.
        special: special tokens besides <|endoftext|>.
        options: which fields of rows are read; of conversations the contents of all messages.
        force: replace the tokenizer that stands there.
        source: split, config, revision, offline, as of training.sources.find.

    Raises ValueError or OSError for what cannot be read, trained on or written.
    """
    out = Path(out)
    if (out / "tokenizer.json").exists() and not force:
        raise FileExistsError(f"{out} holds a tokenizer already: name another folder, or replace it (--force)")
    tokens = [SEPARATOR, *special]
    if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
        raise ValueError(f"special tokens are different and not blank, got {', '.join(map(repr, tokens))}")
    if kind not in TRAINERS:
        raise ValueError(f"{kind!r} is none of the kinds {', '.join(TRAINERS)}")
    least = BYTES + len(tokens)
    if vocab_size is not None and vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} has no room: bytes and special tokens alone are {least}")
    sources = find(names, **source)
    texts = lambda: _texts(sources, options or TextOptions())  # noqa: E731
    trained = TRAINERS[kind](texts(), vocab_size, tokens)
    _finish(trained)
    _save(trained, out)
    return _measured(trained, out, texts())


def _texts(sources: Iterable[File | Hub], options: TextOptions) -> Iterator[str]:
    """All texts of these sources. ValueError where one cannot be read, or where there is none."""
    found = False
    for source in sources:
        for row in source.rows():
            if isinstance(row, InvalidRow):
                raise ValueError(str(row))
            for text in _of_row(row, options):
                found = found or bool(text)
                yield text
    if not found:
        raise ValueError("there is no text to train on")


def _of_row(row: Row, options: TextOptions) -> list[str]:
    format = options.format_of(row.value)
    where = place(row.source, row.number)
    if format is None:
        raise ValueError(f"{where}: no text in the fields {', '.join(row.value)}: name one (--text-field)")
    with explain_errors(where, on=InvalidRowError):
        if format == "text":
            return [text_of(row.value, options)]
        chat = conversation(row.value, format, options, train_on="all", template=True)
        return [message["content"] for message in getattr(chat, "messages", [])]


def _bpe(texts: Iterator[str], size: int | None, special: list[str]) -> Any:
    from tokenizers import models, trainers

    rust = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size or SIZE, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    rust.train_from_iterator(texts, trainer)
    return rust


def _unigram(texts: Iterator[str], size: int | None, special: list[str]) -> Any:
    from tokenizers import models, trainers

    rust = _byte_level(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=size or SIZE, special_tokens=special, initial_alphabet=_alphabet(), show_progress=False
    )  # pyright: ignore[reportCallIssue]
    rust.train_from_iterator(texts, trainer)
    # The trainer adds up in the order of a hash table, and lets it choose the scores of bytes that do not occur: those
    # are the least score and steps of 0.0001 above it. What is left is the same in every run.
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


def _finish(rust: Any) -> None:
    """Every text begins with the token that ended the one before."""
    from tokenizers.processors import TemplateProcessing

    rust.post_processor = TemplateProcessing(
        f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, rust.token_to_id(SEPARATOR))]
    )


def _save(rust: Any, out: Path) -> None:
    """Both files appear whole, the tokenizer last."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR, "eos_token": SEPARATOR,
              "clean_up_tokenization_spaces": False}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("tokenizer_config.json", json.dumps(config, indent=2)), ("tokenizer.json", rust.to_str(True))):
        write_atomically(out / name, text)


def _measured(rust: Any, out: Path, texts: Iterator[str]) -> Trained:
    characters = tokens = 0
    for text in texts:
        part = text[: MEASURED - characters]
        characters += len(part)
        tokens += len(rust.encode(part, add_special_tokens=False).ids)
        if characters >= MEASURED:
            break
    return Trained(out, rust.get_vocab_size(), characters, tokens)

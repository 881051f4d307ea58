"""`jaxlm tokenizer train`: trains a tokenizer on texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import note


@dataclass(frozen=True)
class Tokenizer:
    """Train a tokenizer: jaxlm tokenizer train FILES --out FOLDER.

    Writes tokenizer.json and tokenizer_config.json, which jaxlm and transformers read. The tokenizer is lossless.
    <|endoftext|> begins and ends every document.
    """

    action: tyro.conf.Positional[Annotated[Literal["train"] | None, tyro.conf.arg(metavar="train")]] = None
    """The action."""
    files: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")]] = ()
    """Texts: .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow files, folders, globs, or hub datasets."""
    out: Path | None = None
    """Folder to write to."""
    kind: Literal["bpe", "unigram", "char"] = "bpe"
    """Byte-level BPE, byte-level unigram, or characters (unknown characters are encoded as bytes)."""
    vocab_size: int | None = None
    """Number of tokens, including 256 bytes and special tokens. Default: 8192; for char, all characters that occur."""
    special: tuple[str, ...] = ()
    """Special tokens besides <|endoftext|>."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    split: str = "train"
    """Split of a folder or hub dataset."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    offline: bool = False
    """Use local files and the cache only, without network access."""
    force: bool = False
    """Replace a tokenizer in the folder."""
    quiet: bool = False
    """Print results and errors only: no notices."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def is_single_process(self) -> bool:
        return True

    def run(self) -> int:
        if self.action is None or not self.files or self.out is None:
            usage("pass files and a folder: jaxlm tokenizer train FILES --out FOLDER (--help)")
        from jaxlm.data.formats import TextOptions
        from jaxlm.training.train_tokenizer import train_tokenizer

        note(f"training a {self.kind} tokenizer …")
        trained = train_tokenizer(
            self.files, self.out, self.kind, self.vocab_size, self.special, TextOptions(text_field=self.text_field),
            self.force, split=self.split, config=self.config, offline=self.offline,
        )  # fmt: skip
        for text in trained.notes:
            note(text)
        note(f"wrote {trained.folder}")
        print(trained)
        if self.vocab_size and trained.vocabulary < self.vocab_size:
            note(f"these are fewer tokens than --vocab-size {self.vocab_size:,}: the texts have no more that repeat")
        return 0

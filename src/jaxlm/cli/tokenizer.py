"""`jaxlm tokenizer train`: a new tokenizer from texts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.common import note


@dataclass(frozen=True)
class Tokenizer:
    """Train a tokenizer: jaxlm tokenizer train FILES --out FOLDER.

    It is written as tokenizer.json and tokenizer_config.json, which jaxlm and transformers read. Every text survives
    there and back; <|endoftext|> begins and ends each.
    """

    action: tyro.conf.Positional[Annotated[Literal["train"] | None, tyro.conf.arg(metavar="train")]] = None
    """What is to be done."""
    files: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")]] = ()
    """Texts: .txt, .jsonl, .json or .parquet files, folders, globs, or the name of a hub dataset."""
    out: Path | None = None
    """The folder to write."""
    kind: Literal["bpe", "unigram", "char"] = "bpe"
    """Byte-level BPE, byte-level unigram, or characters (with bytes for those that are not in the vocabulary)."""
    vocab_size: int | None = None
    """Tokens in all, 256 bytes and special ones included; default: 8192, for char all characters that occur."""
    special: tuple[str, ...] = ()
    """A special token besides <|endoftext|>; may be repeated."""
    text_field: str = "text"
    """Field of a row that is a text."""
    split: str = "train"
    """Split of a folder or hub dataset that has several."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    offline: bool = False
    """Use the local cache only, never the network."""
    force: bool = False
    """Replace the tokenizer that stands in the folder."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def is_single_process(self) -> bool:
        return True

    def run(self) -> int:
        if self.action is None or not self.files or self.out is None:
            print("jaxlm: name texts and a folder: jaxlm tokenizer train FILES --out FOLDER (--help)", file=sys.stderr)
            return 2
        from jaxlm.data.formats import TextOptions
        from jaxlm.training.train_tokenizer import train_tokenizer

        note(f"training a {self.kind} tokenizer …")
        done = train_tokenizer(
            self.files, self.out, self.kind, self.vocab_size, self.special, TextOptions(text_field=self.text_field),
            self.force, split=self.split, config=self.config, offline=self.offline,
        )  # fmt: skip
        note(f"wrote {done.folder}")
        print(done)
        return 0

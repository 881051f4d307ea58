"""A tokenizer of each kind: small ones made here, their GGUF metadata, tiktoken's format, and published files."""

from pathlib import Path

from helpers.published import SHARED, TOKENIZERS
from helpers.tiny_tokenizers import SMALL, load, write, write_tiktoken
from jaxlm.processing.gguf_tokenizer import from_metadata
from jaxlm.processing.gguf_tokenizer_writer import tokenizer_metadata
from jaxlm.processing.tokenizer import Tokenizer

TIKTOKEN, GGUF = "tiktoken", "gguf "
REAL = [*TOKENIZERS, "tokenizers/llama3/tokenizer.model"] if SHARED.is_dir() else []
KINDS = [*SMALL, *(GGUF + kind for kind in SMALL), TIKTOKEN, *REAL]


def make(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer of one of KINDS. Files are written to the folder."""
    if kind in REAL:
        return load(SHARED / kind)
    if kind == TIKTOKEN:
        return load(write_tiktoken(folder))
    tokenizer = load(write(kind.removeprefix(GGUF), folder))
    if not kind.startswith(GGUF):
        return tokenizer
    metadata = tokenizer_metadata(tokenizer.hf, tokenizer.stop_ids, tokenizer.vocab_size + 5)
    return Tokenizer(from_metadata(metadata, kind), tokenizer.stop_ids)

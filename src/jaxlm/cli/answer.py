"""An answer as a person sees it: its text while it comes, what a model thinks dim, and the line of counts after it."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.inference.generation import CompletionChunk
    from jaxlm.processing.tokenizer import Tokenizer

DIM, RESET = "\033[2m", "\033[0m"


def print_answer(
    pieces: "Iterator[CompletionChunk]", tokenizer: "Tokenizer | None", opened: bool
) -> "CompletionChunk | None":
    """Streams an answer to stdout; -> its last piece. On a terminal a block of thinking is dim; `opened` says that the
    prompt ended inside of one."""
    tags = tokenizer.thinking if tokenizer is not None and sys.stdout.isatty() else None
    piece = None
    try:
        for piece in pieces:
            text = str(piece)
            if tags:
                text = text.replace(tags[0], DIM + tags[0]).replace(tags[1], tags[1] + RESET)
                text, opened = DIM + text if opened else text, False
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:  # also where Ctrl-C ends it
        sys.stdout.write(RESET if tags else "")
    print(flush=True)
    return piece


def statistics(piece: "CompletionChunk", new: int | None = None) -> str:
    """The line after an answer: counts, speeds, memory. new: how many tokens of the prompt had to be computed, where
    that may be fewer than all."""
    from jaxlm.devices.hardware import gigabytes, peak_memory

    prompt = piece.prompt_tokens
    parts = [f"{prompt:,} prompt tokens" if new is None else f"{new:,} of {prompt:,} tokens new"]
    parts.append(f"{piece.generation_tokens:,} generated")
    if piece.tokens_per_second:
        parts.append(f"{piece.tokens_per_second:.1f} tokens/s")
    parts.append(f"first after {piece.first_token_seconds:.2f} s")
    if piece.compile_seconds >= 0.05:
        parts.append(f"compiled {piece.compile_seconds:.1f} s")
    return " · ".join([*parts, f"peak memory {gigabytes(peak_memory())}"])

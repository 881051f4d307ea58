"""Prints an answer on the terminal: streamed text with dim reasoning, then a line of counts and speeds."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.inference.completion import CompletionChunk
    from jaxlm.processing.tokenizer import Tokenizer

DIM, RESET = "\033[2m", "\033[0m"


def print_answer(
    chunks: "Iterator[CompletionChunk]", tokenizer: "Tokenizer | None", opened: bool
) -> "CompletionChunk | None":
    """Streams an answer to stdout. On a terminal, reasoning is dim.

    Args:
        chunks: The answer.
        tokenizer: The tokenizer, for the tags around reasoning.
        opened: Whether the prompt ends inside a reasoning block.

    Returns:
        The last chunk, None for an empty answer.
    """
    tags = tokenizer.thinking if tokenizer is not None and sys.stdout.isatty() else None
    chunk = None
    try:
        for chunk in chunks:
            text = str(chunk)
            if tags:
                text = text.replace(tags[0], DIM + tags[0]).replace(tags[1], tags[1] + RESET)
                text, opened = DIM + text if opened else text, False
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:  # also after Ctrl-C
        sys.stdout.write(RESET if tags else "")
    print(flush=True)
    return chunk


def statistics(chunk: "CompletionChunk", prefilled: int | None = None) -> str:
    """The line after an answer: token counts, speed, memory.

    Args:
        chunk: The last chunk of the answer.
        prefilled: Number of prompt tokens that were not in the KV cache; all by default.
    """
    from jaxlm.devices.hardware import gigabytes, peak_memory

    prompt = chunk.prompt_tokens
    parts = [f"{prompt:,} prompt tokens" + ("" if prefilled is None else f" ({prompt - prefilled:,} cached)")]
    parts.append(f"{chunk.generation_tokens:,} generated")
    if chunk.tokens_per_second:
        parts.append(f"{chunk.tokens_per_second:.1f} tokens/s")
    parts.append(f"first token {chunk.first_token_seconds:.2f} s")
    if chunk.compile_seconds >= 0.05:
        parts.append(f"compilation {chunk.compile_seconds:.1f} s")
    return " · ".join([*parts, f"peak memory {gigabytes(peak_memory())}"])

"""Prints an answer on the terminal: streamed text with dim reasoning, then a line of counts and speeds."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxlm.cli import terminal
from jaxlm.cli.terminal import DIM, RESET
from jaxlm.cli.wrapping import visible

if TYPE_CHECKING:
    from jaxlm.inference.completion import CompletionChunk
    from jaxlm.processing.tokenizer import Tokenizer


def print_answer(
    chunks: "Iterator[CompletionChunk]", tokenizer: "Tokenizer | None", opened: bool, before: str = ""
) -> "CompletionChunk | None":
    """Streams an answer to stdout. On a terminal, reasoning is dim, lines break at words, and control characters are
    escapes.

    Args:
        chunks: The answer.
        tokenizer: The tokenizer, for the tags around reasoning.
        opened: Whether the prompt ends inside a reasoning block.
        before: The text that the answer continues. A terminal shows it, dim.

    Returns:
        The last chunk, None for an empty answer.

    Raises:
        BrokenPipeError: The reader closed stdout.
        OutputError: stdout cannot be written.
    """
    tags = tokenizer.thinking if tokenizer is not None and terminal.is_styled(sys.stdout) else None
    chunk = None
    with terminal.wrapping() as wrap:
        held = DIM if tags and opened else ""
        try:
            if wrap and before:
                terminal.write(wrap.feed(terminal.dim(visible(before), sys.stdout)))
            for chunk in chunks:
                text = visible(str(chunk)) if wrap else str(chunk)
                if tags:
                    text = held + text.replace(tags[0], DIM + tags[0]).replace(tags[1], tags[1] + RESET)
                    held = ""
                terminal.write(wrap.feed(text) if wrap else text)
        except Exception:
            end_text(wrap, bool(tags))
            terminal.end_line()  # the error begins on a line of its own
            raise
        except BaseException:  # Ctrl-C
            end_text(wrap, bool(tags))
            raise
        end_text(wrap, bool(tags))
        terminal.write("\n")
    terminal.end_line()
    return chunk


def end_text(wrap: "terminal.WordWrap | None", styled: bool) -> None:
    """Writes what was held back, and ends the style."""
    terminal.erase_compiling()
    terminal.write((wrap.flush() if wrap else "") + (RESET if styled else ""))


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

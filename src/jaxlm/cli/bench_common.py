"""Shared by the parts of `jaxlm bench`: lists of numbers, and progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxlm.cli import terminal
from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import is_terminal, note


def integers(flag: str, text: str) -> list[int]:
    """The numbers of a list such as 1,8,32. Exits with status 2 if it is none, or has one below 1 (below 0 for -d)."""
    least = 0 if flag == "-d" else 1
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        usage(f"{flag} takes whole numbers separated by commas, not {text!r} (jaxlm bench --help)")
    if min(found) < least:
        usage(f"{flag} is {text}, but must be at least {least} (jaxlm bench --help)")
    return list(dict.fromkeys(found))


def numbers_above_zero(flag: str, text: str) -> list[float]:
    """The numbers of a list such as 0.5,1,2. Exits with status 2 if it is none, or has one that is not above 0."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        usage(f"{flag} takes numbers separated by commas, not {text!r} (jaxlm bench --help)")
    if not all(0 < value < float("inf") for value in found):
        usage(f"{flag} is {text}, but must be above 0 (jaxlm bench --help)")
    return list(dict.fromkeys(found))


@contextmanager
def own_flags() -> Iterator[None]:
    """Names the flags of this command in messages that name those of `jaxlm generate`."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        text = str(error).replace("--batch-size", "-b").replace("--max-tokens", "-n")
        raise type(error)(text) from error


@contextmanager
def progress_line() -> Iterator[Any]:
    """Yields a function that shows on stderr what runs now and how long all may take: one line of a terminal, else a
    line each."""

    def show(text: str, seconds: float | None) -> None:
        left = "" if seconds is None else f", about {seconds:.0f} s left"
        if is_terminal(sys.stderr):
            terminal.progress_line(f"{text}{left}")
        else:
            note(f"{text}{left}")

    try:
        yield show
    finally:
        terminal.erase_line()

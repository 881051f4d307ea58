"""Error messages: one line on stderr, without a traceback unless --debug is set."""

from typing import Any, NoReturn

from jaxlm.cli import terminal
from jaxlm.cli.common import ProcessFlags


def explain(error: Exception, command: Any = None) -> str:
    """The message for an error.

    Args:
        error: What a command raised.
        command: The command. Its `memory_hint` says how to use less device memory.
    """
    text = ". ".join([str(error), *getattr(error, "__notes__", [])])
    # Also a ValueError: jax raises it where an array of a failed program is read.
    if any(word in text for word in ("Gloo", "NCCL", "coordination service")):
        return f"another process ended or cannot be reached; its error output has the cause ({text.splitlines()[0]})"
    if isinstance(error, ValueError | OSError | MemoryError):
        return text
    if "RESOURCE_EXHAUSTED" in text:
        hint = getattr(command, "memory_hint", ProcessFlags.memory_hint)
        return f"out of memory on the device: {text.splitlines()[0]}. Use {hint}"
    return f"{type(error).__name__}: {text} (--debug shows the traceback; please report it)"


def usage(*lines: str) -> NoReturn:
    """Exits with status 2 (wrong usage)."""
    for line in lines:
        terminal.say(f"jaxlm: {line}")
    raise SystemExit(2)


def refuse_quantize(quantize: str | None, command: str) -> None:
    """Exits with status 2 for --quantize, which would change nothing in this command."""
    if quantize is not None:
        usage(f"--quantize does not apply to {command}: leave it out (generate, chat, serve and eval take it)")

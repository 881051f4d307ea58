"""Reads the messages of a chat: typed at a terminal, or piped line by line."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from jaxlm.cli import interrupts, terminal

QUOTE = '"""'
OPEN = re.compile(r"\s*(/\w+\s+)?" + QUOTE)  # begins a message, or the text of a command


def reader() -> Callable[[], str]:
    """A function that reads the next message. It raises EOFError at the end of the input."""
    if sys.stdin is None or not sys.stdin.isatty():
        return lambda: read_message(read_line)
    screen = next((stream for stream in (sys.stdout, sys.stderr) if terminal.is_terminal(stream)), None)
    if screen is None:  # no control codes: the terminal itself edits lines
        return lambda: read_message(read_typed_line)
    return prompt_session(screen)


def prompt_session(screen: Any) -> Callable[[], str]:
    """Reads messages from a terminal, with editing, history and pasted lines as one message.

    Args:
        screen: stdout or stderr, on which the message is shown.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.output import create_output

    # It would ask the terminal where the cursor is, and warn where there is no answer.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    session = PromptSession(
        output=create_output(screen),
        multiline=Condition(lambda: is_open(get_app().current_buffer.text)),  # Enter begins a new line
        prompt_continuation="  ",
    )

    def read() -> str:
        try:
            return session.prompt("> ", handle_sigint=False)
        finally:
            interrupts.renew()

    return read


def read_typed_line() -> str:
    """Reads a line from a terminal without control codes."""
    terminal.show("> ")
    try:
        return read_line()
    except EOFError:  # Ctrl-D leaves the cursor behind the prompt
        terminal.say("")
        raise


def read_line() -> str:
    """Reads a line of piped input.

    Raises:
        EOFError: The input has ended.
        ValueError: The line is not in the encoding of stdin.
    """
    raw = getattr(sys.stdin, "buffer", sys.stdin)
    line = raw.readline() if raw is not None else ""
    if not line:
        raise EOFError
    return (decode(line, "this line of stdin") if isinstance(line, bytes) else line).rstrip("\r\n")


def read_message(read: Callable[[], str]) -> str:
    """Reads a line, and further lines to the end of a message in triple quotes."""
    text = read()
    while is_open(text):
        try:
            text += "\n" + read()
        except EOFError:
            raise ValueError(f"the input ends inside a message: end it with {QUOTE}") from None
    return text


def is_open(text: str) -> bool:
    """Whether a text begins with triple quotes and does not end with them."""
    opening = OPEN.match(text)
    return opening is not None and not text[opening.end() :].rstrip().endswith(QUOTE)


def split_message(text: str) -> tuple[str, str]:
    """The command (`/set`; empty for a message) and the text behind it, without triple quotes. A quoted message is no
    command."""
    opening = OPEN.match(text)
    if opening is None or is_open(text):
        if not text.startswith("/"):
            return "", text
        command, *rest = text.split(None, 1)
        return command, rest[0].strip() if rest else ""
    body = text[opening.end() :].rstrip().removesuffix(QUOTE)
    return (opening[1] or "").strip(), body.removeprefix("\n").removesuffix("\n")


def read_stdin() -> str:
    """Reads all of stdin.

    Raises:
        ValueError: It is not in its encoding.
    """
    if sys.stdin is None:
        return ""
    raw = getattr(sys.stdin, "buffer", None)
    if raw is None:
        return sys.stdin.read()
    return decode(raw.read(), "stdin").replace("\r\n", "\n")


def decode(data: bytes, what: str) -> str:
    """The text of bytes from stdin, which are UTF-8 unless PYTHONIOENCODING or the locale says otherwise.

    Raises:
        ValueError: They are not.
    """
    encoding = (sys.stdin.encoding or "utf-8").lower()
    encoding = "utf-8" if encoding in ("ascii", "us-ascii", "ansi_x3.4-1968") else encoding  # a locale without letters
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} at position {error.start:,}"
        raise ValueError(f"{what} is not {encoding} ({at}): convert it (iconv -f latin1 -t utf-8), or set "
                         "PYTHONIOENCODING to its encoding") from None  # fmt: skip


def check_text(text: str, what: str) -> str:
    """Returns a text from the command line.

    Raises:
        ValueError: It has bytes that are not UTF-8, which Python passes on as surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: convert it, for example with iconv -f latin1 -t utf-8") from None
    return text

"""What commands write: answers on stdout, notices and errors on stderr.

Both may be one terminal. While the line of an answer is not complete, a notice waits for its end.
"""

import codecs
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from jaxlm.cli import interrupts
from jaxlm.cli.wrapping import STYLE, WordWrap, hanging

DIM, RESET = "\033[2m", "\033[0m"
PASTE_ON, PASTE_OFF = "\033[?2004h", "\033[?2004l"  # bracketed paste: the terminal marks pasted text
ESCAPING = "jaxlm.escape"  # an error handler of codecs


class OutputError(OSError):
    """stdout cannot be written."""


class _State:
    quiet = False  # --quiet
    wrap: WordWrap | None = None  # of the answer that is written to a terminal
    mid_line = False  # whether the line on stdout is not complete
    waiting: tuple[str, ...] = ()  # notices
    compiling = False  # whether the notice of a compilation is shown
    progress = False  # whether a progress line is shown
    escaped = False  # whether it was said that characters are written as escapes


def set_quiet(quiet: bool) -> None:
    """Turns notices off or on."""
    _State.quiet = quiet


def is_quiet() -> bool:
    return _State.quiet


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that takes control codes."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def is_styled(stream: Any) -> bool:
    """Whether text on a stream may be bold or dim: not where NO_COLOR is set (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def shows_progress() -> bool:
    """Whether progress is shown, in a line of stderr that is erased at the end."""
    return is_terminal(sys.stderr) and not _State.quiet


def dim(text: str, stream: Any) -> str:
    return f"{DIM}{text}{RESET}" if is_styled(stream) else text


def console(**options: Any) -> Any:
    """A rich console, without styles where NO_COLOR is set (rich leaves out colors alone)."""
    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        options["color_system"] = None
    return Console(**options)


# Text on stdout


def write(text: str) -> None:
    """Writes text to stdout at once.

    Raises:
        BrokenPipeError: The reader closed stdout.
        OutputError: stdout cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from error
    if shown := STYLE.sub("", text):
        _State.mid_line = not shown.endswith("\n")


def unwritable(error: OSError) -> OutputError:
    return OutputError(f"stdout cannot be written: {error.strerror or error}")


def end_line() -> None:
    """Ends the line on stdout, and prints the notices that waited for it."""
    if _State.mid_line:
        write("\n")
    waiting, _State.waiting = _State.waiting, ()
    for text in waiting:
        note(text)


def drop_stdout() -> None:
    """Discards what stdout holds, which Python would try to write again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _State.mid_line = False


def print_json(value: Any, **options: Any) -> None:
    """Prints a value as JSON. In an encoding that does not have every letter, others are JSON escapes."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    write(json.dumps(value, ensure_ascii=not encoding.startswith("utf"), **options) + "\n")


def use_any_encoding() -> None:
    """Makes stdout and stderr take every letter: one that their encoding does not have is written as an escape. That is
    said once for stdout."""
    codecs.register_error(ESCAPING, _escape)
    for stream, errors in ((sys.stdout, ESCAPING), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if not _State.escaped and isinstance(error, UnicodeEncodeError):
        _State.escaped = True
        note(f"stdout is {error.encoding}, which does not have all characters of the text: the others are escapes such "
             r"as \u20ac (PYTHONIOENCODING=utf-8 writes them)")  # fmt: skip
    return codecs.lookup_error("backslashreplace")(error)


def columns(stream: Any = None) -> int:
    """The width of the terminal on stdout, or on another stream; 0 if it is not known."""
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns
    except (OSError, ValueError, AttributeError):  # no terminal, or a stream of a test
        return 0


@contextmanager
def wrapping() -> Iterator[WordWrap | None]:
    """Yields what wraps an answer at words; None where stdout is no terminal."""
    _State.wrap = WordWrap(columns) if sys.stdout.isatty() else None
    try:
        yield _State.wrap
    finally:
        _State.wrap = None


# Notices on stderr


def note(text: str) -> None:
    """Prints a line on stderr, unless --quiet. On a terminal it is dim, and wrapped at words. During the line of an
    answer it waits for its end."""
    if _State.quiet:
        return
    if _State.mid_line and are_one_file(sys.stdout, sys.stderr):
        _State.waiting += (text,)
    else:
        say(dim(hanging(text, columns(sys.stderr)), sys.stderr))


def say(text: str) -> None:
    """Prints a line on stderr, also with --quiet."""
    show(text + "\n")


def show(text: str) -> None:
    """Writes text to stderr. If stderr is closed or full, there is no other place to write it."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()


def devnull() -> IO[str]:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def are_one_file(*streams: Any) -> bool:
    """Whether streams write to the same file."""
    try:
        return len({(about.st_dev, about.st_ino) for about in (os.fstat(one.fileno()) for one in streams)}) == 1
    except (AttributeError, OSError, ValueError):  # a stream of a test or a notebook
        return False


def compiling(name: str, seconds: float | None = None) -> None:
    """Shows a compilation on stderr. On a terminal, the notice is below the text and is erased at the end; elsewhere it
    is a line with the duration.

    Args:
        name: What is compiled.
        seconds: None when the compilation starts, its duration when it ends.
    """
    one = are_one_file(sys.stdout, sys.stderr)
    if _State.quiet or sys.stderr is None or (one and not is_terminal(sys.stderr)):
        return  # in a file it would stand in the middle of the text
    if not is_terminal(sys.stderr):
        show(f"compiling {name} …" if seconds is None else f" {seconds:.1f} s\n")
    elif seconds is None:
        _State.compiling = True
        show(("\n" if one and _State.mid_line else "") + dim(f"compiling {name} …", sys.stderr))
    else:
        erase_compiling()


def erase_compiling() -> None:
    """Erases the notice of a compilation, and moves the cursor back to the text."""
    if _State.compiling:
        _State.compiling = False
        column = _State.wrap.column if _State.wrap is not None else 0
        back = f"\033[A\033[{column + 1}G" if _State.mid_line and are_one_file(sys.stdout, sys.stderr) else ""
        show(f"\r\033[K{back}")


def progress_line(text: str) -> None:
    """Shows progress in the current line of stderr, in place of what it showed before."""
    if shows_progress():
        show(f"\r\033[K{dim(text, sys.stderr)}")
        _State.progress = True


def erase_line() -> None:
    """Erases the progress line, before text is written."""
    if _State.progress:
        show("\r\033[K")
        _State.progress = False


# Keys that are typed while an answer is written


@contextmanager
def typing_ahead() -> Iterator[None]:
    """Keeps keys that are typed or pasted during an answer for the next message: they are not shown in its text, and
    pasted lines are one message."""
    mode = echo_mode()
    if mode is None:
        yield
        return
    import termios

    fd, before, without_echo = mode
    out = sys.stdout.fileno()

    def restore() -> None:
        termios.tcsetattr(fd, termios.TCSANOW, before)
        os.write(out, PASTE_OFF.encode())

    interrupts.on_exit(restore)
    try:
        termios.tcsetattr(fd, termios.TCSANOW, without_echo)
        os.write(out, PASTE_ON.encode())
        yield
    finally:
        with suppress(OSError, termios.error):  # the terminal is gone
            restore()
        interrupts.on_exit(None)


def echo_mode() -> tuple[int, list[Any], list[Any]] | None:
    """The descriptor of stdin, the mode of its terminal, and that mode without echo; None if stdin and stdout are not
    both terminals."""
    if sys.stdin is None or not (sys.stdin.isatty() and is_terminal(sys.stdout)):
        return None
    try:
        import termios

        fd = sys.stdin.fileno()
        before, without_echo = termios.tcgetattr(fd), termios.tcgetattr(fd)
        without_echo[3] &= ~termios.ECHO
    except (ImportError, OSError):  # Windows, or a stream of a test
        return None
    return fd, before, without_echo

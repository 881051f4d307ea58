"""What commands write: notices beside answers, styles, and where stdout has few letters, is full or closed."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import cli
from jaxlm.cli import common, terminal
from jaxlm.cli.answer import print_answer
from jaxlm.cli.terminal import print_json, use_any_encoding
from jaxlm.inference.completion import CompletionChunk
from jaxlm.nn import attention_reference

FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No state of other tests."""
    for name, value in {"quiet": False, "mid_line": False, "waiting": (), "escaped": False}.items():
        monkeypatch.setattr(terminal._State, name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def stdout_in(encoding: str, monkeypatch) -> io.BytesIO:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    return raw


def test_letters_that_the_encoding_does_not_have(monkeypatch, capsys):
    raw = stdout_in("ascii", monkeypatch)
    use_any_encoding()
    print("café 👩")
    print("again: é")
    assert raw.getvalue() == b"caf\\xe9 \\U0001f469\nagain: \\xe9\n"
    assert capsys.readouterr().err.count("ascii") == 1  # said once


def test_json_stays_valid_in_any_encoding(monkeypatch):
    for encoding, kept in (("ascii", False), ("latin-1", False), ("utf-8", True), ("utf-16", True)):
        raw = stdout_in(encoding, monkeypatch)
        print_json({"text": "café 👩 €"})
        written = raw.getvalue().decode(encoding)
        assert json.loads(written) == {"text": "café 👩 €"}
        assert ("é" in written) == kept


def test_a_closed_stdout_is_an_error_for_a_person():
    command = f"{sys.executable} -m jaxlm --version >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "jaxlm: stdout is closed: redirect it to a file, or to /dev/null\n"


@pytest.mark.parametrize("debug", [True, False])
def test_debug_says_once_which_kernel_does_not_apply(debug, monkeypatch, capsys):
    logger = logging.getLogger("jaxlm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(common, "use_compilation_cache", lambda: None)
    attention_reference.report_fallback.cache_clear()
    level = logger.level
    try:
        common.ProcessFlags(debug=debug).begin()
        for _ in range(2):
            attention_reference.report_fallback("splash attention", "32 tokens are not a multiple of 128")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err.count("32 tokens") == debug


class Screen(io.StringIO):
    """A terminal that is stdout and stderr."""

    tty = True

    def isatty(self) -> bool:
        return self.tty


def on_screen(monkeypatch) -> Screen:
    """Replaces stdout and stderr by a screen of 20 columns. Fixtures cannot: pytest sets both anew before a test."""
    one = Screen()
    monkeypatch.setattr(sys, "stdout", one)
    monkeypatch.setattr(sys, "stderr", one)
    monkeypatch.setattr(terminal, "are_one_file", lambda *streams: True)
    monkeypatch.setattr(terminal, "columns", lambda stream=None: 20)
    return one


def answer(*parts) -> None:
    """Prints an answer of texts; functions are called between them."""

    def chunks():
        for part in parts:
            if isinstance(part, str):
                yield CompletionChunk(part)
            else:
                part()

    print_answer(chunks(), None, False)


@pytest.mark.parametrize("tty", [True, False])
def test_a_notice_waits_for_the_end_of_the_line(tty, monkeypatch):
    screen = on_screen(monkeypatch)
    screen.tty = tty
    notices = [lambda: terminal.note("first"), lambda: terminal.note("second")]
    answer(lambda: terminal.note("before"), "one ", notices[0], "two", notices[1], " three")
    style = "\033[2m{}\033[0m\n" if tty else "{}\n"
    assert screen.getvalue() == style.format("before") + "one two three\n" + "".join(
        style.format(text) for text in ("first", "second")
    )


def test_log_messages_wait_too(monkeypatch):
    screen = on_screen(monkeypatch)
    logger = logging.getLogger("jaxlm")
    monkeypatch.setattr(logger, "handlers", [])
    level = logger.level
    try:
        common.log_debug_messages()
        answer("one ", lambda: logging.getLogger("jaxlm.part").warning("slow"), "two")
    finally:
        logger.setLevel(level)
    assert screen.getvalue() == "one two\n\033[2mjaxlm.part: slow\033[0m\n"


def compiles() -> None:
    terminal.compiling("decode")
    terminal.compiling("decode", 1.5)


def test_a_compilation_is_shown_below_the_text_and_erased(monkeypatch):
    screen = on_screen(monkeypatch)
    answer(compiles, "one two ", compiles, "three")
    shown = "\033[2mcompiling decode …\033[0m\r\033[K"
    assert screen.getvalue() == f"{shown}one two\n{shown}\033[A\033[8G three\n"


def test_an_interrupted_compilation_is_erased(monkeypatch):
    screen = on_screen(monkeypatch)

    def interrupt():
        terminal.compiling("decode")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer("one two ", interrupt)
    assert screen.getvalue().endswith("…\033[0m\r\033[K\033[A\033[8G ")


def test_an_error_begins_on_a_line_of_its_own(monkeypatch):
    screen = on_screen(monkeypatch)

    def fail():
        raise ValueError

    with pytest.raises(ValueError):
        answer("one two ", fail)
    assert screen.getvalue() == "one two \n"


def test_an_answer_is_wrapped_on_a_terminal_only(monkeypatch):
    screen = on_screen(monkeypatch)
    answer("The quick brown fox jum", "ps\033[2J over")
    assert screen.getvalue() == "The quick brown fox\njumps\\x1b[2J over\n"
    screen.truncate(0)
    screen.seek(0)
    screen.tty = False
    answer("The quick brown fox jum", "ps\033[2J over")
    assert screen.getvalue() == "The quick brown fox jumps\033[2J over\n"


@pytest.mark.parametrize(("name", "value", "styled"), [
    ("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False),
])  # fmt: skip
def test_no_color_and_dumb_terminals(monkeypatch, name, value, styled):
    screen = on_screen(monkeypatch)
    monkeypatch.setenv(name, value)
    terminal.note("a notice")
    assert terminal.console(force_terminal=True).is_terminal
    terminal.console(force_terminal=True, file=screen, highlight=False).print("[bold]text[/]")
    assert ("\033[2ma notice" in screen.getvalue()) == styled
    assert ("\033[1mtext" in screen.getvalue()) == styled
    answer(compiles, "text ", compiles)
    terminal.progress_line("a line of progress")
    terminal.erase_line()
    assert ("\033" in screen.getvalue()) == (name == "NO_COLOR")  # the cursor moves
    assert (re.search(r"\033\[[0-9;]*m", screen.getvalue()) is not None) == styled


def test_quiet_leaves_errors(monkeypatch):
    screen = on_screen(monkeypatch)
    terminal.set_quiet(True)
    terminal.note("a notice")
    compiles()
    terminal.progress_line("progress")
    assert common.progress_flag() is False
    terminal.say("jaxlm: an error")
    assert screen.getvalue() == "jaxlm: an error\n"


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
@pytest.mark.parametrize("argv", ["--version", "--help", "generate --help"])
def test_a_full_disk_is_one_message(argv):
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jaxlm", *argv.split()], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "jaxlm: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
def test_an_answer_that_cannot_be_written(monkeypatch, capsys):
    def run(self):
        answer("one ", "two")
        return 0

    monkeypatch.setattr("jaxlm.cli.generate.Generate.run", run)
    monkeypatch.setattr(sys, "stdout", FULL.open("w"))
    assert cli.main(["generate", "hi"]) == 1
    sys.stdout.close()  # as at exit; nothing is left to write
    assert capsys.readouterr().err == "jaxlm: stdout cannot be written: No space left on device\n"


def test_a_closed_pipe_ends_quietly(monkeypatch, capsys):
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr("jaxlm.cli.generate.Generate.run", lambda self: answer("one ", "two"))
    monkeypatch.setattr(sys, "stdout", os.fdopen(write_end, "w"))
    assert cli.main(["generate", "hi"]) == 0
    sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    terminal.note("a notice")
    compiles()
    terminal.say("jaxlm: an error")

"""Messages of a chat: quotes, encodings, the terminal."""

import io
import sys

import pytest

from jaxlm.cli import line_input
from jaxlm.cli.line_input import check_text, read_line, read_message, read_stdin, split_message


@pytest.mark.parametrize(("text", "want"), [
    ("hello", ("", "hello")),
    ("two\nlines", ("", "two\nlines")),
    ("/set top_k 4", ("/set", "top_k 4")),
    ("/system\nbe kind", ("/system", "be kind")),
    ("/retry", ("/retry", "")),
    (" /not a command", ("", " /not a command")),
    ('"""one line"""', ("", "one line")),
    ('"""\na\n\nb\n"""', ("", "a\n\nb")),
    ('"""/not a command"""', ("", "/not a command")),
    ('/system """\na\nb"""', ("/system", "a\nb")),
    ('""""""', ("", "")),
    ('say """ twice', ("", 'say """ twice')),
])  # fmt: skip
def test_split_message(text, want):
    assert split_message(text) == want


def stdin(data: bytes, monkeypatch, encoding: str = "utf-8", errors: str = "strict") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors=errors))


def test_piped_lines_and_quoted_messages(monkeypatch):
    stdin(b'one\r\n"""\nfirst\n  second\n"""\n\nlast', monkeypatch)
    read = line_input.reader()
    assert [split_message(read()) for _ in range(4)] == [("", "one"), ("", "first\n  second"), ("", ""), ("", "last")]
    with pytest.raises(EOFError):
        read()


def test_a_quoted_message_without_end_is_not_sent(monkeypatch):
    stdin(b'"""\nfirst\n', monkeypatch)
    with pytest.raises(ValueError, match='"""'):
        read_message(read_line)
    with pytest.raises(EOFError):
        read_message(read_line)


@pytest.mark.parametrize(("encoding", "errors"), [("utf-8", "strict"), ("ascii", "surrogateescape")])
def test_a_line_that_is_not_utf8_is_refused_and_the_next_is_read(encoding, errors, monkeypatch):
    stdin("é\n".encode("latin-1") + "é\n".encode(), monkeypatch, encoding, errors)
    with pytest.raises(ValueError, match=r"not utf-8 .byte 0xe9 at position 0."):
        read_line()
    assert read_line() == "é"


def test_the_encoding_of_stdin_counts(monkeypatch):
    stdin("é\r\nü".encode("latin-1"), monkeypatch, "latin-1")
    assert read_stdin() == "é\nü"
    stdin(b"\xe9", monkeypatch)
    with pytest.raises(ValueError, match="stdin is not utf-8"):
        read_stdin()


def test_an_argument_that_is_not_utf8():
    assert check_text("é", "the prompt") == "é"
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        check_text(b"\xe9".decode("utf-8", "surrogateescape"), "the prompt")

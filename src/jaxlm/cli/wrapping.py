"""Wraps text at words: `WordWrap` streamed text, `hanging` a line."""

import re
import textwrap
import unicodedata
from collections.abc import Callable

STYLE = re.compile(r"\033\[[0-9;]*m")
# A style, a line end, spaces, or one character.
PIECE = re.compile(r"\033\[[0-9;]*m|\n|[ \t]+|.", re.DOTALL)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
LIST_ITEM = re.compile(r"([-*+]|\d+[.)])$")
TAB = 8  # columns between tab stops
JOINER, SKIN_TONES = "\u200d", ("\U0001f3fb", "\U0001f3ff")  # they make one emoji of two characters


class WordWrap:
    """Breaks lines before a word that does not fit.

    Lines of code blocks (between ``` or ~~~), tables (|) and lines indented by a tab or four spaces stay as they are,
    except list items. A wide character (CJK, emoji) takes two columns and is a word of its own. A word that is longer
    than a line is broken by the terminal.
    """

    def __init__(self, columns: Callable[[], int]):
        """columns: Returns the width of the terminal, 0 if it is not known; called for each word, as it may change."""
        self.columns = columns
        self.column = 0  # of the cursor, in front of `space` and `word`
        self.space = ""  # spaces in front of the word
        self.word = ""  # characters that are not written yet
        self.rest = False  # whether the beginning of a long word is written, and its rest is not held back
        self.line = ""  # text of the current line of the input
        self.begun = False  # whether a word of this line is written
        self.verbatim = False  # whether this line stays as it is
        self.fence = ""  # that opened the code block

    def feed(self, text: str) -> str:
        """Returns what can be written after `text`. A word is held back until its end is known."""
        return "".join(map(self._take, PIECE.findall(text)))

    def flush(self) -> str:
        """Returns what was held back."""
        word = self._place()
        space, self.space = self.space, ""
        return word + self._count(space)

    def _take(self, piece: str) -> str:
        if piece == "\n":
            return self._end_line()
        if piece.startswith("\033["):
            if self.word or self.space:
                self.word += piece
                return ""
            return piece
        self.line += piece
        if self.verbatim or self.fence:
            held, self.space, self.word = self.space + self.word, "", ""
            return self._count(held + piece)
        if piece[0] in " \t":
            out = self._place()
            self.rest = False
            self.space += piece
            return out
        if self.rest:
            return self._count(piece)
        out = self._place() if self._breaks_before(piece) else ""
        self.word += piece
        limit = self.columns() - 1
        if 0 < limit < cells(self.word):  # longer than a line
            out += self._place()
            self.rest = True
        return out

    def _breaks_before(self, char: str) -> bool:
        """Whether a line may end between the word and the next character."""
        word = STYLE.sub("", self.word)
        if not word or word.endswith(JOINER) or not cells(char) or SKIN_TONES[0] <= char <= SKIN_TONES[1]:
            return False
        return is_wide(char) or is_wide(word[0])

    def _place(self) -> str:
        """Writes the word, on the next line if it does not fit."""
        if not self.word:
            return ""
        space, word = self.space, self.word
        self.space = self.word = ""
        limit = self.columns() - 1  # after a full line, terminals differ in where the cursor is
        if 0 < limit < self.column + cells(space, self.column) + cells(word) and self.begun:
            self.column = 0
            return "\n" + self._count(word)
        if not self.begun:
            self.begun = True
            self.verbatim = self._stays(space, STYLE.sub("", word))
        return self._count(space + word)

    def _stays(self, indent: str, word: str) -> bool:
        """Whether a line with this beginning stays as it is. Opens a code block."""
        if fence := FENCE.match(indent + word):
            self.fence = fence[1]
        indented = "\t" in indent or len(indent) >= 4
        return word.startswith("|") or (indented and not LIST_ITEM.match(word))

    def _end_line(self) -> str:
        fence = self.fence
        out = self._place() + "\n"
        end = FENCE.match(self.line) if fence else None
        if end and end[1].startswith(fence) and self.line.strip() == end[1]:
            self.fence = ""
        self.column, self.space, self.line = 0, "", ""
        self.rest = self.begun = self.verbatim = False
        return out

    def _count(self, text: str) -> str:
        """Moves the column behind text that is written."""
        width = self.columns()
        self.column += cells(text, self.column)
        if 0 < width < self.column:  # the terminal broke the line
            self.column = (self.column - 1) % width + 1
        return text


def hanging(text: str, columns: int, indent: int = 0) -> str:
    """The text with line breaks at words, where a line is longer than `columns` (0: unknown). What follows a break is
    indented. Words are not broken."""
    if columns <= 2 * indent + 1:
        return text
    options = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    lines = [
        textwrap.wrap(line, columns - 1, **options) if len(line) >= columns else [line] for line in text.split("\n")
    ]
    return "\n".join(part for wrapped in lines for part in wrapped)


def cells(text: str, column: int = 0) -> int:
    """The number of columns that a text takes; `column` is where it begins, for tabs."""
    from rich.cells import cell_len

    text = STYLE.sub("", text)
    if "\t" not in text:
        return len(text) if text.isascii() else cell_len(text)
    end = column
    for part in re.split("(\t)", text):
        end += TAB - end % TAB if part == "\t" else cells(part)
    return end - column


def is_wide(char: str) -> bool:
    """Whether a character takes two columns."""
    return unicodedata.east_asian_width(char) in "WF"


def visible(text: str) -> str:
    """The text with control characters as escapes, which would move the cursor or change the terminal."""
    if text.isprintable():
        return text
    text = text.replace("\r", "")
    return "".join(
        f"\\x{ord(char):02x}" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )

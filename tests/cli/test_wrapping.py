"""Streamed text is wrapped at words."""

import itertools
import random
import re

import pytest

from jaxlm.cli.wrapping import WordWrap, cells, hanging, visible


def wrapped(text: str, columns: int = 20, size: int = 0) -> str:
    """The text after wrapping; fed in pieces of `size` characters, 0 for all at once."""
    wrap = WordWrap(lambda: columns)
    size = size or len(text)
    return "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.flush()


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize(("text", "want"), [
    ("The quick brown fox jumps over", "The quick brown fox\njumps over"),
    ("a line\nand the next one that is long", "a line\nand the next one\nthat is long"),
    ("  two spaces  remain here", "  two spaces\nremain here"),
    ("a " + "x" * 45 + " b", "a\n" + "x" * 45 + " b"),
    ("日本語のテキストは長いです。", "日本語のテキストは\n長いです。"),
    ("ab 日本語 cd 日本語 ef gh", "ab 日本語 cd 日本語\nef gh"),
    ("👩\u200d👩\u200d👧 " * 4 + "👍🏽", None),
    ("\033[2mdim words that are\033[0m wrapped here", "\033[2mdim words that are\033[0m\nwrapped here"),
])  # fmt: skip
def test_words_move_to_the_next_line(text, want, size):
    out = wrapped(text, size=size)
    if want is not None:
        assert out == want
    assert all(cells(line) <= 19 or " " not in line.strip() or "x" * 45 in line for line in out.split("\n"))
    assert re.sub(r"\s", "", out) == re.sub(r"\s", "", text)
    assert "\u200d\n" not in out
    assert "\n🏽" not in out


@pytest.mark.parametrize("size", [0, 1, 4])
@pytest.mark.parametrize("text", [
    "```python\nprint('a line of code that is long')\n# more\n```\n",
    "~~~\n```\nstill code, which is a long line here\n~~~\n",
    "    indented code that is longer than the line\n",
    "\tindented code that is longer than the line\n",
    "| a | table | with | a | long | row | in | it |\n",
])  # fmt: skip
def test_code_and_tables_stay_as_they_are(text, size):
    assert wrapped(text, size=size) == text
    after = wrapped(text + "and then words are wrapped again", size=size)
    assert after == text + "and then words are\nwrapped again"


def test_list_items_are_wrapped():
    assert wrapped("    - an item with a long text") == "    - an item with\na long text"
    assert wrapped("    12. an item with a long text") == "    12. an item\nwith a long text"


def test_the_width_may_change_or_be_unknown():
    width = [20]
    wrap = WordWrap(lambda: width[0])
    out = wrap.feed("The quick brown fox jumps ")
    width[0] = 10
    assert out + wrap.feed("over the dog ") + wrap.flush() == "The quick brown fox\njumps\nover the\ndog "
    assert wrapped("a " * 100, columns=0) == "a " * 100


def test_a_long_word_is_not_held_back():
    wrap = WordWrap(lambda: 20)
    assert wrap.feed("see " + "x" * 19) == "see"
    assert wrap.feed("x") == "\n" + "x" * 20
    assert wrap.feed("x" * 5) == "x" * 5
    assert wrap.column == 5


def test_random_text_never_breaks_a_word():
    rng = random.Random(0)
    for _ in range(300):
        words = ["".join(rng.choices("abé好👍,.", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 30))]
        text, columns, size = " ".join(words), rng.randint(16, 40), rng.randint(1, 9)
        out = wrapped(text, columns, size)
        assert out.replace("\n", " ").split() == text.split() or any(c in text for c in "好👍")
        assert out.replace("\n", "").replace(" ", "") == text.replace(" ", "")
        assert max(map(cells, out.split("\n"))) < columns
        if not any(c in text for c in "好👍"):  # as full as can be
            lines = out.split("\n")
            for line, following in itertools.pairwise(lines):
                assert cells(line) + 1 + cells(following.split()[0]) >= columns


def test_control_characters_are_visible():
    assert visible("a\033]52;c;eA==\x07b\x9b\r\n\tc") == "a\\x1b]52;c;eA==\\x07b\\x9b\n\tc"
    assert visible("日本\u200d é") == "日本\u200d é"


def test_hanging_lines():
    assert (
        hanging("memory      weights 19.5 MB, peak 2.7 GB", 30, 12)
        == "memory      weights 19.5 MB,\n            peak 2.7 GB"
    )
    assert hanging("one two and\n    three", 11) == "one two\nand\n    three"
    assert hanging("model/with-a-long-name", 10) == "model/with-a-long-name"
    assert hanging("as it is  here", 0) == hanging("as it is  here", 80) == "as it is  here"

"""What the Markdown pages show: blocks of code, commands, links, headings, and code within sentences."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", ".github/**/*.md", "src/jaxlm/stories/*.md")
    for path in sorted(ROOT.glob(pattern))
]
PYTHON = {"python", "py"}
SHELL = {"sh", "bash", "shell", "console"}
DATA = {"json", "jsonl", "yaml", "toml"}
OTHER = {"text", "mermaid", "jinja", "html", "markdown", "diff"}  # neither run nor parsed
# Programs that begin a command. In an indented block, another first word is not a command: a formula, a tree of files,
# or the output of the command above it.
PROGRAMS = {
    "apt-get", "bash", "brew", "cat", "cd", "cp", "curl", "docker", "export", "gcloud", "git", "hf", "jaxlm", "lm_eval",
    "mkdir", "mkdocs", "mpirun", "pip", "pre-commit", "pyright", "pytest", "python", "ruff", "source", "srun", "twine",
    "uv", ".ci/run", ".",
}  # fmt: skip
MARK = re.compile(r"<!--\s*not run: (.+?)\s*-->", re.DOTALL)
LOST = re.compile(r"^(?: {4,}|\t)(?:\S*\$ )?(?:jaxlm|pip|pytest|python|mpirun|srun) \S")
UNQUOTED_ELLIPSIS = re.compile(r"(?<![\"'\w])…(?![\"'\w])")
PROMPT = re.compile(r"^(?:[a-z]+\d*)?\$ ")  # `$ jaxlm`, `node0$ jaxlm`
INDENTED = ("!!! ", "??? ", "???+ ", "=== ")  # what is indented below these is Markdown (MkDocs)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Path of the page from the root of the repository.
        line: Line of its first line of code, from 1.
        language: Language of a fenced block, "" of an indented one.
        text: The code.
        reason: Why it is not run, from a comment `<!-- not run: REASON -->` above it; None for a block that is run.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell line: `a && b | c` are three.

    Attributes:
        where: PAGE:LINE.
        words: The program and its arguments.
        reason: As of the block.
        output: File that stdout is written to, "" for none.
    """

    where: str
    words: tuple[str, ...]
    reason: str | None
    output: str = ""


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All blocks of code of a page, in their order."""
    return tuple(_blocks(page, read(page), 0))


def _blocks(page: str, text: str, offset: int) -> Iterator[Block]:
    reason, above = None, ""
    for token in parse(text):
        if token.type == "html_block":
            found = MARK.search(token.content)
            reason = found[1] if found else None
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            line = offset + token.map[0] + 1 + (token.type == "fence")
            if token.type == "code_block" and above.startswith(INDENTED):
                yield from _blocks(page, token.content, line - 1)
            else:
                language = token.info.split()[0].lower() if token.info.strip() else ""
                yield Block(page, line, language, token.content, reason)
            reason = None
        elif token.type == "inline":
            reason, above = None, token.content


def logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The lines of a block, each with its number. Lines that end with a backslash are joined with the next one."""
    number, joined = block.line, ""
    for at, line in enumerate(block.text.splitlines(), block.line):
        number, joined = (number, f"{joined} {line.strip()}") if joined else (at, line.strip())
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip()
            continue
        yield number, joined
        joined = ""


def commands(block: Block) -> Iterator[Command]:
    """The shell commands of a block. Those within an argument (`bash -c 'jaxlm …'`, `srun jaxlm …`) are commands too.

    Raises:
        ValueError: a fenced block of a shell has a line that begins with no known program.
    """
    if block.language and block.language not in SHELL:
        return
    for number, line in logical_lines(block):
        line = PROMPT.sub("", line)
        where = f"{block.page}:{number}"
        if begins_command(line):
            yield from split(where, line, block)
        elif line and not line.startswith("#") and block.language in SHELL - {"console"}:  # a console shows output too
            raise ValueError(f"{where}: {line.split()[0]!r} is no known program: add it to PROGRAMS in {__name__}")


def lost_commands(page: str) -> list[str]:
    """Indented commands that no block of code has: Markdown joins them to the sentence or the list item above."""
    shown = {line for b in blocks(page) for line in range(b.line, b.line + b.text.count("\n") + 1)}
    lines = enumerate(read(page).splitlines(), 1)
    return [f"{page}:{n}: {line.strip()}" for n, line in lines if n not in shown and LOST.match(line)]


def begins_command(line: str) -> bool:
    words = re.sub(r"^(?:\w+=\S* +)+", "", line).split(maxsplit=1)
    return bool(words) and words[0] in PROGRAMS


def split(where: str, line: str, block: Block) -> Iterator[Command]:
    """The commands of a shell line."""
    line = re.sub(r"\$\(.*?\)|\$\w+", "1", line)  # values of variables do not matter
    line, incomplete = UNQUOTED_ELLIPSIS.subn("", re.sub(r"\s2>\S+", "", line))
    if incomplete and block.reason is None:
        block = replace(block, reason="the reader completes it")
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, output, waits = list[str](), "", ""
    for word in [*lexer, ";"]:
        if word in (">", ">>", "<"):
            waits = word
        elif waits:
            output, waits = (word if waits.startswith(">") else output), ""
        elif set(word) <= set("();|&"):
            yield from _of_words(where, words, block, output)
            words, output = [], ""
        else:
            words.append(word)


def _of_words(where: str, words: list[str], block: Block, output: str) -> Iterator[Command]:
    while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value program
        words = words[1:]
    if not words:
        return
    yield Command(where, tuple(words), block.reason, output)
    if words[0] != "jaxlm" and "jaxlm" in words:
        yield Command(where, tuple(words[words.index("jaxlm") :]), f"{words[0]} starts it", output)
    for word in words[1:]:
        if words[0] != "jaxlm" and (inner := re.search(r"(?:jaxlm|pip install) .*", word)):
            for command in split(where, inner[0], block):
                yield Command(where, command.words, f"{words[0]} starts it")


def inline_code(page: str) -> Iterator[tuple[str, str]]:
    """`code` within sentences and tables, each with its place."""
    for where, token in _inline(page):
        for child in token.children or []:
            if child.type == "code_inline":
                yield where, child.content


def links(page: str) -> Iterator[tuple[str, str]]:
    """The targets of links and images, each with its place."""
    for where, token in _inline(page):
        for child in token.children or []:
            target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if target:
                yield where, str(target)


def _inline(page: str) -> Iterator[tuple[str, Token]]:
    for token in parse(read(page)):
        if token.type == "inline" and token.map is not None:
            yield f"{page}:{token.map[0] + 1}", token


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of the headings of a page, as code hosts make them, and those of `<a id="…">`."""
    found, count, tokens = set[str](), Counter[str](), parse(read(page))
    for token, text in pairwise(tokens):
        if token.type == "heading_open":
            plain = "".join(child.content for child in text.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{count[slug]}" if count[slug] else slug)
            count[slug] += 1
    return frozenset(found.union(re.findall(r'<a (?:id|name)="([^"]+)"', read(page))))

"""Every page: its Python runs, its commands run or are parsed, and its links, files and flags exist.

A block that cannot run here has a comment above it, `<!-- not run: REASON -->`. It is still compiled, and its names of
jaxlm and its commands are checked.
"""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import documentation_files
from helpers.documentation import (
    PAGES,
    PYTHON,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    lost_commands,
)
from helpers.documentation_checks import all_flags, check_block, check_command, check_inline, run_python

from jaxlm import cli

# Commands that are parsed and not run. The others run in this process, with the tiny models of documentation_files.
PARSED = {
    "bench": "it measures for minutes",
    "check": "it measures for minutes",
    "serve": "it runs until it is stopped",
    "verify": "it takes a minute: the slow tier runs it",
    "train": "it takes seconds to compile: the slow tier runs it",
    "finetune": "it takes seconds to compile: the slow tier runs it",
}
PARSED_FLAGS = {
    "--mesh": "the mesh is larger than that of the tests",
    "--tasks": "lm-eval downloads its tasks",
    "--compile": "it compiles for another platform",
    "--format": "none of the tiny models is in Meta's format",
    "--distributed": "it waits for other processes",
    "--coordinator": "it waits for other processes",
}
# What the slow tier adds to these commands, so that they are short.
SHORT = ["--steps", "2", "--batch", "2", "--length", "32", "--save-every", "2"]
SLOW = {"train": SHORT, "finetune": SHORT, "verify": ["--against", "self"]}
READERS = {"generate", "info", "plan", "eval"}  # they write no files: equal commands of several pages run once


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[documentation_files.Hub]:
    """A cache of the hub without a network."""
    from huggingface_hub import constants

    hub = documentation_files.Hub(tmp_path_factory.mktemp("hub"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(hub.folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield hub


@pytest.fixture
def folder(world: documentation_files.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages name."""
    documentation_files.write_files(tmp_path, world)
    for name in ("examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fail_with(errors: list[str]) -> None:
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    fail_with([f"{where}: {error}" for where, target in links(page) if (error := check_link(page, target))])


def check_link(page: str, target: str) -> str:
    path, _, anchor = target.partition("#")
    if "://" in path or path.startswith("mailto:"):
        return ""
    there = (ROOT / page).parent / path if path else ROOT / page
    if not there.exists():
        return f"no such file: {target}"
    if anchor and there.suffix == ".md":
        name = there.resolve().relative_to(ROOT).as_posix()
        return "" if anchor in anchors(name) else f"no such heading: {target}"
    return ""


@cache
def flags() -> dict[str, Any]:
    return all_flags()


@pytest.mark.parametrize("page", PAGES)
def test_code_is_sound(page: str) -> None:
    """Blocks parse, names of jaxlm exist, and flags and paths within sentences do."""
    errors = [f"{block.where}: {error}" for block in blocks(page) if (error := check_block(block))]
    inline = {code: where for where, code in inline_code(page)}
    errors += [f"{where}: {error}" for code, where in inline.items() if (error := check_inline(code, flags()))]
    fail_with([*errors, *(f"{lost}: not in a block of code (empty line, or indent)" for lost in lost_commands(page))])


def distinct_commands() -> dict[tuple[str, ...], Command]:
    found = [command for page in PAGES for block in blocks(page) for command in commands(block)]
    return {command.words: command for command in reversed(found)}


def test_commands_are_parsed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = []
    for command in distinct_commands().values():
        if error := check_command(command):
            errors.append(f"{command.where}: {error} {capsys.readouterr().err.strip()}")
    fail_with(errors)


def why_parsed(command: Command) -> str | None:
    """Why a command of jaxlm is only parsed; None for one that runs."""
    _, name, *args = command.words
    flag = next((PARSED_FLAGS[arg] for arg in args if arg in PARSED_FLAGS), None)
    path = "a path of the reader's machine" if any(arg.startswith("/") for arg in args) else None
    return command.reason or PARSED.get(name) or flag or path


DONE: set[tuple[str, ...]] = set()


def run_command(command: Command, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """Runs a command of jaxlm in this process, with a line of text on stdin."""
    words = [*command.words[1:], *more]
    if words[0] in READERS:
        if command.words in DONE:
            return ""
        DONE.add(command.words)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    capsys.readouterr()
    status = cli.main(words)
    out, err = capsys.readouterr()
    if status:
        return f"{command.where}: jaxlm {' '.join(words)}: exit status {status}: {err.strip()[-600:]}"
    if words[0] in READERS and not out.strip():
        return f"{command.where}: jaxlm {' '.join(words)}: nothing on stdout"
    if command.output:
        Path(command.output).write_text(out)
    return ""


def runs(block: Block) -> bool:
    """Whether a block has something to run."""
    if block.reason:
        return False
    return block.language in PYTHON or any(c.words[0] == "jaxlm" and not why_parsed(c) for c in commands(block))


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))])
def test_page_runs(page: str, folder: Path, world: Any, monkeypatch: Any, capsys: Any) -> None:
    """The blocks of a page, from the top, in one folder and one namespace."""
    errors, namespace = list[str](), {"__name__": "page"}
    for block in filter(runs, blocks(page)):
        world.add(block.text)
        if block.language in PYTHON:
            errors.append(run_python(block, namespace, {}))
        for command in commands(block):
            if command.words[0] == "jaxlm" and not why_parsed(command):
                errors.append(run_command(command, [], monkeypatch, capsys))
    fail_with([error for error in errors if error])

"""Every page: its Python runs, its commands run or are parsed, and its links, files and flags exist.

A block that cannot run here has a comment above it, `<!-- not run: REASON -->`. It is still compiled, and its names of
jaxlm and its commands are checked.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import documentation, documentation_files
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
from helpers.serving import serving

import jaxlm
from jaxlm import cli
from jaxlm.server.state import Server

# Commands that are parsed and not run. The others run in this process, with the tiny models of documentation_files.
PARSED = {
    "chat": "it answers without a limit of tokens: tests/cli/test_chat_command.py runs it",
    "bench": "it measures for minutes: tests/bench runs its parts",
    "check": "it measures for minutes: tests/cli/test_check.py runs it",
    "serve": "it runs until it is stopped: tests/cli/test_serve.py runs it",
    "verify": "it takes most of a minute: tests/verification runs it",
}
PARSED_ARGUMENTS = {
    "--mesh": "the mesh is larger than that of the tests",
    "--tasks": "lm-eval downloads its tasks",
    "--compile": "it compiles for another platform",
    "--format": "none of the tiny models is in Meta's format",
    "--distributed": "it waits for other processes",
    "--coordinator": "it waits for other processes",
    "-c": "the runs of YAML files take half an hour",
    "org/name": "a name that the reader fills in",
}
# Commands and Python that compile for many seconds: only the slow tier runs them. Commands get these flags.
SHORT = {"--steps": "2", "--batch": "2", "--length": "128"}
SLOW = {"train": SHORT, "finetune": SHORT}
SLOW_PYTHON = re.compile(r"\btrain\(Run\(|\bnnx\.jit\b|\brestored\(|\bcorrupted\b")
# In Python: tiny models have one layer and a token per byte, and these two names have as many tokens as each other.
REPLACED = {r"\blayers\.\d+\.": "layers.0.", '"Colosseum"': '"Eiffel Cower"'}
SERVER = "http://127.0.0.1:8000"
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
    fail_with(link_errors(page))


def link_errors(page: str) -> list[str]:
    return [f"{where}: {error}" for where, target in links(page) if (error := check_link(page, target))]


def check_link(page: str, target: str) -> str:
    path, _, anchor = target.partition("#")
    if "://" in path or path.startswith("mailto:"):
        return ""
    there = (ROOT / page).parent / path if path else ROOT / page
    if path and not there.exists():
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
    fail_with(code_errors(page))


def code_errors(page: str) -> list[str]:
    errors = [f"{block.where}: {error}" for block in blocks(page) if (error := check_block(block))]
    inline = {code: where for where, code in inline_code(page)}
    errors += [f"{where}: {error}" for code, where in inline.items() if (error := check_inline(code, flags()))]
    return [*errors, *(f"{lost}: not in a block of code (empty line, or indent)" for lost in lost_commands(page))]


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
    argument = next((PARSED_ARGUMENTS[arg] for arg in args if arg in PARSED_ARGUMENTS), None)
    path = "a path of the reader's machine" if any(arg.startswith("/") for arg in args) else None
    return command.reason or PARSED.get(name) or argument or path


DONE: set[tuple[str, ...]] = set()


def run_command(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """Runs a command of jaxlm in this process, with a line of text on stdin. Returns an error, or ""."""
    words = list(command.words[1:])
    for flag, value in SLOW.get(words[0], {}).items():
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
        words += [flag, value]
    if words[0] in READERS:
        if command.words in DONE:
            return ""
        DONE.add(command.words)
    if out := getattr(cli.parse(words), "out", None):
        documentation_files.remove(Path(out))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    capsys.readouterr()
    status = cli.main(words)
    out, err = capsys.readouterr()
    if status:
        return f"{command.where}: jaxlm {' '.join(words)}: exit status {status}: {err.strip()[-600:]}"
    if words[0] in READERS - {"generate"} and not out.strip():  # a random model may begin with the end of its answer
        return f"{command.where}: jaxlm {' '.join(words)}: nothing on stdout"
    if command.output:
        Path(command.output).write_text(out)
    return ""


def runs(block: Block) -> list[Command | Block]:
    """What of a block runs: its Python, or its commands of jaxlm that are not only parsed."""
    if block.reason:
        return []
    if block.language in PYTHON:
        return [block]
    return [command for command in commands(block) if command.words[0] == "jaxlm" and not why_parsed(command)]


def is_slow(part: Command | Block) -> bool:
    if isinstance(part, Block):
        return bool(SLOW_PYTHON.search(part.text))
    _, name, *args = part.words
    story = name == "generate" and not {"-m", "--model", "--adapter"} & set(args)  # .ci/run has it in the first tiers
    return name in SLOW or story or (name == "plan" and "--device" not in args)  # which measures this machine


def run_page(page: str, folder: Path, world: Any, monkeypatch: Any, capsys: Any, with_slow: bool) -> None:
    """Runs the blocks of a page, from the top, in one folder and one namespace."""
    errors, namespace = list[str](), documentation_files.given()
    parts = [part for block in blocks(page) for part in runs(block) if with_slow or not is_slow(part)]
    needs_server = any(isinstance(part, Block) and SERVER in part.text for part in parts)
    with served() if needs_server else nullcontext(SERVER) as url:
        for part in parts:
            if isinstance(part, Command):
                world.add(" ".join(part.words))
                errors.append(run_command(part, monkeypatch, capsys))
                documentation_files.write_results(folder, world)
            else:
                world.add(part.text)
                for name in ("out", "run"):  # of another way to do the same, above
                    documentation_files.remove(folder / name)
                if not is_slow(part):
                    documentation_files.write_results(folder, world)
                errors.append(run_python(part, namespace, {**REPLACED, SERVER: url}))
    fail_with([error for error in errors if error])


@contextmanager
def served() -> Iterator[str]:
    """A server with the default model. Its answers have 200 tokens at most: a random model does not end them."""
    model = jaxlm.load(documentation_files.DEFAULT)
    with jaxlm.Engine(model, 2, length=256) as engine, serving(Server(model, engine, model.source)) as url:
        yield url


def pages(slow: bool) -> list[str]:
    """The pages that have something to run, in the slow tier or in the light one."""
    found = {page: [is_slow(part) for block in blocks(page) for part in runs(block)] for page in PAGES}
    return [page for page, parts in found.items() if (any(parts) if slow else not all(parts))]


@pytest.mark.parametrize("page", pages(slow=False))
def test_page_runs(page: str, folder: Path, world: Any, monkeypatch: Any, capsys: Any) -> None:
    run_page(page, folder, world, monkeypatch, capsys, with_slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(slow=True))
def test_page_with_training_runs(page: str, folder: Path, world: Any, monkeypatch: Any, capsys: Any) -> None:
    DONE.clear()
    run_page(page, folder, world, monkeypatch, capsys, with_slow=True)


FAULTS = {
    "python: a name": ("```python\nimport jaxlm\njaxlm.lod('x')\n```", "has no attribute 'lod'"),
    "python: a module": ("```python\nfrom jaxlm.trainig import Run\n```", "has no attribute 'trainig'"),
    "python: the syntax": ("text\n\n```python\nx = 1\ny = = 2\n```", "x.md:4: line 5: invalid syntax"),
    "python: a block that is not run": ("<!-- not run: a GPU -->\n```python\njaxlm.lod\n```", "has no attribute 'lod'"),
    "yaml": ("```yaml\na: [\n```", "yaml: "),
    "a language": ("```pyton\nx\n```", "unknown language 'pyton'"),
    "a flag": ("    jaxlm generate --max-tokns 3 Hi\n", "x.md:1: jaxlm generate --max-tokns 3 Hi: not parsed"),
    "a type": ("    jaxlm generate --max-tokens many Hi\n", "not parsed"),
    "a command": ("    jaxlm genrate Hi\n", "not parsed"),
    "a command in a command": ("    srun bash -c 'FOO=1 exec jaxlm genrate Hi'\n", "not parsed"),
    "a second command": ("    cd x && jaxlm info a b c\n", "not parsed"),
    "an extra": ("    pip install -e '.[tests]'\n", "no such extra: tests"),
    "a marker": ("    pytest -m slowly\n", "no such marker: slowly"),
    "a test": ("    pytest tests/nn/test_nothing.py\n", "no such file: tests/nn/test_nothing.py"),
    "a program": ("```sh\njxalm generate\n```", "'jxalm' is no known program"),
    "an inline flag": ("See `jaxlm info --mech x`.", "no such flag: --mech"),
    "an inline path": ("See `tests/nothing.py`.", "no such file: tests/nothing.py"),
    "a link": ("[a](nothing.md)", "no such file: nothing.md"),
    "a heading": ("# One\n[a](#two)", "no such heading: #two"),
    "a lost command": ("- item\n    jaxlm chat\n", "not in a block of code"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: Any, capsys: Any) -> None:
    text, expected = FAULTS[fault]
    assert expected in "\n".join(errors_of("x.md", text, monkeypatch))


def errors_of(page: str, text: str, monkeypatch: Any) -> list[str]:
    """What the tests above say about a page with this text."""
    monkeypatch.setattr(documentation, "read", lambda _: text)
    for cached in (documentation.blocks, documentation.anchors):
        cached.cache_clear()
    try:
        found = [*code_errors(page), *link_errors(page)]
        for block in blocks(page):
            found += [f"{c.where}: {error}" for c in commands(block) if (error := check_command(c))]
        return found
    except ValueError as error:
        return [str(error)]
    finally:
        for cached in (documentation.blocks, documentation.anchors):
            cached.cache_clear()


def test_python_stops_at_the_line_of_the_page() -> None:
    block = Block("x.md", 7, "python", "a = 1\nb = [\n    a / 0]\n")
    assert run_python(block, {}, {}) == "x.md:9: ZeroDivisionError: division by zero"

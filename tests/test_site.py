"""The pages of the site that could go stale: messages of docs/troubleshooting.md, and the generated flag reference."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

from jaxlm import cli
from jaxlm.cli.flags import flags_of
from jaxlm.training.config import Run, field_names

ROOT = Path(__file__).parents[1]
MESSAGES = re.findall(r"^- `([^`]+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


def text_of(node: ast.AST) -> str:
    """The text of a string, with … for each value that it is formatted with."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@cache
def texts() -> str:
    """All strings of the source, one per line."""
    found = []
    for path in (ROOT / "src/jaxlm").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [text_of(n) for n in nodes if isinstance(n, ast.JoinedStr | ast.Constant)]
    return "\n".join(one_value(text.replace("`", "").replace("\n", " ")) for text in found)


def one_value(text: str) -> str:
    """The text with one … for several values in a row."""
    return re.sub("…+", "…", text)


def is_in_source(message: str) -> bool:
    """Whether a string of the source begins with the message."""
    return f"\n{one_value(message).rstrip('…')}" in f"\n{texts()}"


def test_quoted_messages_are_in_the_source():
    assert len(MESSAGES) >= 60
    assert [message for message in MESSAGES if not is_in_source(message)] == []


def test_a_message_that_is_gone_is_found():
    assert not is_in_source("the prompt is void")
    assert is_in_source("the prompt is empty")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_flag_and_key():
    pages = script("flag_pages").pages()
    for name, command in cli.commands().items():
        for flag in flags_of(command):
            assert (flag.metavar if flag.positional else flag.name.lstrip("-").rpartition(".")[2]) in pages[name]
            assert "()" not in pages[name]
        assert f"reference/{name}.md" in (ROOT / "mkdocs.yml").read_text()
    for key in field_names(Run):
        assert f"<code>{key.rpartition('.')[2]}</code>" in pages["training_yaml"], key


def test_links_to_source_files_become_links_to_pages():
    pages = script("source_pages")
    text = "[a](../src/jaxlm/model.py#L7) [b](data.md) `[c](../src/x.py)`\n```\n[d](../x.py)\n```\n[e](../README.md)"
    expected = text.replace("../src/jaxlm/model.py#L7", "../source/src/jaxlm/model.py.md#__codelineno-0-7")
    expected = expected.replace("../README.md", "../source/README.md.md")
    assert pages.with_site_links(text, ROOT / "docs/page.md", "sub/page.md") == expected
    assert pages.linked_files(text, ROOT / "docs/page.md") == [ROOT / "src/jaxlm/model.py", ROOT / "README.md"]
    assert pages.with_site_links("[f](docs/data.md)", ROOT / "README.md", "source/README.md.md") == "[f](../data.md)"


def test_names_of_source_files_become_links():
    pages = script("source_pages")
    text = "`nn/rope.py` `tests/test_site.py` `nn/gone.py` [`nn/rope.py`](a.md)\n```\n`nn/rope.py`\n```"
    expected = text.replace("`nn/rope.py`", "[`nn/rope.py`](../src/jaxlm/nn/rope.py)", 1)
    expected = expected.replace("`tests/test_site.py`", "[`tests/test_site.py`](../tests/test_site.py)")
    assert pages.with_code_links(text, ROOT / "docs/page.md") == expected


def test_what_another_host_would_send_is_found():
    loaded = script("source_pages").LOADED
    assert loaded.search('<script async src="https://example.org/a.js">')
    assert loaded.search("<link rel=stylesheet href=https://example.org/a.css>")
    assert not loaded.search('<a href="https://example.org">text</a> <script src="assets/a.js">')

"""A hook of mkdocs: files of the repository that the documentation links to become a part of the site.

Pages link to source files by relative paths, such as ../src/jaxlm/models/llama3.py, which a code host follows. In the
site, a text file becomes a page with highlighted source, a Markdown file a page, and any other file is copied. Names of
files that are written as code, such as `nn/rope.py` or `tests/test_terms.py`, become links too.

A link to a file that does not exist is a warning, and so is what a page loads from another host. --strict turns them
into errors.
"""

import json
import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^()\s#]*)(#[^()\s]*)?(?=\))")
FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.M | re.S)
CODE = re.compile(FENCE.pattern + r"|`[^`\n]+`", re.M | re.S)
PATH = re.compile(r"(?<!\[)`((?:[\w.]+/)*\w+\.(?:py|yaml|sh))`(?!\])")
LANGUAGES = {
    ".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json",
    ".js": "javascript", ".css": "css", ".html": "html", ".txt": "text", ".cff": "yaml", ".jinja": "jinja",
}  # fmt: skip
LOADED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*\s(?:src|href)=[\"']?https?:[^>]*>")
MAX_BYTES = 200_000  # larger text files are copied
log = logging.getLogger("mkdocs.hooks.source_pages")


def on_files(files: Any, config: Any) -> Any:
    """Adds a file to the site for each file of the repository that a page, or such a file, links to."""
    pages = [(page.src_uri, DOCS / page.src_uri) for page in files.documentation_pages() if page.generated_by is None]
    waiting = [(uri, with_code_links(path.read_text(encoding="utf-8"), path), path) for uri, path in pages]
    while waiting:
        uri, text, path = waiting.pop()
        for target in linked_files(text, path):
            if not target.exists():
                log.warning(f"'{uri}' links to {target.relative_to(ROOT)}, which does not exist")
            elif files.get_file_from_path(site_path(target)) is None:
                file = file_of(target, config)
                files.append(file)
                if target.suffix == ".md":
                    waiting.append((file.src_uri, target.read_text(encoding="utf-8"), target))
    return files


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Warns of what a browser would load from another host: the site works without a network."""
    for tag in LOADED.findall(output):
        log.warning(f"'{page.file.src_uri}' loads from another host: {tag}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points the links to files of the repository at their pages."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return with_site_links(markdown, ROOT / uri.removeprefix("source/").removesuffix(".md"), uri)
    return with_site_links(with_code_links(markdown, DOCS / uri), DOCS / uri, uri)


def with_code_links(markdown: str, path: Path) -> str:
    """The text of a page, with links around names of files, which are relative to src/jaxlm/ or to the repository."""

    def replaced(match: re.Match[str]) -> str:
        target = next((root / match[1] for root in (ROOT / "src/jaxlm", ROOT) if (root / match[1]).is_file()), None)
        return f"[{match[0]}]({posixpath.relpath(target, path.parent)})" if target else match[0]

    return outside(FENCE, markdown, lambda text: PATH.sub(replaced, text))


def with_site_links(markdown: str, path: Path, uri: str) -> str:
    """The text of the page `uri`, which is the file `path`, with links to pages of the site."""

    def replaced(match: re.Match[str]) -> str:
        target = resolved(match[1], path)
        if target is None:
            return match[0]
        line = re.fullmatch(r"#L(\d+)", match[2] or "")
        anchor = f"#__codelineno-0-{line[1]}" if line else match[2] or ""
        return posixpath.relpath(site_path(target), posixpath.dirname(uri)) + anchor

    return outside(CODE, markdown, lambda text: LINK.sub(replaced, text))


def linked_files(markdown: str, path: Path) -> list[Path]:
    """The files of the repository outside docs/ that a Markdown file links to."""
    found: list[Path | None] = []
    outside(
        CODE, markdown, lambda text: found.extend(resolved(match[1], path) for match in LINK.finditer(text)) or text
    )
    return [target for target in found if target is not None and not is_page(target)]


def outside(code: re.Pattern[str], markdown: str, change: Callable[[str], str]) -> str:
    """Applies a function to the parts of a text between matches of a pattern."""
    parts, end = [], 0
    for match in code.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])


def resolved(target: str, path: Path) -> Path | None:
    """The file that a link means: one of the repository, unless it is a page that links to another."""
    if not target or ":" in target or target.startswith("/"):
        return None
    there = Path(posixpath.normpath(path.parent / target))
    return None if (is_page(path) and is_page(there)) or not there.is_relative_to(ROOT) else there


def is_page(target: Path) -> bool:
    """Whether a file is a part of the site by itself: all of docs/ but the scripts."""
    return target.is_relative_to(DOCS) and not target.is_relative_to(DOCS / "scripts")


def site_path(target: Path) -> str:
    """The path in the site: source/src/jaxlm/models/llama3.py.md, or that of a page of docs/."""
    if is_page(target):
        return target.relative_to(DOCS).as_posix()
    path = f"source/{target.relative_to(ROOT).as_posix()}"
    is_text = target.is_dir() or target.suffix in LANGUAGES or target.suffix in (".md", ".ipynb") or not target.suffix
    large = target.is_file() and target.stat().st_size > MAX_BYTES and target.suffix not in (".md", ".ipynb")
    return f"{path}.md" if is_text and not large else path


def file_of(target: Path, config: Any) -> Any:
    """A file of the site for a file of the repository."""
    from mkdocs.structure.files import File

    uri, name = site_path(target), target.relative_to(ROOT).as_posix()
    if not uri.endswith(".md"):
        return File.generated(config, uri, abs_src_path=str(target))
    if target.is_dir():
        body = f"# {name}\n\n" + "".join(f"- `{path.name}`\n" for path in sorted(target.iterdir()))
    elif target.suffix == ".md":
        body = target.read_text(encoding="utf-8")
    elif target.suffix == ".ipynb":
        body = notebook(target.read_text(encoding="utf-8"))
    else:
        text = target.read_text(encoding="utf-8").rstrip("\n")
        body = f'# {name}\n\n~~~~~~~~ {{ .{LANGUAGES.get(target.suffix, "text")} linenums="1" }}\n{text}\n~~~~~~~~\n'
    return File.generated(config, uri, content=f"---\nsearch:\n  exclude: true\n---\n\n{body}")


def notebook(text: str) -> str:
    """The cells of a notebook as Markdown, without outputs."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"~~~~~~~~ python\n{source}\n~~~~~~~~")
    return "\n\n".join(cells) + "\n"

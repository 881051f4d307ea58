"""A hook of mkdocs: files of the repository that the documentation links to become a part of the site.

Pages link to source files by relative paths, such as ../src/jaxlm/models/llama3.py, which a code host follows. In the
site, a text file becomes a page with highlighted source, a Markdown file a page, and any other file is copied. A link
to a file that does not exist is a warning, and so is what a page loads from another host. --strict turns warnings into
errors.
"""

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^()\s#]*)(#[^()\s]*)?(?=\))")
CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$|`[^`\n]+`", re.M | re.S)
LANGUAGES = {
    ".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json",
    ".js": "javascript", ".css": "css", ".html": "html", ".txt": "text", ".cff": "yaml", ".jinja": "jinja",
}  # fmt: skip
LOADED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*\s(?:src|href)=[\"']?https?:[^>]*>")
MAX_BYTES = 200_000  # larger text files are copied
log = logging.getLogger("mkdocs.hooks.source_pages")


def on_files(files: Any, config: Any) -> Any:
    """Adds a file to the site for each file of the repository that a page, or such a file, links to."""
    waiting = [(page.src_uri, page.content_string, DOCS / page.src_uri) for page in files.documentation_pages()]
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
    path = ROOT / uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else DOCS / uri
    return with_site_links(markdown, path, uri)


def with_site_links(markdown: str, path: Path, uri: str) -> str:
    """The text of the page `uri`, which is the file `path`, with links to pages of the site."""

    def replaced(match: re.Match[str]) -> str:
        target = resolved(match[1], path)
        if target is None:
            return match[0]
        line = re.fullmatch(r"#L(\d+)", match[2] or "")
        anchor = f"#__codelineno-0-{line[1]}" if line else match[2] or ""
        return posixpath.relpath(site_path(target), posixpath.dirname(uri)) + anchor

    return outside_code(markdown, lambda text: LINK.sub(replaced, text))


def linked_files(markdown: str, path: Path) -> list[Path]:
    """The files of the repository outside docs/ that a Markdown file links to."""
    found: list[Path | None] = []
    outside_code(markdown, lambda text: found.extend(resolved(match[1], path) for match in LINK.finditer(text)) or text)
    return [target for target in found if target is not None and not is_page(target)]


def outside_code(markdown: str, change: Any) -> str:
    """Applies a function to the parts of a text that are not code."""
    parts, end = [], 0
    for match in CODE.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])


def resolved(target: str, path: Path) -> Path | None:
    """The file that a link means: one of the repository, unless it is a page of docs/ that links to another."""
    if not target or ":" in target or target.startswith("/"):
        return None
    there = Path(posixpath.normpath(path.parent / target))
    inside = path.is_relative_to(DOCS) and there.is_relative_to(DOCS)
    return None if inside or not there.is_relative_to(ROOT) else there


def is_page(target: Path) -> bool:
    return target.is_relative_to(DOCS)


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

"""Markdown on the page: against markdown-it-py, while it grows, and texts that attack the page."""

import random
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from helpers.chat_page import Reply
from markdown_it import MarkdownIt

pytestmark = pytest.mark.oracle

RENDER = """async (texts) => {
  const { renderMarkdown } = await import(new URL("page/markdown.js", document.baseURI));
  return texts.map((text) => {
    const box = document.createElement("div");
    renderMarkdown(box, text);
    return box.innerHTML;
  });
}"""
GROW = """async (text) => {
  const { renderMarkdown } = await import(new URL("page/markdown.js", document.baseURI));
  const grown = document.createElement("div");
  for (let end = 0; end < text.length; end += 3) renderMarkdown(grown, text.slice(0, end));
  const first = grown.firstChild;
  renderMarkdown(grown, text);
  const whole = document.createElement("div");
  renderMarkdown(whole, text);
  return [grown.innerHTML, whole.innerHTML, first === grown.firstChild];
}"""
BLOCKS = [
    "one\n\ntwo", "one\ntwo", "a  \nb", "# Title\ntext", "#no title", "### Title ###", "###### six\n####### seven",
    "- a\n- b\n- c", "* a\n\n* b\n", "1. a\n2. b\n10. c", "3) a\n4) b", "- a\n  - b\n    - c\n- d",
    "1. a\n   - b\n   - c\n2. d", "1. a\n\n   more of a\n\n2. b", "- a\n\n      code\n- b", "text\n- a\n- b",
    "text\n2. no list", "text\n1. list", "- a\n+ b", "- a\ncontinued\n- b", "- a\n\nafter", "-\n- b",
    "- **a**: b\n- `c`: d", "* * *", "---", "a\n***\nb", "```python\nx = 1\n\n  y\n```\nafter", "~~~\na\n~~~",
    "```\n# no title\n- no list\n<b>\n```", "```js\nno end", "````\n```\n````", "  ```\n  a\n    b\n  ```",
    "- a\n\n  ```py\n  code\n  ```\n- b", "1. a\n```\ncode\n```\n2. b", "    indented\n      code\n\ntext",
    "> quote\n> more\n\ntext", "> a\nlazy", "> - a\n> - b\n>\n> > deeper", "> ```\n> code\n> ```",
    "| a | b |\n| --- | ---: |\n| 1 | 2 |\n| 3 |", "a | b\n-|-\nc \\| d | `e`\n\ntext", "| a |\n| - |", "no | table",
    "<b>bold</b>", "<script>alert(1)</script>", "a <br> b", "\ttab", "", "\n\n", "# ", "*", "- ",
]  # fmt: skip
INLINE = [
    "*a* _b_ **c** __d__ ***e*** ~~f~~", "a*b*c a_b_c snake_case_name __init__", "2 * 3 * 4", "* a*", "**a *b* c**",
    "*a **b** c*", "**a", "a**", "*a**b*", "**bold***", "`a` ``b ` c`` ` d", "`*a*` *`b`*", "` `` `",
    "\\*a\\* \\` \\[", "[a](https://b.c)", "[a](<https://b.c/d>)", '[a](https://b.c "title")',
    "[*a* `b`](https://b.c/(d))", "[a] (b.c)", "[a](mailto:b@c.d", "[[a]](https://b.c)",
    "[`]`](https://a.b)", "<https://a.b/c>", "*a\nb*", "5 < 6 & 7 > 3",
    "**“a”** b", "**日本語。**テスト", "a 👍*b*👍 c", "*(a)*b", "_(a)_b", "**(a)**b",
]  # fmt: skip
VOID = {"br", "hr"}


class Tree(HTMLParser):
    """HTML as nested lists: [tag, attributes, children...]. Text between blocks is left out."""

    def __init__(self, html: str):
        super().__init__()
        self.root: list[Any] = []
        self.stack: list[list[Any]] = [self.root]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        keep = {k: v for k, v in attrs if k in ("href", "start")}
        node: list[Any] = [tag, keep]
        self.stack[-1].append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        children = self.stack[-1]
        if children and isinstance(children[-1], str):
            children[-1] += data
        else:
            children.append(data)


def plain(nodes: list[Any], inside: str = "") -> Iterator[Any]:
    """The tree with what the page does on purpose undone: levels of headings, boxes of code and tables, spaces."""
    for node in nodes:
        if isinstance(node, str):
            text = node.rstrip("\n") if inside == "code" else " ".join(node.split())
            if text:
                yield text
            continue
        tag, attributes, *children = node
        if tag in ("button", "span"):
            continue
        if tag == "div":
            yield from plain(children)
        else:
            yield [tag, attributes, *plain(children, "code" if tag == "code" else "")]


def lower_headings(html: str) -> str:
    """The headings of markdown-it as the page has them, and its tag of strikethrough."""
    for level in range(6, 0, -1):
        new = min(level + 2, 6)
        html = html.replace(f"<h{level}>", f"<h{new}>").replace(f"</h{level}>", f"</h{new}>")
    return html.replace("<s>", "<del>").replace("</s>", "</del>")


def expected(text: str) -> list[Any]:
    reference = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    return [*plain(Tree(lower_headings(reference.render(text))).root)]


@pytest.fixture(scope="module")
def page(browser, fake_server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(fake_server.url)
    yield page
    context.close()


def test_it_is_that_of_markdown_it(page) -> None:
    texts = [*BLOCKS, *INLINE]
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert [*plain(Tree(html).root)] == expected(text), repr(text)


def test_random_emphasis_is_that_of_markdown_it(page) -> None:
    rng = random.Random(0)
    parts = ["*", "**", "***", "_", "__", "`", "a", "b c", " ", ".", "(", ")", "é", "[c", "](mailto:a@b.c)", "\\"]
    texts = ["x" + "".join(rng.choices(parts, k=rng.randint(2, 16))) for _ in range(1500)]
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert [*plain(Tree(html).root)] == expected(text), repr(text)


def test_a_text_that_grows_is_the_same_at_its_end(page) -> None:
    text = "\n\n".join(BLOCKS + INLINE)
    grown, whole, kept = page.evaluate(GROW, text)
    assert grown == whole
    assert kept  # a block that is complete is not drawn again


UNSAFE = [
    "<img src=x onerror=hacked()>", "<script>hacked()</script>",
    "<iframe srcdoc='<script>hacked()</script>'></iframe>", "[a](javascript:hacked())", "[a](JaVaScRiPt:hacked())",
    "[a](java\nscript:hacked())", "[a](<java\tscript:hacked()>)", "[a](data:text/html,<script>hacked()</script>)",
    "[a](vbscript:hacked())", "[a](file:///etc/passwd)", "[a](//other.host)", "[a](blob:x)", "<javascript:hacked()>",
    "![a](javascript:hacked())", "![a](https://other.host/pixel.png)", "[<img src=x onerror=hacked()>](https://a.b)",
    '[a](https://a.b" onclick="hacked())', "```<img/onerror=hacked()>\ncode\n```",
    "| <img src=x onerror=hacked()> |\n| - |", "# <svg onload=hacked()>", "`<b onmouseover=hacked()>`",
]  # fmt: skip
FACTS = """() => [...document.querySelectorAll(".markdown *")].map((node) => [
  node.tagName, node.href ?? "", node.getAttributeNames().filter((name) => name.startsWith("on")).join(),
])"""


def test_attacks_are_text(fake, open_tab) -> None:
    fake.replies = [Reply([{"content": f"{text}\n\n"} for text in UNSAFE] + [{"reasoning_content": UNSAFE[0]}])]
    tab = open_tab(fake.url)
    tab.page.expose_function("hacked", lambda: tab.console.append("hacked"))
    tab.ask("<img src=x onerror=hacked()>")
    for tag, href, events in tab.page.evaluate(FACTS):
        assert tag not in ("IMG", "SCRIPT", "IFRAME", "SVG", "OBJECT", "EMBED", "FORM", "STYLE", "BASE", "META"), tag
        assert href == "" or href.startswith(("https://a.b/", "https://other.host/")), href
        assert events == ""
    for link in tab.page.locator(".markdown a").all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert "[a](javascript:hacked())" in tab.answers()[0]


def test_the_policy_stops_what_a_mistake_would_let_through(fake, open_tab) -> None:
    tab = open_tab(fake.url)
    for code in (
        "document.body.innerHTML = '<img src=x>'",
        "document.createElement('div').setHTMLUnsafe('<b>')",
        "document.createElement('script').textContent = 'hacked()'",
        "setTimeout('hacked()')",
    ):
        found = tab.page.evaluate(f"(() => {{ try {{ {code} }} catch (error) {{ return error.name }} }})()")
        assert found in ("TypeError", "EvalError"), code
    other = "fetch('https://other.host/').catch((error) => error.name)"
    assert tab.page.evaluate(other) == "TypeError"
    assert any("other.host" in line and "Content Security Policy" in line for line in tab.console)
    tab.console.clear()
    tab.requests[:] = [url for url in tab.requests if "other.host" not in url]


LAYOUT = """async (text) => {
  const { renderMarkdown } = await import(new URL("page/markdown.js", document.baseURI));
  const box = document.createElement("div");
  const start = performance.now();
  renderMarkdown(box, text);
  document.querySelector("#conversation").append(box);
  box.offsetHeight; // lays it out
  box.remove();
  return performance.now() - start;
}"""
PARTS = [
    "*a **a ", "[", "](", "[a](", "``` ``", "> ", "- ", "_a_", "|a", "\\", "**", "a* ", "<https://", "~~a", "  - ",
    "(", "![[x](y ", "`a``", "https://a.b)", "# ", "1. ", "|", "| -", ">\n", "- a\n\n", "*_",
]  # fmt: skip


DEEP = ["*a " * 10_000 + "a* " * 10_000, "[a" * 10_000 + "](https://a.b)" * 10_000]


@pytest.mark.parametrize("text", [part * (60_000 // len(part)) for part in PARTS] + DEEP, ids=lambda text: text[:8])
def test_no_text_stops_the_page(page, text) -> None:
    """The time is about linear, and no tree is too deep to lay out. On a slow machine, a text takes 0.3 s."""
    assert page.evaluate(LAYOUT, text) < 3000  # milliseconds

"""Draws docs/pictures/<family>.svg for every family, and docs/pictures/families.svg with all of them.

    PYTHONPATH=src python docs/scripts/architecture_pictures.py

What is drawn comes from `architecture.py`. Steps that Llama 3 does not have are orange. A dashed box is a step that
Llama 3 has in this place and the family has not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from architecture import Architecture, Node, architectures
from architecture_steps import Step, all_steps, description, kind, layer_steps

PICTURES = Path(__file__).parents[1] / "pictures"
REFERENCE = "llama3"  # the family with which the others are compared
LETTERS = {"V": "vocabulary", "D": "model width", "F": "MLP width", "L": "layers", "N": "query heads",
           "K": "key/value heads", "H": "head width"}  # fmt: skip
OTHER_LETTERS = ("B, T", "batch, query length")
# A picture has its own background, because a page and the browser may disagree about the color scheme.
STYLE = """
:root { --page: #ffffff; --edge: #d0d7de; --text: #1f2328; --muted: #59636e; --line: #8c959f; --box: #f6f8fa;
  --frame: #fcfcfd; --new: #bc4c00; --new-box: #fff1e5; --cell: #57606a; --cell2: #c8d1da }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --edge: #30363d; --text: #e6edf3; --muted: #9198a1; --line: #6e7681; --box: #1b222b;
    --frame: #11161d; --new: #f0883e; --new-box: #33200f; --cell: #9ea7b3; --cell2: #444c56 } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--text) }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 14px; font-weight: 600 }
.shape { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; fill: var(--muted) }
.title { font-size: 23px; font-weight: 650 }
.head { font-size: 16px; font-weight: 600 }
.tiny { font-size: 12px }
.small { font-size: 13px; fill: var(--muted) }
.middle { text-anchor: middle }
.end { text-anchor: end }
.page { fill: var(--page); stroke: var(--edge) }
.frame { fill: var(--frame); stroke: var(--edge) }
.box { fill: var(--box); stroke: var(--line) }
.new { fill: var(--new-box); stroke: var(--new); stroke-width: 1.6 }
.gone { fill: none; stroke: var(--new); stroke-dasharray: 4 4 }
text.newtext, text.gonetext, text.changedtext { fill: var(--new) }
text.gonetext { paint-order: stroke; stroke: var(--frame); stroke-width: 6px }
.line { fill: none; stroke: var(--line); stroke-width: 1.5 }
.stream { fill: none; stroke: var(--text); stroke-width: 2.5 }
.plus { fill: none; stroke: var(--text); stroke-width: 2 }
.tip { fill: var(--line) }
.sum { fill: var(--page); stroke: var(--text); stroke-width: 2 }
.full, .window, .norope { stroke: var(--cell) }
.full { fill: var(--cell) }
.window { fill: none }
.norope { fill: var(--cell2) }
""".strip()


@dataclass(frozen=True)
class Sizes:
    """The measures of a picture of a layer: widths, the left edge of the boxes, heights, gaps."""

    width: float
    stream: float  # x of the residual stream
    left: float
    right: float
    single: float  # height of a box across
    double: float  # height of a box in a column
    gap: float
    columns: float  # gap between columns
    small: bool  # names alone


DETAILED = Sizes(440, 40, 78, 416, 32, 46, 15, 10, False)
SMALL = Sizes(152, 14, 30, 150, 24, 24, 10, 4, True)


class Picture:
    """The elements of an SVG, drawn from top to bottom."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.elements = sizes, []

    def add(self, element: str) -> None:
        self.elements.append(element)

    def text(self, x: float, y: float, content: str, style: str = "label") -> None:
        if content:
            self.add(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(content)}</text>')

    def rect(self, x: float, y: float, w: float, h: float, style: str, radius: float = 6) -> None:
        self.add(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" class="{style}"/>')

    def path(self, d: str, style: str = "line") -> None:
        self.add(f'<path d="{d}" class="{style}"/>')

    def arrow(self, x: float, top: float, bottom: float) -> None:
        """A line down that ends with a tip."""
        self.path(f"M{x:g} {top:g}V{bottom - 4:g}")
        self.path(f"M{x - 4:g} {bottom - 6:g}h8l-4 6z", "tip")

    def step(self, step: Step, x: float, y: float, w: float, h: float) -> None:
        """A box with the name of a step, its shape and its details."""
        node, tint, middle = step.node, f" {step.state}text" * (step.box != "box"), x + w / 2
        self.rect(x, y, w, h, step.box)
        if step.state == "gone":
            self.path(f"M{middle:g} {y:g}v{h:g}")  # values pass
        name, style = _name(node)
        if self.sizes.small:
            self.text(middle, y + h / 2 + 4.5, _short(step), f"tiny middle{tint}")
        elif step.state == "gone":
            self.text(middle, y + h / 2 + 5, f"no {name} here", f"small middle{tint}")
        elif h == self.sizes.single:
            self._across(step, x, y, w)
        else:
            self.text(middle, y + (19 if node.shape or step.kinds else 28), name, f"{style} middle{tint}")
            self.text(middle, y + 37, node.shape, "shape middle")
            self._chips(step.kinds, middle, y + 28)

    def _across(self, step: Step, x: float, y: float, w: float) -> None:
        """The content of a box across: name and shape at the left, details at the right."""
        (name, style), node = _name(step.node), step.node
        tint = f" {step.state}text" if step.state else ""
        self.text(x + 12, y + 21, name, style + tint * (step.state == "new"))
        self.text(x + 20 + 8.5 * len(name), y + 21, node.shape, "shape")
        kind = {"norm": "RMSNorm", "attention": "causal"}.get(node.op, "")
        detail = "" if node.op == "scale" else node.detail
        self.text(x + w - 12, y + 21, ", ".join(filter(None, (kind, detail))), "small end" + tint * bool(detail))

    def _chips(self, kinds: tuple[str, ...], middle: float, y: float) -> None:
        begin = middle - (len(kinds) * 14 - 4) / 2
        for i, one in enumerate(kinds):
            self.rect(begin + 14 * i, y, 10, 10, one, 2)


def _name(node: Node) -> tuple[str, str]:
    """What a box says, and its style: weights as in the code, operations in words."""
    if node.weight:
        return node.weight, "code"
    return {"rope": "RoPE", "attention": "attention", "multiply": "×", "scale": f"× {node.detail}",
            "activation": node.detail}[node.op], "label"  # fmt: skip


def _short(step: Step) -> str:
    """The name of a step in the small picture of a layer."""
    name = "norm" if step.node.op == "norm" else _name(step.node)[0].removesuffix(" (tanh)")
    return f"no {name}" if step.state == "gone" else name


def draw_chain(
    picture: Picture, steps: list[Step], left: float, w: float, y: float, h: float, x: float, first: float = 0
) -> float:
    """Steps one below the other, joined by arrows at x. `first` is the length of the first arrow. The bottom of the
    last step."""
    for i, step in enumerate(steps):
        gap = first if first and i == 0 else picture.sizes.gap
        if step.state == "gone":
            picture.path(f"M{x:g} {y:g}v{gap:g}")
        else:
            picture.arrow(x, y, y + gap)
        y += gap
        if step.node.op == "multiply":
            r = 8 if picture.sizes.small else 11
            picture.add(f'<circle cx="{x:g}" cy="{y + r:g}" r="{r:g}" class="{step.box}"/>')
            picture.text(x, y + r + 5, "×", "label middle")
            y += 2 * r
        else:
            picture.step(step, left, y, w, h)
            y += h
    return y


def draw_block(picture: Picture, parts: list[list[Step]], y: float) -> float:
    """A block beside the residual stream, which is added to it at the end. The bottom of the addition."""
    s = picture.sizes
    before, branches, after = parts[0], parts[1:-1], parts[-1]
    middle, across = (s.left + s.right) / 2, s.right - s.left
    picture.path(f"M{s.stream:g} {y:g}H{middle - 8:g}q8 0 8 8")
    y += 8
    first = s.gap * 0.6
    if before or not branches:
        chain, after = (before, after) if branches else (after, [])
        y, first = draw_chain(picture, chain, s.left, across, y, s.single, middle, first), s.gap * 0.6
    if branches:
        w = (across - s.columns * (len(branches) - 1)) / len(branches)
        centers = [s.left + w / 2 + i * (w + s.columns) for i in range(len(branches))]
        fork = y + first
        picture.path(f"M{middle:g} {y:g}V{fork:g}M{centers[0]:g} {fork:g}H{centers[-1]:g}")
        ends = [draw_chain(picture, steps, x - w / 2, w, fork, s.double, x) for steps, x in zip(branches, centers)]
        join = max(ends) + s.gap * 0.6
        for x, end in zip(centers, ends):
            picture.path(f"M{x:g} {end:g}V{join:g}")
        picture.path(f"M{centers[0]:g} {join:g}H{centers[-1]:g}")
        y = draw_chain(picture, after, s.left, across, join, s.single, middle)
    r = 8 if s.small else 10
    bottom = y + s.gap * 0.6 + r
    picture.path(f"M{middle:g} {y:g}V{bottom - 8:g}q0 8 -8 8H{s.stream + r + 5:g}")
    picture.path(f"M{s.stream + r + 7:g} {bottom - 4:g}v8l-6 -4z", "tip")
    picture.add(f'<circle cx="{s.stream:g}" cy="{bottom:g}" r="{r:g}" class="sum"/>')
    picture.path(f"M{s.stream - r / 2:g} {bottom:g}h{r:g}M{s.stream:g} {bottom - r / 2:g}v{r:g}", "plus")
    return bottom + r


def draw_layer(picture: Picture, blocks: list[list[list[Step]]], y: float, first: float) -> float:
    """The blocks of a layer on the residual stream, which is drawn below them. The first block begins at y + first."""
    place, begin = len(picture.elements), y
    y += first - picture.sizes.gap
    for parts in blocks:
        y = draw_block(picture, parts, y + picture.sizes.gap)
    y += picture.sizes.gap
    picture.elements.insert(place, f'<path d="M{picture.sizes.stream:g} {begin:g}V{y:g}" class="stream"/>')
    return y


def draw_pattern(picture: Picture, family: Architecture, reference: Architecture, y: float) -> float:
    """A cell for each layer, and what the types of layers are."""
    rows = -(-len(family.pattern) // 30)
    per_row = -(-len(family.pattern) // rows)
    for i, one in enumerate(family.pattern):
        picture.rect(24 + 13 * (i % per_row), y + 13 * (i // per_row), 10, 10, kind(family.layer_types[one]), 2)
    y += 13 * rows + 22
    usual = {kind(one) for one in reference.layer_types}
    for i, one in enumerate(family.layer_types):
        picture.rect(24, y - 10, 10, 10, kind(one), 2)
        new = "" if kind(one) in usual else " newtext"
        picture.text(42, y, f"{family.pattern.count(i)} layers: {one.words}", f"small{new}")
        y += 20
    return y


def picture_of(family: Architecture, reference: Architecture) -> str:
    """The SVG of one family."""
    s, picture = DETAILED, Picture(DETAILED)
    picture.text(24, 46, family.name, "title")
    picture.text(416, 45, f"models/{family.module}.py", "shape end")
    stem, blocks, top = all_steps(family, reference)
    picture.text(s.stream - 5, 84, "tokens")
    picture.text(s.stream + 47, 84, "[B,T]", "shape")
    y = draw_chain(picture, stem, 24, 392, 92, s.single, s.stream)
    frame, place = y + 14, len(picture.elements)
    picture.text(416, frame + 25, f"layer, × {family.config.L}", "head end")
    y = draw_layer(picture, blocks, y, 32)
    box = f'<rect x="12" y="{frame:g}" width="416" height="{y - frame:g}" rx="10" class="frame"/>'
    picture.elements.insert(place, box)
    y = draw_chain(picture, top, 24, 392, y, s.single, s.stream, 22)
    picture.arrow(s.stream, y, y + s.gap)
    picture.text(s.stream - 5, y + 33, "logits")
    picture.text(s.stream + 41, y + 33, "[B,T,V]", "shape")
    y = draw_pattern(picture, family, reference, y + 58)
    y = draw_legend(picture, family, y + 14)
    if family is not reference:
        y = draw_key(picture, reference.name, 24, y + 6, 226)
    return document(picture, s.width, y + 4, f"{family.name}: architecture", description(family, stem, blocks, top))


def draw_legend(picture: Picture, family: Architecture, y: float) -> float:
    """The letters with the sizes of the published model."""
    picture.text(24, y, f"Sizes of {family.model}", "small")
    y += 24
    for i, (letter, meaning) in enumerate(LETTERS.items()):
        x, row = (24, i) if i < 4 else (226, i - 4)
        picture.text(x, y + 21 * row, letter, "code")
        picture.text(x + 20, y + 21 * row, meaning, "small")
        picture.text(x + (190 if x > 24 else 180), y + 21 * row, f"{getattr(family.config, letter):,}", "shape end")
    picture.text(226, y + 63, OTHER_LETTERS[0], "code")
    picture.text(266, y + 63, OTHER_LETTERS[1], "small")
    return y + 4 * 21


def draw_key(picture: Picture, reference: str, x: float, y: float, second: float) -> float:
    """What the colors mean. The second entry is at x = `second`, below the first if that is the same."""
    for at, style, text in ((x, "new", f"differs from {reference}"), (second, "gone", f"only {reference} has it here")):
        y += 20 if at == x and style == "gone" else 0
        picture.rect(at, y - 11, 18, 12, style, 3)
        picture.text(at + 26, y, text, "small")
    return y + 16


def overview(families: list[Architecture], columns: int) -> str:
    """The layers of all families side by side, in rows of `columns`."""
    reference = next(one for one in families if one.module == REFERENCE)
    picture, pitch, y = Picture(SMALL), SMALL.width + 8, 12.0
    for begin in range(0, len(families), columns):
        row = [(Picture(SMALL), family) for family in families[begin : begin + columns]]
        ends = [draw_layer(one, layer_steps(family, reference), 30, 10) for one, family in row]
        bottoms = [_small_pattern(one, family, max(ends) + 12) for one, family in row]
        for i, (one, family) in enumerate(row):
            one.text(8, 20, family.name, "head")
            picture.add(f'<g transform="translate({12 + i * pitch:g} {y:g})">{"".join(one.elements)}</g>')
        y += max(bottoms) + 18
    y = draw_key(picture, reference.name, 20, y, 20 if columns < 3 else 220)
    texts = [f"{one.name}: {description(one, *all_steps(one, reference))}" for one in families]
    return document(picture, 16 + columns * pitch, y, "One layer of each family", " ".join(texts))


def _small_pattern(picture: Picture, family: Architecture, y: float) -> float:
    """A cell for each of the first layers, and what the types of layers are."""
    for i, one in enumerate(family.pattern[:12]):
        picture.rect(8 + 11 * i, y, 8, 8, kind(family.layer_types[one]), 2)
    picture.text(8 + 11 * 12, y + 8, "…", "tiny")
    y += 28
    for one in family.layer_types:
        picture.rect(8, y - 9, 8, 8, kind(one), 2)
        window = "full attention" if one.window is None else "sliding window"
        new = " newtext" if kind(one) != "full" else ""
        picture.text(22, y, window if one.rope else "no RoPE", f"tiny{new}")
        y += 17
    return y


def document(picture: Picture, width: float, height: float, title: str, text: str) -> str:
    """The SVG with its title and description."""
    body = "\n".join(picture.elements)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="title text">\n'
        f'<title id="title">{escape(title)}</title>\n<desc id="text">{escape(text)}</desc>\n'
        f"<style>\n{STYLE}\n</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="12" class="page"/>\n{body}\n</svg>\n'
    )


def pictures() -> Iterator[tuple[str, str]]:
    """Name and content of every file."""
    families = architectures()
    reference = next(one for one in families if one.module == REFERENCE)
    for family in families:
        yield f"{family.module}.svg", picture_of(family, reference)
    yield "families.svg", overview(families, len(families))
    yield "families_narrow.svg", overview(families, 2)


if __name__ == "__main__":
    for name, content in pictures():
        (PICTURES / name).write_text(content, encoding="utf-8")
        print(PICTURES / name)

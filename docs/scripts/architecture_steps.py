"""The steps of an architecture as they are drawn: what is new, gone or changed in comparison with Llama 3."""

from dataclasses import dataclass

from architecture import Architecture, LayerType, Node


@dataclass(frozen=True)
class Step:
    """A node as it is drawn.

    Attributes:
        node: The node.
        state: In comparison with Llama 3: "", "new", "gone", or "changed" where only the detail differs.
        kinds: What layers have it, if not all of them have it.
    """

    node: Node
    state: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def box(self) -> str:
        return self.state if self.state in ("new", "gone") else "box"


def compared(own: list[Node], reference: list[Node]) -> list[Step]:
    """The nodes of a part of a family as steps. What only the reference has is gone: before the first node if it came
    first there, else at the end."""
    places = {(node.op, node.weight, node.letters): node for node in reference if node.op != "activation"}

    def state(node: Node) -> str:
        if node in reference:
            return ""
        return "changed" if (node.op, node.weight, node.letters) in places else "new"

    steps = [Step(node, state(node)) for node in own]
    gone = [Step(node, "gone") for node in reference if node.op not in {other.op for other in own}]
    first = [step for step in gone if step.node is reference[0]]
    return [*first, *steps, *gone[len(first) :]]


def kind(one: LayerType) -> str:
    """The style of a type of layers in the row of layers."""
    return "norope" if not one.rope else "full" if one.window is None else "window"


def layer_steps(family: Architecture, reference: Architecture) -> list[list[list[Step]]]:
    """The steps of each part of each block of a layer."""
    found = []
    for i, block in enumerate(family.blocks):
        others = reference.blocks[i].parts() if i < len(reference.blocks) else []
        parts = []
        for p, part in enumerate(block.parts()):
            same_place = others[p] if p < len(others) and len(others) == len(block.parts()) else []
            steps = compared(part, same_place)
            for s, step in enumerate(steps):
                types = family.types_with(i, p, step.node)
                if step.state != "gone" and len(types) < len(family.layer_types):
                    steps[s] = Step(step.node, "new", tuple(kind(family.layer_types[one]) for one in types))
            parts.append(steps)
        found.append(parts)
    return found


def words(node: Node) -> str:
    """One step in words, for lists and screen readers."""
    named = {"rope": "RoPE", "attention": "attention", "multiply": "multiplication"}.get(node.op, node.weight)
    if node.op == "activation":
        return node.detail
    if node.op == "scale":
        return f"multiplication with {node.detail}"
    return " ".join(filter(None, (named, node.shape, f"({node.detail})" if node.detail else "")))


def top_steps(family: Architecture, reference: Architecture) -> list[Step]:
    """The steps after the layers, with `head` in the place of the embedding where the head is tied."""
    tied = "tied to embed" if all(family.tied) else "tied to embed in some models" if any(family.tied) else ""

    def head(one: Architecture, detail: str) -> list[Node]:
        return [Node(n.op, "head", n.letters, detail) if n.op == "product" else n for n in one.top]

    return compared(head(family, tied), head(reference, tied))


def all_steps(family: Architecture, reference: Architecture) -> tuple[list[Step], list[list[list[Step]]], list[Step]]:
    """The steps before the layers, of a layer, and after the layers."""
    return compared(family.stem, reference.stem), layer_steps(family, reference), top_steps(family, reference)


def description(family: Architecture, stem: list[Step], blocks: list[list[list[Step]]], top: list[Step]) -> str:
    """The computation in words, for screen readers."""

    def listed(steps: list[Step]) -> str:
        return ", ".join(words(step.node) for step in steps if step.state != "gone")

    sentences = [f"Tokens: {listed(stem)}."]
    for i, parts in enumerate(blocks, 1):
        before, branches, after = listed(parts[0]), "; ".join(listed(p) for p in parts[1:-1]), listed(parts[-1])
        inner = f"in parallel {branches}; then {after}" if branches else after
        sentences.append(
            f"Block {i} of a layer: {f'{before}; ' if before else ''}{inner}; added to the residual stream."
        )
    sentences += [f"{family.pattern.count(i)} layers: {one.words}." for i, one in enumerate(family.layer_types)]
    return " ".join([*sentences, f"After the layers: {listed(top)}."])

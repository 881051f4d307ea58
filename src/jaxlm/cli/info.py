"""`jaxlm info`: what a checkpoint is made of, as a tree or as JSON."""

import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxlm.cli import adapter_facts, facts
from jaxlm.cli.common import ModelFlags

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True)
class Info(ModelFlags):
    """Show what a model is made of: shapes, parameters, memory, context, tokenizer. Weights are not loaded.

    A folder or a config.json without weights will do; of a model on the hub only small files are fetched. --dtype shows
    the bytes of another type than the file's.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder or config.json; as -m."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        if (self.name is not None and self.model is not None) or (self.name, self.model, self.adapter) == (None,) * 3:
            print("jaxlm: name one model: a hub id, a folder or a config.json (jaxlm info --help)", file=sys.stderr)
            return 2
        name, adapter = adapter_facts.split(self.name or self.model, self)
        found = facts.resolve(name, self)
        try:
            told = facts.describe(name, found, self)
            if adapter is not None:
                told["adapter"] = adapter_facts.describe(adapter, found.config, found.tensors, self.allow_field)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if self.json:
            print(json.dumps(told, indent=2, ensure_ascii=False))
        else:
            from rich.console import Console

            console = Console(highlight=False)
            console.print(draw(told, console.width))
        return 0


def draw(told: dict[str, Any], columns: int) -> "Tree":
    """The facts as a tree for a terminal that is so many characters wide."""
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"{told['model']} ({told['family']})", style="bold"), guide_style="dim")
    for title, beside, lines in sections(told, columns):
        branch = tree.add(Text.assemble((title, "bold"), f"  {beside}" if beside else ""))
        for line in lines:
            if isinstance(line, str):
                branch.add(Text(line))
            else:
                below = branch.add(Text(line[0]))
                for part in line[1]:
                    below.add(Text(part))
    return tree


def sections(told: dict[str, Any], columns: int) -> list[tuple[str, str, list[Any]]]:
    """Title, what stands beside it, and the lines below; a line may have lines below it."""
    counts = told["parameters"]
    sizes = ", ".join(f"{letter} {size:,}" for letter, size in told["sizes"].items())
    return [
        ("parameters", f"{counts['total']:,}", [
            f"embedding and head {counts['embedding']:,}", f"each layer {counts['layer']:,}"
        ]),
        ("weights", *_weights(told["weights"])),
        ("sizes", sizes, []),
        ("tensors", "", _tensors(told, columns)),
        ("context", f"{told['context']:,} tokens", [_rope(*item) for item in told["rope"].items()]),
        ("cache", *_cache(told)),
        *([("mesh", *_mesh(told))] if told["mesh"] else []),
        *([("adapter", *adapter_facts.lines(told["adapter"]))] if "adapter" in told else []),
        ("tokenizer", *_tokenizer(told["tokenizer"])),
        ("generation", _generation(told["generation"]), []),
    ]  # fmt: skip


def _weights(weights: dict[str, Any]) -> tuple[str, list[str]]:
    from jaxlm.devices.hardware import gigabytes

    size = f"{gigabytes(weights['bytes'])} in {weights['dtype']}"
    if not weights["present"]:
        assumed = "" if weights["dtype_stated"] else "; the config states no type"
        return f"absent; {size}{assumed}", [weights["why"]] if weights["why"] else []
    lines = []
    stored = ", ".join(f"{gigabytes(nbytes)} in {dtype}" for dtype, nbytes in weights["stored"].items())
    if list(weights["stored"]) != [weights["dtype"]]:
        lines.append(f"stored: {stored}")
    if weights["unread"]:
        names = ", ".join(f"{count:,} {beginning}" for beginning, count in weights["unread"].items())
        lines.append(f"not read: {names} ({gigabytes(weights['unread_bytes'])})")
    return f"{size}, {weights['files']} file{'s' * (weights['files'] > 1)}", lines


def _tensors(told: dict[str, Any], columns: int) -> list[Any]:
    """One line a tensor, its parts below each other where the terminal is wide enough for that; those of a layer below
    a line that says how many layers there are, and of which kind."""
    layer = [t for t in told["tensors"] if t["path"].startswith("layers.")]
    begin = told["tensors"].index(layer[0])
    name, letters, shape, count = (max(map(len, part)) for part in zip(*map(_parts, told["tensors"])))
    guides = 3 * 4  # four columns a level
    wide = guides + name + letters + shape + count + 6 <= columns

    def line(t: dict[str, Any], indent: int) -> str:
        parts = _parts(t)
        if not wide:
            return "  ".join(parts)
        return f"{parts[0]:{name + indent}}  {parts[1]:{letters}}  {parts[2]:{shape}}  {parts[3]:>{count}}"

    first = [line(t, 4) for t in told["tensors"][:begin]]
    last = [line(t, 4) for t in told["tensors"][begin + len(layer) :]]
    tied = ["head: the embedding, tied"] if told["tied_head"] else []
    title = f"layers × {told['sizes']['L']}"
    kinds = [_kind(kind) for kind in told["layers"]] if len(told["layers"]) > 1 or told["layers"][0]["window"] else []
    return [*first, (title + "".join(f"; {kind}" for kind in kinds), [line(t, 0) for t in layer]), *last, *tied]


def _parts(t: dict[str, Any]) -> tuple[str, str, str, str]:
    """A tensor's name, letters, shape and count."""
    shape = " × ".join(f"{n:,}" for n in t["shape"])
    return t["path"].removeprefix("layers."), " ".join(t["letters"]), shape, f"{math.prod(t['shape']):,}"


def _kind(kind: dict[str, Any]) -> str:
    """How many layers see how much, and which they are."""
    if kind["window"] is None:
        return f"{kind['count']} see all ({', '.join(map(str, kind['layers']))})"
    return f"{kind['count']} see a window of {kind['window']:,}"


def _rope(name: str, rope: dict[str, Any]) -> str:
    numbers = ", ".join(
        f"{field.replace('_', ' ')} {value:,.10g}" if not isinstance(value, bool) else f"{field} {value}"
        for field, value in rope.items()
        if field != "type"
    )
    return f"{name.replace('_', ' ')}: {rope['type']}, {numbers}"


def _cache(told: dict[str, Any]) -> tuple[str, list[str]]:
    from jaxlm.devices.hardware import gigabytes

    kv = told["kv"]
    beside = f"{kv['bytes_per_token']:,} bytes a token ({kv['bytes_per_token_and_layer']:,} a layer)"
    lines = []
    windows = [kind["window"] for kind in told["layers"] if kind["window"]]
    if windows:
        lines.append(f"past {max(windows):,} tokens {kv['bytes_per_token_past_the_window']:,} bytes a token")
    lines += [f"{length:>9,} tokens  {gigabytes(nbytes)}" for length, nbytes in kv["bytes"].items()]
    return beside, lines


def _mesh(told: dict[str, Any]) -> tuple[str, list[str]]:
    """What a device holds, and which letters are divided over how many of the devices on `model`."""
    from jaxlm.devices.hardware import gigabytes

    mesh, whole = told["mesh"], told["weights"]["bytes"]
    lines = [f"weights  {gigabytes(mesh['weights'])} a device ({mesh['weights'] / whole:.1%} of them)"]
    lines += [f"cache of {length:,} tokens  {gigabytes(nbytes)} a device" for length, nbytes in mesh["kv"].items()]
    for letter, over in mesh["over"].items():
        size, copies = told["sizes"][letter], mesh["model"] // over
        divided = f"{size // over:,} of {size:,} on each device" if over > 1 else f"all {size:,} on each device"
        why = "" if copies == 1 else f", {copies} devices hold the same"
        if over == 1 and mesh["model"] > 1:
            why = f": {mesh['model']} does not divide it"
        lines.append(f"{letter}  {divided}{why}")
    return f"data {mesh['data']} × model {mesh['model']}, {mesh['devices']} devices", lines


def _tokenizer(tokenizer: dict[str, Any] | None) -> tuple[str, list[str]]:
    if tokenizer is None:
        return "none here", []
    if "error" in tokenizer:
        return f"cannot be read: {tokenizer['error']}", []
    stops = ", ".join(f"{name} {number}" for name, number in tokenizer["stop"].items())
    parts = [
        f"{tokenizer['vocabulary']:,} tokens",
        f"begins with {tokenizer['begin']}" if tokenizer["begin"] else "no token begins a text",
        "chat template" if tokenizer["chat_template"] else "no chat template",
    ]
    return ", ".join(parts + ["thinks"] * tokenizer["thinking"]), [f"an answer ends at {stops or 'no token'}"]


def _generation(generation: dict[str, Any]) -> str:
    if "error" in generation:
        return str(generation["error"])
    options = dict(generation["options"])
    if not options["temperature"]:
        del options["temperature"]
    parts = [f"{name} {value}" for name, value in options.items()]
    text = ", ".join(parts if "temperature" in options else ["greedy", *parts])
    ignored = generation["unsupported"]
    return text + ("" if generation["file"] else " (no generation_config.json)") + (
        f"; not supported: {', '.join(ignored)}" if ignored else ""
    )  # fmt: skip

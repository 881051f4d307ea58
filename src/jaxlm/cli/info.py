"""`jaxlm info`: a checkpoint's architecture, sizes and tokenizer, as a tree or as JSON."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxlm.cli.common import ModelFlags
from jaxlm.cli.errors import refuse_quantize, usage
from jaxlm.cli.terminal import console, print_json

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True)
class Info(ModelFlags):
    """Show a model's architecture: shapes, parameters, memory, context, tokenizer. Weights are not loaded.

    A folder or a config.json without weights is sufficient. From the hub, only small files are downloaded. Of a GGUF
    file, only the header is read. --dtype shows the sizes for another data type than that of the files.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder, config.json or .gguf file; same as -m."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        if (self.name is not None and self.model is not None) or (self.name, self.model, self.adapter) == (None,) * 3:
            usage("pass one model: a hub id, a folder or a config.json or .gguf file (jaxlm info --help)")
        refuse_quantize(self.quantize, "info")
        from jaxlm.cli.facts import describe

        facts = describe(self.source(self.name), self.dtype, self.mesh)
        if self.json:
            print_json(facts, indent=2)
        else:
            rich_console = console(highlight=False)
            rich_console.print(draw(facts, rich_console.width))
        return 0


def draw(facts: dict[str, Any], columns: int) -> "Tree":
    """Renders the facts as a tree.

    Args:
        facts: The result of `describe`.
        columns: Width of the terminal.
    """
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"{facts['model']} ({facts['family']})", style="bold"), guide_style="dim")
    for title, summary, lines in sections(facts, columns):
        branch = tree.add(Text.assemble((title, "bold"), f"  {summary}" if summary else ""))
        for line in lines:
            text, below = (line, []) if isinstance(line, str) else line
            node = branch.add(Text(text))
            for part in below:
                node.add(Text(part))
    return tree


def sections(facts: dict[str, Any], columns: int) -> list[tuple[str, str, list[Any]]]:
    """Title, summary and lines of each section. A line may be a pair of text and nested lines."""
    counts = facts["parameters"]
    sizes = ", ".join(f"{letter} {size:,}" for letter, size in facts["sizes"].items())
    parts = [f"embedding and head {counts['embedding']:,}", f"per layer {counts['layer']:,}"]
    return [
        ("architecture", _architecture(facts), []),
        ("parameters", f"{counts['total']:,}", parts),
        ("weights", *_weights(facts["weights"])),
        ("sizes", sizes, []),
        ("tensors", "", _tensors(facts, columns)),
        ("context", f"{facts['context']:,} tokens", [_rope(*item) for item in facts["rope"].items()]),
        ("KV cache", *_kv_cache(facts)),
        *([("mesh", *_mesh(facts))] if facts["mesh"] else []),
        *([("adapter", *_adapter(facts["adapter"]))] if "adapter" in facts else []),
        ("tokenizer", *_tokenizer(facts["tokenizer"])),
        ("generation", _generation(facts["generation"]), []),
    ]


def _architecture(facts: dict[str, Any]) -> str:
    """The family (a file of jaxlm/models) that computes the model, and what config.json calls it."""
    return ", ".join([f"family {facts['family']}", f"model_type {facts['model_type']}", *facts["architectures"]])


def _weights(weights: dict[str, Any]) -> tuple[str, list[str]]:
    size = f"{_gigabytes(weights['bytes'])} in {weights['dtype']}"
    if weights.get("quantized"):
        size = f"{_gigabytes(weights['bytes'])}, of which {_gigabytes(weights['quantized'])} quantized"
    if not weights["present"]:
        assumed = "" if weights["config_dtype"] else " (config.json names no type)"
        return f"not found; {size}{assumed}", [weights["reason"]] if weights["reason"] else []
    lines = []
    if list(weights["stored"]) != [weights["dtype"]]:
        stored = ", ".join(
            f"{_gigabytes(nbytes)} in {kind} ({weights['counts'][kind]:,} tensor{'s' * (weights['counts'][kind] > 1)})"
            for kind, nbytes in weights["stored"].items()
        )
        lines.append(f"stored: {stored}")
    if weights["ignored"]:
        names = ", ".join(f"{count:,} {pattern}" for pattern, count in weights["ignored"].items())
        lines.append(f"ignored: {names} ({_gigabytes(weights['ignored_bytes'])})")
    return f"{size}, {weights['files']} file{'s' * (weights['files'] > 1)}", lines


def _gigabytes(nbytes: int) -> str:
    from jaxlm.devices.hardware import gigabytes

    return gigabytes(nbytes)


def _tensors(facts: dict[str, Any], columns: int) -> list[Any]:
    """A line per tensor. Tensors of a layer are nested below a line for all layers, with their kinds of attention."""
    rows = [
        (t["path"], " ".join(t["letters"]), " × ".join(f"{n:,}" for n in t["shape"]), f"{math.prod(t['shape']):,}")
        for t in facts["tensors"]
    ]
    name, letters, shape, count = (max(map(len, column)) for column in zip(*rows))
    indent = 4  # columns per level of the tree
    if name - len("layers.") + letters + shape + count + 3 * indent + 6 > columns:
        name, letters, shape, count, indent = len("layers."), 0, 0, 0, 0  # a narrow terminal: no alignment
    lines, layer = [], []
    for path, *parts in rows:
        in_layer = path.startswith("layers.")
        short = path.removeprefix("layers.").ljust(name - len("layers.") + indent * (not in_layer))
        text = f"{short}  {parts[0]:{letters}}  {parts[1]:{shape}}  {parts[2]:>{count}}"
        if in_layer and not layer:
            kinds = facts["layers"] if len(facts["layers"]) > 1 or facts["layers"][0]["window"] else []
            lines.append(("; ".join([f"layers × {facts['sizes']['L']}", *map(_attention, kinds)]), layer))
        (layer if in_layer else lines).append(text)
    return lines + ["head: tied to the embedding"] * facts["tied_head"]


def _attention(kind: dict[str, Any]) -> str:
    if kind["window"] is None:
        return f"{kind['count']} full attention ({', '.join(map(str, kind['layers']))})"
    return f"{kind['count']} sliding window of {kind['window']:,}"


def _rope(name: str, rope: dict[str, Any]) -> str:
    values = {field: value if isinstance(value, bool) else f"{value:,.10g}" for field, value in list(rope.items())[1:]}
    numbers = [f"{field.replace('_', ' ')} {value}" for field, value in values.items()]
    return f"{name.replace('_', ' ')}: {', '.join([rope['type'], *numbers])}"


def _kv_cache(facts: dict[str, Any]) -> tuple[str, list[str]]:
    kv, lines = facts["kv"], []
    windows = [kind["window"] for kind in facts["layers"] if kind["window"]]
    if windows:
        lines.append(f"{kv['bytes_per_token_past_the_window']:,} bytes per token past {max(windows):,} tokens")
    lines += [f"{length:>9,} tokens  {_gigabytes(nbytes)}" for length, nbytes in kv["bytes"].items()]
    return f"{kv['bytes_per_token']:,} bytes per token ({kv['bytes_per_token_and_layer']:,} per layer)", lines


def _mesh(facts: dict[str, Any]) -> tuple[str, list[str]]:
    """Memory per device, and the number of shards of each letter over the mesh axis `model`."""
    mesh, total = facts["mesh"], facts["weights"]["bytes"]
    lines = [f"weights  {_gigabytes(mesh['weights'])} per device ({mesh['weights'] / total:.1%} of them)"]
    lines += [
        f"KV cache of {length:,} tokens  {_gigabytes(nbytes)} per device" for length, nbytes in mesh["kv"].items()
    ]
    for letter, shards in mesh["shards"].items():
        size, copies = facts["sizes"][letter], mesh["model"] // shards
        if shards == 1:
            why = f": {mesh['model']} does not divide it" if mesh["model"] > 1 else ""
            lines.append(f"{letter}  all {size:,} on each device{why}")
        else:
            replicated = f", replicated on {copies} devices" if copies > 1 else ""
            lines.append(f"{letter}  {size // shards:,} of {size:,} on each device{replicated}")
    return f"data {mesh['data']} × model {mesh['model']}, {mesh['devices']} devices", lines


def _adapter(adapter: dict[str, Any]) -> tuple[str, list[str]]:
    """A line for each group of weights with the same rank and scale."""
    groups: dict[str, list[str]] = {}
    for name, kind in adapter["weights"].items():
        ranks, scales = (", ".join(f"{n:g}" for n in kind[numbers]) for numbers in ("ranks", "scales"))
        groups.setdefault(f"rank {ranks}, scale {scales}, {kind['count']} of each", []).append(name)
    lines = [f"{', '.join(names)}: {text}" for text, names in groups.items()]
    if adapter["ignored"]:
        lines.append(f"ignored: {adapter['ignored']} tensors of the vision tower")
    return f"{adapter['parameters']:,} parameters, {_gigabytes(adapter['bytes'])}, {adapter['folder']}", lines


def _tokenizer(tokenizer: dict[str, Any] | None) -> tuple[str, list[str]]:
    if tokenizer is None:
        return "not found", []
    if "error" in tokenizer:
        return f"cannot be read: {tokenizer['error']}", []
    stops = ", ".join(f"{name} {number}" for name, number in tokenizer["stop"].items())
    parts = [
        f"{tokenizer['vocab_size']:,} tokens",
        *([tokenizer["kind"]] if "kind" in tokenizer else []),
        f"BOS {tokenizer['bos']}" if tokenizer["bos"] else "no BOS token",
        "chat template" if tokenizer["chat_template"] else "no chat template",
    ]
    return ", ".join(parts + ["reasoning"] * tokenizer["reasoning"]), [f"stop tokens: {stops or 'none'}"]


def _generation(generation: dict[str, Any]) -> str:
    if "error" in generation:
        return str(generation["error"])
    options = dict(generation["options"])
    greedy = [] if options["temperature"] else ["greedy"]
    text = ", ".join(greedy + [f"{name} {value}" for name, value in options.items() if name != "temperature" or value])
    no_file = "" if generation["file"] else " (no generation_config.json)"
    ignored = generation["unsupported"]
    return text + no_file + (f"; not supported: {', '.join(ignored)}" if ignored else "")

"""The tables of training and sampling in docs/performance.md: jaxlm beside other libraries.

    python benchmarks/tables.py                      # renders the section of docs/performance.md again
    python benchmarks/tables.py --check              # exit status 1 if the section differs from the records
    python benchmarks/tables.py --measure [qwen3]    # makes the records of jaxlm (pip install "jax[tpu]" optax)

Every cell comes from a record in benchmarks/records/, one JSON object a line: published.jsonl has the figures of other
libraries, with the page that they are from; jaxlm.jsonl has those of jaxlm, with the command that made them. Where two
records describe the same run, the later one counts.

--measure compiles the programs of jaxlm for TPU slices, one at a time, without a TPU, and computes rooflines for GPUs.
Records are appended, and a case that has a record of these versions is skipped, so that an interrupted call resumes. A
case takes up to five minutes. Figures of a real accelerator are added to jaxlm.jsonl with the kind "measured".
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import models
from jaxlm.bench import published
from jaxlm.devices import specs
from jaxlm.nn import flops, params

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

Record = dict[str, Any]
# How a figure was obtained, in the order of rows.
KINDS = ("measured", "predicted", "roofline")
UNITS = {
    "mfu": ("%",),
    "flops": ("TFLOP/s a device",),
    "tokens_per_second": ("tokens/s a device",),
    "step_time": ("s",),
    "compute_time": ("s",),
    "collective_time": ("s",),
    "peak_memory": ("bytes a device",),
    "interactivity": ("tokens/s",),
    "throughput": ("tokens/s",),
    "latency": ("s for 128 tokens",),
    "hbm_use": ("%",),
    "bandwidth": ("GB/s",),
}
COMMON = ("table", "library", "chip", "chips", "model", "batch", "sequence", "tp", "precision", "kind", "values", "run")
PUBLISHED, OWN = ("url", "read"), ("command", "date", "versions")
UNKNOWN = ("batch", "sequence")  # null: not stated
WEIGHT_BYTES = {"bfloat16": 2, "float32": 4, "float8": 1}
LATENCY_TOKENS = 128


class Group(NamedTuple):
    """Rows of one table that belong together, in the order of the docs."""

    table: str
    chip: str
    model: str


GROUPS = (
    Group("training", "v6e", "Qwen3-4B"),
    Group("training", "v6e", "Qwen3-8B"),
    Group("training", "v6e", "Llama-3.1-8B"),
    Group("training", "H100", "Llama-2-7B"),
    Group("training", "H100", "Llama-3.1-8B"),
    Group("training", "H100", "Meta-Llama-3-8B"),
    Group("training", "H200", "Llama-3.1-8B"),
    Group("sampling", "v6e", "Qwen3-32B"),
    Group("sampling", "H100", "Llama-3.2-1B"),
    Group("sampling", "H100", "Llama-3.1-8B"),
    Group("sampling", "H200", "Llama-3.1-8B"),
)


# Not in jaxlm's table of published models. The sizes: configs/models/llama2-7b.yml of MaxText.
LLAMA_2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False}  # fmt: skip


def family_and_config(name: str, layers: int | None = None) -> tuple[Any, Any]:
    """A model's family, and its config; layers: their number, if not all of them."""
    found = published.find(name)
    config = LLAMA_2_7B if name == "Llama-2-7B" else found.config if found else None
    if config is None:
        raise ValueError(f"{name} is not in jaxlm.bench.published: write the part of a hub id behind the organization")
    family = models.family_of(config["model_type"])
    return family, family.Config.from_hf({**config, "num_hidden_layers": layers or config["num_hidden_layers"]})


def records(folder: Path = RECORDS) -> list[Record]:
    """The records of a folder. Of those that describe the same run, the last.

    Raises:
        ValueError: A record lacks a field or a source, or has an unknown kind, unit or chip.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            record = json.loads(line)
            check(record, f"{path.name}, line {number}")
            key = tuple(record[name] for name in COMMON[: COMMON.index("values")])
            found[key] = record
    return list(found.values())


def check(record: Record, where: str) -> None:
    """Refuses a record from which no row can be made, or that does not say where it is from."""
    source = OWN if record.get("library") == "jaxlm" else PUBLISHED
    missing = [name for name in COMMON + source if record.get(name) in (None, "", []) and name not in UNKNOWN]
    missing += [name for name in UNKNOWN if name not in record]
    if missing:
        raise ValueError(f"{where}: the record has no {', '.join(missing)}: add them (benchmarks/tables.py)")
    if record["kind"] not in KINDS:
        raise ValueError(f"{where}: the kind is {record['kind']!r}: use one of {', '.join(KINDS)}")
    if source is PUBLISHED and not record["url"].startswith("https://"):
        raise ValueError(f"{where}: the url is {record['url']!r}: name the page that has the figure")
    if Group(record["table"], record["chip"], record["model"]) not in GROUPS:
        raise ValueError(f"{where}: no rows for {record['model']} on {record['chip']}: add them to GROUPS")
    for figure in record["values"]:
        if figure.get("unit") not in UNITS.get(figure.get("name"), ()) or "value" not in figure:
            raise ValueError(f"{where}: {figure} needs a name, a value and a unit as in UNITS")


def value(record: Record, name: str) -> float | None:
    return next((figure["value"] for figure in record["values"] if figure["name"] == name), None)


def tokens_per_second(record: Record) -> float | None:
    """Of one device, training."""
    step = value(record, "step_time")
    if step is None:
        return value(record, "tokens_per_second")
    return record["batch"] * record["sequence"] / step / record["chips"]


def mfu(record: Record, causal: bool) -> float | None:
    """Model FLOPs utilization from the tokens/s; None without them, and for float8, which has another peak.

    Args:
        record: A record of training.
        causal: Count the scores that causal attention needs (`flops.training`), or all of them (PaLM, arXiv:2204.02311,
            appendix B).
    """
    speed = tokens_per_second(record)
    if speed is None or record["precision"] == "float8":
        return None
    family, cfg = family_and_config(record["model"])
    per_token = flops.training(family.PARAMS, cfg, record["sequence"])
    if not causal:  # twice the scores
        per_token += per_token - 6 * flops.multiplied(family.PARAMS, cfg)
    return speed * per_token / specs.BY_NAME[record["chip"]].flops


def step_bytes(record: Record) -> float:
    """Bytes that a decode step reads on each device: all weights and the whole KV cache, divided over the devices."""
    family, cfg = family_and_config(record["model"])
    slots = sum(min(window or record["sequence"], record["sequence"]) for window in cfg.windows)
    cache = 2 * 2 * slots * cfg.K * cfg.H * record["batch"]  # keys and values, bfloat16
    return (WEIGHT_BYTES[record["precision"]] * params.count(family.PARAMS, cfg) + cache) / record["chips"]


def interactivity(record: Record) -> float | None:
    """Tokens per second of one row."""
    step, latency, throughput = (value(record, name) for name in ("step_time", "latency", "throughput"))
    if step:
        return 1 / step
    if latency:
        return LATENCY_TOKENS / latency
    known = value(record, "interactivity")
    return throughput / record["batch"] if known is None and throughput and record["batch"] else known


def throughput(record: Record) -> float | None:
    """Tokens per second of all rows."""
    known, each = value(record, "throughput"), interactivity(record)
    return each * record["batch"] if known is None and each and record["batch"] else known


def hbm_use(record: Record) -> float | None:
    """The fraction of the memory bandwidth: as published, else from the bytes and the time of a step."""
    use, used, each = value(record, "hbm_use"), value(record, "bandwidth"), interactivity(record)
    peak = specs.BY_NAME[record["chip"]].bandwidth
    if use is not None:
        return use / 100
    if used is not None:
        return used * 1e9 / peak
    # A roofline is at 100 % by its definition, which leaves out an untied embedding.
    if each is None or not record["batch"] or not record["sequence"] or record["kind"] == "roofline":
        return None
    return step_bytes(record) * each / peak


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def number(amount: float | None) -> str:
    return "" if amount is None else f"{amount:,.0f}"


def device(record: Record) -> str:
    return specs.slice_name(specs.BY_NAME[record["chip"]], record["chips"])


def training_cells(record: Record) -> list[str]:
    published_mfu = value(record, "mfu")
    return [number(tokens_per_second(record)), percent(mfu(record, True)), percent(mfu(record, False)),
            percent(None if published_mfu is None else published_mfu / 100)]  # fmt: skip


def sampling_cells(record: Record) -> list[str]:
    qualifier = next((f"{f['qualifier']} " for f in record["values"] if f.get("qualifier")), "")
    return [number(interactivity(record)), number(throughput(record)), qualifier + percent(hbm_use(record))]


CELLS: dict[str, tuple[tuple[str, ...], Callable[[Record], list[str]]]] = {
    "training": (("tokens/s a device", "MFU", "MFU, all scores", "MFU, as published"), training_cells),
    "sampling": (("interactivity, tokens/s", "throughput, tokens/s", "HBM use"), sampling_cells),
}
HEADS = ("device", "model", "batch", "sequence", "TP", "precision", "library")


def order(record: Record) -> tuple[Any, ...]:
    """Rows of one shape stand together, jaxlm first; what is not stated comes last."""
    shape = [(record[name] is None, record[name] or 0) for name in ("batch", "sequence")]
    group = GROUPS.index(Group(record["table"], record["chip"], record["model"]))
    own = record["library"] != "jaxlm"
    tokens = 0 if record["table"] == "training" else shape[0]
    return group, record["chips"], tokens, shape[1], own, KINDS.index(record["kind"]), record["library"], shape[0]


def rows(name: str, found: list[Record]) -> Iterator[list[str]]:
    """The cells of a table, without its head."""
    sources = urls(found)
    for record in sorted((one for one in found if one["table"] == name), key=order):
        shape = [number(record[name]) or "not stated" for name in ("batch", "sequence")]
        where = [device(record), record["model"], *shape, str(record["tp"]), record["precision"], record["library"]]
        source = "" if record["library"] == "jaxlm" else f" [{sources.index(record['url']) + 1}]"
        yield [*where, *CELLS[name][1](record), record["kind"] + source]


def urls(found: list[Record]) -> list[str]:
    """The pages of the published figures, in the order of the tables."""
    ordered = [one for table in CELLS for one in sorted((r for r in found if r["table"] == table), key=order)]
    return list(dict.fromkeys(one["url"] for one in ordered if "url" in one))


def markdown(name: str, found: list[Record]) -> str:
    """A table, in Markdown."""
    heads = (*HEADS, *CELLS[name][0], "kind")
    lines = [heads, ["---"] * len(heads), *rows(name, found)]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in lines)


def sources(found: list[Record]) -> str:
    """The pages of the published figures, with what was run there."""
    lines = []
    for place, url in enumerate(urls(found), 1):
        of = [one for one in found if one.get("url") == url]
        copy = f", in [a copy]({of[0]['copy']})" if "copy" in of[0] else ""
        what = "; ".join(dict.fromkeys(one["run"] for one in of))
        names = ", ".join(dict.fromkeys(one["library"] for one in of))
        lines.append(f"{place}. {names}, [page]({url}), read {of[0]['read']}{copy}: {what}.")
    return "\n".join(lines)


def own(found: list[Record]) -> str:
    """How the figures of jaxlm were made: one line for each kind of run, with the commands."""
    lines: dict[str, list[str]] = {}
    for one in sorted((record for record in found if record["library"] == "jaxlm"), key=order):
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        memory = value(one, "peak_memory")
        peak = f" ({memory / 1e9:.1f} GB a device)" if memory else ""
        text = f"- {one['table'].capitalize()}, {one['kind']}, {one['date']}, {versions}: {one['run']}."
        lines.setdefault(text, []).append(f"`{one['command']}`{peak}")
    return "\n".join(f"{text} {', '.join(commands)}." for text, commands in lines.items())


def section(found: list[Record]) -> str:
    """What stands between the markers in docs/performance.md."""
    parts = ["### Training", markdown("training", found), "### Sampling", markdown("sampling", found),
             "### Records of jaxlm", own(found), "### Sources of the published figures", sources(found)]  # fmt: skip
    return "\n\n".join([BEGIN, *parts, END])


def replaced(text: str, new: str) -> str:
    """A document with a new section between the markers.

    Raises:
        ValueError: The document has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/performance.md has no {BEGIN} or no {END}: restore both lines")
    return before + new + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 on a difference")
    parser.add_argument("--measure", nargs="?", const="", metavar="NAME", help="make records whose name contains NAME")
    args = parser.parse_args()
    try:
        if args.measure is not None:
            import table_records  # needs the TPU compiler

            table_records.measure_all(args.measure)
        return 1 if update(args.check) and args.check else 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


def update(check_only: bool) -> bool:
    """Whether the docs differed from the records. Writes them, unless they are only to be checked."""
    text = DOCS.read_text()
    new = replaced(text, section(records()))
    if check_only and new != text:
        print("docs/performance.md differs from the records: run python benchmarks/tables.py", file=sys.stderr)
    elif new != text:
        DOCS.write_text(new)
    return new != text


if __name__ == "__main__":
    sys.exit(main())

"""docs/hardware.md from the records of `jaxlm check`: tables of models and devices, and what each cell rests on."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.bench.records import Record, file_of
from jaxlm.devices.hardware import gigabytes

FAMILIES = {"llama3": "Llama 3 and other models of `model_type` llama", "qwen3": "Qwen3", "olmo2": "OLMo 2",
            "olmo3": "OLMo 3", "smollm3": "SmolLM3", "gemma3": "Gemma 3"}  # fmt: skip
# The columns that come first, in this order. Other devices follow in the order of their names.
COLUMNS = ("cpu", "A100", "A100-8", "H100", "H100-8", "H200", "v2-8", "v5e-1", "v5e-8", "v6e-1", "v6e-8", "v5p-8")
NOT_CHECKED = "not checked"
NBSP = "\u00a0"  # cells are not broken into lines
KINDS = {False: "pretrained", True: "instruct", None: "other"}
SUMMARY = {"ran": "ran", "compiles": "compile", "fits": "fit by arithmetic", "does not fit": "do not fit",
           "fails": "fail"}  # fmt: skip

INTRODUCTION = """# Which models run on which hardware

This page is generated from the records in [compat](../compat) (`jaxlm check --page docs/hardware.md`). Each cell is one
record. The tables of [records](#records) give its date, its versions and the command that repeats it.

"""

LEGEND = [
    ("cell", "meaning"),
    (
        "✓ 41 tok/s",
        "Ran with the weights of the model, and passed `jaxlm verify` against transformers or Meta's code. "
        "Decoding speed of one row.",
    ),
    ("◐ 41 tok/s", "The same, but compared with itself only: PyTorch was not installed."),
    ("○ 41 tok/s", "Ran with random weights of the same shapes, for the speed alone. Decoding speed of one row."),
    (
        "compiles",
        "The decode and prefill programs were compiled for the device, which was not there. They fit by the compiler's "
        "account of their memory. All layers are compiled; of prefill for TPUs only few, from which the account of all "
        "layers follows.",
    ),
    ("fits", "Fits by arithmetic. Nothing was compiled: there is no compiler for this device, or it has not run yet."),
    (
        "needs 16",
        "Does not fit. 16 is the least number of such devices that the model fits on, counted as in the name of the "
        "device: a v5p-16.",
    ),
    ("needs 64 GB", "Does not fit in the memory of this machine."),
    ("too large", "Does not fit, and fits on no larger number of these devices that was tried."),
    ("**fails**", "Another error of the compiler or of the model, or wrong results. Its record has the message."),
    (NOT_CHECKED, "There is no record."),
]

CONTRIBUTE = """## Add your hardware

    pip install -e .                       # '.[cuda]' on an NVIDIA GPU, '.[tpu]' on a TPU
    pip install torch==2.13.0              # the CPU build of PyTorch, to compare with transformers
    jaxlm check                            # each published model in the Hugging Face cache: runs, times, verifies
    jaxlm check Qwen/Qwen3-0.6B            # a model by its name; it is downloaded
    jaxlm check --random-weights           # the speed of each model that fits, without checkpoints
    jaxlm check --page docs/hardware.md    # this page, with the new records

The records of a device are one file in `compat`. Open a pull request with that file and this page.

- The column CPU is of one machine. Name another one: `jaxlm check --name "Apple M4"`.
- `jaxlm check --device v6e-8` compiles for a device that is not there, with `pip install 'jax[tpu]'` or
  `pip install 'jax[cuda13]'`, on any Linux machine.
- The results are written after each model. The same command continues where it was interrupted.
- A folder or a .gguf file names the published model that it holds: `jaxlm check FILE.gguf --as Qwen/Qwen3-0.6B`.
"""


def render(records: Sequence[Record]) -> str:
    """The page.

    Args:
        records: At least one record.
    """
    heads = columns_of(records)
    text = f"{INTRODUCTION}{_summary(records)}\n{markdown(LEGEND)}"
    for family in [*FAMILIES, *sorted({record["family"] for record in records} - set(FAMILIES))]:
        rows = rows_of([record for record in records if record["family"] == family])
        if rows:
            text += f"\n## {FAMILIES.get(family, family)}\n\n" + _table(rows, heads)
    text += f"\n## Devices\n\n{_devices(records, heads)}\n{CONTRIBUTE}\n## Records\n"
    return text + "".join(_details(records, name, head) for name, head in heads.items())


def columns_of(records: Iterable[Record]) -> dict[str, str]:
    """The names of the devices in the order of the columns, and the heads of the columns."""
    heads = {record["device"]: title(record) for record in records}
    return {name: heads[name] for name in (*COLUMNS, *sorted(set(heads) - set(COLUMNS))) if name in heads}


def rows_of(records: Iterable[Record]) -> list[dict[str, Record]]:
    """The records of each model by device. Pretrained models come first, then instruction-tuned ones, by size."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(record["model"], {})[record["device"]] = record
    kinds = list(KINDS)

    def order(row: dict[str, Record]) -> tuple[int, int, str]:
        one = next(iter(row.values()))
        return kinds.index(one["tuned"]), one["parameters"], one["model"]

    return sorted(rows.values(), key=order)


def cell(record: Record | None) -> str:
    """The text of a cell, a few letters."""
    if record is None:
        return NOT_CHECKED
    status = record["status"]
    if status == "ran":
        against = record["verify"]["against"] if record["method"] == "run" else []
        mark = "✓" if set(against) - {"itself"} else "◐" if against else "○"
        return f"{mark} {rate(decode_figure(record)['tokens_per_second'])} tok/s"
    if status == "does not fit":
        return _need(record)
    return {"compiles": "compiles", "fits": "fits", "fails": "**fails**"}[status]


def _need(record: Record) -> str:
    if record["platform"] == "cpu":
        total, usable = record["memory"]["total"], record["memory"]["usable"]
        return f"needs {math.ceil(total * record['device_memory'] / usable / 1e9):,} GB"
    needs = record["needs"]
    return f"needs {needs * record['cores']}" if needs is not None and needs > record["devices"] else "too large"


def rate(value: float) -> str:
    """Tokens per second with two or three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def decode_figure(record: Record) -> dict[str, Any]:
    """The figure of decoding with the fewest rows."""
    return min((one for one in record["figures"] if one["kind"] == "decode"), key=lambda one: one["batch"])


def describe(record: Record) -> str:
    """What happened, in one line."""
    parts = [cell(record).replace("**", "")]
    if record["status"] == "ran":
        parts += [f"{one['name']} batch {one['batch']}: {rate(one['tokens_per_second'])}" for one in record["figures"]]
    if "verify" in record:
        found = record["verify"]
        passed = found["checks"] - len(found["failed"])
        parts.append(f"verify against {' and '.join(found['against'])}: {passed} of {found['checks']} pass")
    if record.get("compiled"):
        sizes = ", ".join(f"{name} {gigabytes(one['total'])}" for name, one in record["compiled"].items())
        seconds = sum(one["seconds"] for one in record["compiled"].values())
        parts.append(f"compiler: {sizes} ({seconds:.0f} s)")
    if record["status"] != "ran":
        parts.append(f"arithmetic: {gigabytes(record['memory']['total'])} of {gigabytes(record['device_memory'])}")
    if record["status"] in ("fails", "does not fit") and "error" in record:
        parts.append(record["error"])
    if "same_as" in record:
        parts.append(f"same shapes as {record['same_as']}")
    return "; ".join(parts)


def title(record: Record) -> str:
    """The head of a column."""
    name = record["device"]
    if record["platform"] == "cpu":
        return "CPU" if name == "cpu" else name
    if record["platform"] == "tpu":
        return f"TPU {name}"
    return f"{record['devices']} × {name.removesuffix('-' + str(record['devices']))}"


def _model(record: Record) -> list[str]:
    """The name and the config with their links, and the number of parameters."""
    text = record["model"].rpartition("/")[2]  # the page has the organization
    name = f"[{text}]({record['page']})" if record["page"] else record["model"]
    sizes = record["sizes"]
    config = f"[config]({record['config_page']})" if record["config_page"] else f"D {sizes['D']}, L {sizes['L']}"
    return [name, config, parameters(record["parameters"])]


def parameters(count: int) -> str:
    """A number of parameters: 8.03 B, 135 M, 260 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:  # 999.9 M is 1 B with three digits
            return f"{count / size:.3g} {unit}"
    return str(count)


def _table(rows: list[dict[str, Record]], heads: dict[str, str]) -> str:
    """A table of models. heads: the head of each column by the name of its device."""
    lines = [["model", "config", "parameters", "kind", *heads.values()]]
    for row in rows:
        one = next(iter(row.values()))
        lines.append([*_model(one), KINDS[one["tuned"]], *(cell(row.get(name)).replace(" ", NBSP) for name in heads)])
    return markdown(lines)


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, from its head and its rows."""
    head, *rows = [[text.replace("|", "\\|") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def _summary(records: Sequence[Record]) -> str:
    models = len({record["model"] for record in records})
    text = f"{len(records):,} records of {models} models, {_dates(records)}: {_counts(records)}.\n"
    computed = [record for record in records if record["status"] != "ran"]
    if not computed:
        return text
    batch, context, dtype = (_most_common(computed, name) for name in ("batch", "context", "dtype"))
    return (
        f"{text}A cell without a speed is about {batch} rows of {context:,} tokens in {dtype}, unless the command of "
        "its record\nsays otherwise. Models with a shorter context have a shorter KV cache.\n"
    )


def _counts(records: Sequence[Record]) -> str:
    """How many records have each status."""
    count = Counter(record["status"] for record in records)
    return ", ".join(f"{count[status]:,} {text}" for status, text in SUMMARY.items() if count[status])


def _most_common(records: Sequence[Record], name: str) -> Any:
    return Counter(record[name] for record in records).most_common(1)[0][0]


def _dates(records: Iterable[Record]) -> str:
    dates = sorted({record["date"] for record in records})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _devices(records: Sequence[Record], heads: dict[str, str]) -> str:
    lines = [["device", "memory of one", "machine", "models", "dates", "file"]]
    for name, head in heads.items():
        mine = [record for record in records if record["device"] == name]
        machines = "; ".join(sorted({_machine(record) for record in mine} - {""}))
        file = file_of(Path(), name).name
        memory = gigabytes(mine[0]["device_memory"])
        lines.append(
            [head, memory, machines or "not at hand", _counts(mine), _dates(mine), f"[{file}](../compat/{file})"]
        )
    return markdown(lines)


def _machine(record: Record) -> str:
    """The processor and memory of the machine of a device that was at hand."""
    found = record["machine"]
    if found is None:
        return ""
    text = f"{found['processor']}, {found['cores']} cores, {found['memory'] / 2**30:.0f} GiB"
    return f"{found['accelerator']} ({text})" if "accelerator" in found else text


def _details(records: Sequence[Record], name: str, head: str) -> str:
    """A section, closed at first, with a line for each record of a device."""
    mine = [row[name] for row in rows_of([record for record in records if record["device"] == name])]
    used = list(dict.fromkeys(_versions(record) for record in mine))
    listed = "".join(f"- ({i}) {text}\n" for i, text in enumerate(used, 1))
    lines = [["model", "result", "date", "versions", "command"]]
    for record in mine:
        number = f"({used.index(_versions(record)) + 1})"
        lines.append([record["model"], describe(record), record["date"], number, f"`{record['command']}`"])
    summary = f"<summary>{head}: {len(mine)} records, {_dates(mine)}</summary>"
    return f"\n<details>{summary}\n\nVersions:\n\n{listed}\n{markdown(lines)}\n</details>\n"


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))

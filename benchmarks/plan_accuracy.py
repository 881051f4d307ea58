"""The memory that `jaxlm plan` predicts for programs, beside the compilers' account: the table of docs/plan.md.

    python benchmarks/plan_accuracy.py            # renders the table
    python benchmarks/plan_accuracy.py --check    # exits with 1 if the page differs

The compilers' figures are those of the records in compat/ (`jaxlm check --device ...`). The predictions are made now.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxlm import models
from jaxlm.bench import plan, published, records
from jaxlm.devices import specs
from jaxlm.inference import roofline

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- accuracy: begin -->\n", "<!-- accuracy: end -->\n"


class Row(NamedTuple):
    """One program. Bytes are of one device."""

    model: str
    device: str
    program: str
    compiled: int
    predicted: int

    @property
    def difference(self) -> float:
        return self.predicted / self.compiled - 1


def rows(folder: Path = ROOT / "compat") -> Iterator[Row]:
    """The compiled programs of published models, each once: models of the same shapes share their programs."""
    for record in records.read(folder):
        model = published.MODELS.get(record["model"])
        if record["method"] != "compile" or "same_as" in record or record["platform"] == "cpu" or model is None:
            continue
        family = models.family_of(model.config["model_type"])
        cfg = family.Config.from_hf(model.config)
        spec, _ = specs.parse(record["device"])
        of = roofline.layout(family.PARAMS, cfg, record["mesh"], jnp.dtype(record["dtype"]).itemsize)
        for name, account in record.get("compiled", {}).items():
            compiled = account["total"] - account["beside"]
            predicted = plan.program_memory(of, spec, record["batch"], record["context"], name)
            yield Row(record["model"], record["device"], name, compiled, predicted)


def render(found: list[Row]) -> str:
    """The table, and a summary."""
    worst = max(found, key=lambda row: abs(row.difference))
    close = sum(abs(row.difference) <= 0.05 for row in found)
    mean = sum(abs(row.difference) for row in found) / len(found)
    lines = [
        f"{len(found)} programs, {close} of them within 5 %. Mean difference {mean:.1%}, "
        f"largest {worst.difference:+.1%} ({worst.model} on {worst.device}, {worst.program}).",
        "",
        "<details><summary>All programs</summary>",
        "",
        "| model | device | program | compiler, GB | plan, GB | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        values = f"{row.compiled / 1e9:.2f} | {row.predicted / 1e9:.2f} | {row.difference:+.1%}"
        lines.append(f"| {row.model} | {row.device} | {row.program} | {values} |")
    return "\n".join([*lines, "", "</details>", ""])


def with_table(page: str, table: str) -> str:
    """The page with the table between its markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args: Any = parser.parse_args()
    old = PAGE.read_text()
    new = with_table(old, render(list(rows())))
    if args.check:
        print("the table is current" if new == old else f"{PAGE} differs: run python benchmarks/plan_accuracy.py")
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

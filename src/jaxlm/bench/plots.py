"""A plot of the decoding speed by context and batch size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.errors import explain_missing_package

Line = tuple[list[int], list[float]]


def require_plots() -> None:
    """Raises ValueError if matplotlib is not installed."""
    with explain_missing_package("a plot", "jaxlm[bench]"):
        import matplotlib  # noqa: F401


def plot_decoding(records: Sequence[dict[str, Any]], rivals: Sequence[str], path: Path, title: str) -> None:
    """Plots tokens per second as a PNG: over the tokens in the KV cache, one color per batch size, or over the batch
    size if there is one depth. Limits are dotted, rivals dashed.

    Args:
        records: Of tables.records. Those of prefill, and of all but the first number of generated tokens, are not
            shown.
        rivals: Names of the rivals in the records.
        path: The file to write.
        title: Title of the plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [r for r in records if r["kind"] == "decode"]
    rows = [r for r in rows if r["tokens"] == rows[0]["tokens"]]
    by_depth = len({r["depth"] for r in rows}) > 1
    x, group = ("depth", "batch") if by_depth else ("batch", "depth")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, value in enumerate(sorted({r[group] for r in rows})):
        own = sorted((r for r in rows if r[group] == value), key=lambda r: r[x])
        suffix = f", {group} {value}" if by_depth else ""
        for number, (name, line) in enumerate(lines_of(own, x, rivals).items()):
            style = {"jaxlm": "-", "limit": ":"}.get(name, ("--", "-.")[number % 2])
            of_kind = color if by_depth else number
            axes.plot(*line, style, color=f"C{of_kind}", marker="o", markersize=4, label=name + suffix)
    axes.set(ylabel="tokens/s", title=title, xlabel="tokens in the KV cache" if by_depth else "batch size")
    ticks = sorted({r[x] for r in rows})
    if not by_depth:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120)


def lines_of(rows: Sequence[dict[str, Any]], x: str, rivals: Sequence[str]) -> dict[str, Line]:
    """The lines of these records: jaxlm, its limit, and each rival where it was measured."""
    at = [r[x] for r in rows]
    lines = {"jaxlm": (at, [r["tokens_per_second"] for r in rows])}
    lines["limit"] = (at, [r["limit_tokens_per_second"] for r in rows])
    for name in rivals:
        measured = [r for r in rows if r.get(name)]
        if measured:
            lines[name] = ([r[x] for r in measured], [r[name]["tokens_per_second"] for r in measured])
    return lines

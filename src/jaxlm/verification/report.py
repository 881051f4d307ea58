"""Checks as a table for a terminal, as JSON, and as a Markdown page with a plot of the error by layer."""

import platform
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.nn import params
from jaxlm.nn.quantize import type_of_weights
from jaxlm.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

DIVERGENCE = "first divergence"  # in notes of checks; the verdict repeats these


class Check(NamedTuple):
    """One comparison.

    Attributes:
        against: name of the reference, or "itself".
        what: what is compared.
        figure: the measured error.
        limit: the largest figure that passes; None: for information only.
        unit: of figure and limit. "std": standard deviations of the reference.
        note: details.
    """

    against: str
    what: str
    figure: float
    limit: float | None
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is within the limit. A NaN is not."""
        return self.limit is None or self.figure <= self.limit


@dataclass
class Report:
    """The result of `verify`.

    Attributes:
        model: name of the model.
        about: what ran where.
        dtype: type of jaxlm's weights.
        checks: the comparisons.
        layers, layer_limits: RMS error of each hidden state, and its limit, by reference.
        tokens: greedy token ids by model, jaxlm's first.
    """

    model: str
    about: dict[str, str]
    dtype: str
    checks: list[Check] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    layer_limits: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> "Report":
        """A report without checks, which says what runs where."""
        device = model.device
        precision = (
            "full (Precision.HIGHEST)"
            if str(model.dtype) == "float32"
            else "inputs in the weights' type, sums in float32"
        )
        about = {
            "parameters": f"{params.count(model.family.PARAMS, model.config):,}",
            "type": str(model.dtype),
            "weights": type_of_weights(model.weights),
            "matrix precision": precision,
            "device": f"{device.device_kind} ({device.platform})",
            "jaxlm": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        }
        return cls(model.source, about, str(model.dtype))

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return f"{capture.get()}{self.verdict()}"

    def verdict(self) -> str:
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return f"verified: {len(self.checks)} checks passed"
        notes = [f"; {check.against}: {check.note}" for check in failed if DIVERGENCE in check.note]
        return f"FAILED: {len(failed)} of {len(self.checks)} checks" + "".join(notes)

    def table(self) -> "Table":
        """The checks, one per row."""
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.model}\n{', '.join(f'{k} {v}' for k, v in self.about.items())}"
        table = Table(title=escape(title), title_justify="left")
        for column, justify in (("against", "left"), ("what", "left"), ("figure", "right"), ("limit", "right")):
            table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
        table.add_column("unit")
        table.add_column("")
        before = None
        for check in self.checks:
            if before not in (None, check.against):
                table.add_section()
            against = check.against if before != check.against else ""
            mark = "[red]FAILED[/]" if not check.passed else "[green]ok[/]" if check.limit is not None else "[dim]–[/]"
            cells = (escape(against), escape(check.what), number(check.figure), number(check.limit), check.unit)
            table.add_row(*cells, f"{mark} [dim]{escape(check.note)}[/]".rstrip() if check.note else mark)
            before = check.against
        return table

    def token_table(self) -> "Table":
        """Greedy token ids, one column per model. Rows in which they differ are marked."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="greedy text, token ids", title_justify="left")
        table.add_column("step", justify="right")
        for name in self.tokens:
            table.add_column(escape(name), justify="right")
        for step, row in enumerate(zip(*self.tokens.values())):
            style = "red" if len(set(row)) > 1 else None
            table.add_row(str(step), *(str(token) for token in row), style=style)
        return table

    def json(self) -> dict[str, Any]:
        """The report as JSON. A figure that is not finite is null."""
        checks = [
            {**check._asdict(), "figure": check.figure if isfinite(check.figure) else None, "passed": check.passed}
            for check in self.checks
        ]
        layers = {name: [x if isfinite(x) else None for x in errors] for name, errors in self.layers.items()}
        return {**vars(self), "checks": checks, "layers": layers, "passed": self.passed}

    def markdown(self) -> str:
        """The report as Markdown, without the plot."""
        lines = [f"# {self.model}: {self.verdict()}", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        lines += ["", "| against | what | figure | limit | unit | |", "| --- | --- | --- | --- | --- | --- |"]
        for c in self.checks:
            status = "FAILED" if not c.passed else "ok" if c.limit is not None else "–"
            cells = (c.against, c.what, number(c.figure), number(c.limit), c.unit, f"{status} {c.note}".strip())
            lines.append(f"| {' | '.join(cells)} |")
        if len(self.tokens) > 1:
            lines += ["", "Greedy text, token ids:", "", f"| step | {' | '.join(self.tokens)} |"]
            lines.append("| --- " * (len(self.tokens) + 1) + "|")
            rows = enumerate(zip(*self.tokens.values()))
            lines += [f"| {step} | {' | '.join(map(str, row))} |" for step, row in rows]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Writes README.md and, if there is a reference, layers.png into a folder. Returns the path of README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.markdown()
        if self.layers:
            self.plot(folder / "layers.png")
            text += "\n![Error by layer](layers.png)\n"
        page = folder / "README.md"
        page.write_text(text, encoding="utf-8")
        return page

    def plot(self, path: Path) -> None:
        """Plots the RMS error after each layer against each reference, with the limit."""
        require_plots()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for color, (name, errors) in enumerate(self.layers.items()):
            axes.plot(errors, marker="o", markersize=3, label=name, color=f"C{color}")
            axes.plot(self.layer_limits[name], linestyle="--", linewidth=1, label=f"limit ({name})", color=f"C{color}")
        axes.set_yscale("symlog", linthresh=1e-9)  # the embedding's error is 0
        axes.set_xlabel("hidden state (0: the embedding)")
        axes.set_ylabel("RMS error, standard deviations of the reference")
        axes.set_title(self.model, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130)


def require_plots() -> None:
    """ValueError if matplotlib is not installed."""
    with explain_missing_package("a plot", "jaxlm[plot]"):
        import matplotlib  # noqa: F401


def number(value: float | None) -> str:
    """A figure for a table: integers in full, other numbers with two digits."""
    if value is None:
        return "–"
    if not isfinite(value):
        return str(value)
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"

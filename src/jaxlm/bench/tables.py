"""Measurements as Markdown tables and as JSON, with what ran where above them."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.bench import limits
from jaxlm.bench.cases import Row
from jaxlm.bench.limits import Rates
from jaxlm.devices.hardware import gigabytes
from jaxlm.nn import params
from jaxlm.nn.quantize import type_of_weights
from jaxlm.version import __version__

if TYPE_CHECKING:
    from jaxlm.bench.load_time import LoadSession
    from jaxlm.bench.measure import Session
    from jaxlm.bench.train_step import TrainSession  # it imports optax, which not everyone has
    from jaxlm.model import Model

PACKAGES_OF = {"transformers": ("transformers", "torch"), "llama.cpp": ("xllamacpp",)}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first one to the left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *rest])} |"

    return "\n".join(map(line, [columns, rule, *rows]))


# What ran where


def environment(rivals: Sequence[str] = ()) -> dict[str, Any]:
    """The device, the versions, and the commit of jaxlm if it runs from a checkout."""
    device = jax.devices()[0]
    packages = ["jax", *(package for rival in rivals for package in PACKAGES_OF[rival])]
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "platform": device.platform}
    found["device"] = cpu_name() if device.platform == "cpu" else device.device_kind
    found["cores" if device.platform == "cpu" else "devices"] = (
        (os.cpu_count() or 1) if device.platform == "cpu" else jax.device_count()
    )
    found |= {"jaxlm": __version__, "commit": commit()}
    found |= {package: metadata.version(package) for package in packages}
    return found | {"python": platform.python_version(), "system": platform.system()}


def cpu_name() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of jaxlm, with "+changes" if files differ from it; None if it is not a git checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment_lines(found: dict[str, Any], rates: Rates | None = None) -> list[str]:
    """The environment as lines of text."""
    count = f"{found['cores']} cores" if "cores" in found else f"{found['devices']} devices"
    measured = []
    if rates is not None and rates.timed:
        measured = [f"memory read {rates.read / 1e9:.1f} GB/s", f"matmul {rates.matmul / 1e9:,.0f} GFLOP/s "
                    f"{rates.matmul_dtype} (measured in this run)"]  # fmt: skip
    known = ("date", "platform", "device", "cores", "devices", "jaxlm", "commit", "system")
    versions = [f"{name} {value}" for name, value in found.items() if name not in known]
    ours = f"jaxlm {found['jaxlm']}" + (f" (commit {found['commit']})" if found["commit"] else "")
    return [
        f"- {found['device']}, {count}, {found['platform']}" + "".join(f"; {text}" for text in measured),
        f"- {ours}, {', '.join(versions)}, {found['system']}, {found['date']}",
    ]


def model_line(model: "Model") -> str:
    """Name, family, size and dtype of a model."""
    count, size = params.count(model.family.PARAMS, model.config), gigabytes(params.nbytes(model.weights))
    family = model.family.__name__.rpartition(".")[2]
    cache = "" if model.kv_dtype == "auto" else f", KV cache in {model.kv_dtype}"
    return f"- {model.source}: {family}, {count:,} parameters, {size} as {type_of_weights(model.weights)}{cache}"


# Prefill and decoding


def limit_of(session: "Session", row: Row) -> limits.Limit:
    """The limit of a case, at the rates of the run."""
    case = row.case
    if case.kind == "prefill":
        return limits.prefill_limit(session.model, session.rates, case.batch, case.tokens, case.depth)
    return limits.decode_limit(session.model, session.rates, case.batch, case.tokens, case.prompt_tokens)


def records(session: "Session", rivals: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that were measured, for JSON. Times are in milliseconds where the name says ms."""
    found = []
    for row in session.rows.values():
        if not row.samples:
            continue
        case, limit = row.case, limit_of(session, row)
        most = case.batch * case.tokens / limit.seconds
        record: dict[str, Any] = {
            "test": case.name, **case._asdict(), "rounds": len(row.samples),
            "tokens_per_second": row.speed, "deviation": row.deviation,
            "first_token_ms": row.milliseconds("first_token", 50),
            "inter_token_p50_ms": row.milliseconds("intervals", 50),
            "inter_token_p99_ms": row.milliseconds("intervals", 99),
            "limit_tokens_per_second": most, "bound": limit.bound, "fraction_of_limit": row.speed / most,
            "compile_seconds": row.compile_seconds, "peak_memory_bytes": row.peak_memory,
        }  # fmt: skip
        for name in rivals:
            best = row.rival(name)
            record[name] = best and {"contestant": best[0], "tokens_per_second": best[1], "ratio": row.speed / best[1]}
        found.append(record)
    return found


def generation_table(found: Sequence[dict[str, Any]], rivals: Sequence[str]) -> str:
    """The records as a Markdown table."""
    columns = ["test", "batch", "tokens/s", "first token, ms", "inter-token p50, ms", "p99, ms", "limit, tokens/s",
               "of limit", "compile, s", "memory"]  # fmt: skip
    columns += [f"{name}, ratio" for name in rivals]
    rows = []
    for r in found:
        memory = r["peak_memory_bytes"]
        cells = [
            r["test"], str(r["batch"]), with_deviation(r["tokens_per_second"], r["deviation"]),
            number(r["first_token_ms"]), number(r["inter_token_p50_ms"]), number(r["inter_token_p99_ms"]),
            f"{number(r['limit_tokens_per_second'])} ({r['bound']})", f"{r['fraction_of_limit']:.0%}",
            f"{r['compile_seconds']:.1f}", "" if memory is None else gigabytes(memory),
        ]  # fmt: skip
        for name in rivals:
            best = r[name]
            kind = best["contestant"].removeprefix(name).strip() if best else ""
            cells.append(f"{number(best['tokens_per_second'])} ({kind}), {best['ratio']:.2f} x" if best else "")
        rows.append(cells)
    return markdown(columns, rows)


def number(value: float | None) -> str:
    """A number with three digits at least; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_deviation(mean: float, deviation: float) -> str:
    """A mean and its standard deviation, with the same number of decimals."""
    decimals = 0 if mean >= 100 else 1 if mean >= 10 else 2
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f}"


# Training and loading


def train_records(session: "TrainSession") -> list[dict[str, Any]]:
    """The rows that were measured, for JSON. The limit is the matrix rate."""
    return [
        {
            "test": f"train{row.length}", "batch": row.batch, "length": row.length, "method": session.method,
            "dtype": session.dtype, "steps": len(row.seconds), "tokens_per_second": row.speed,
            "deviation": row.deviation, "seconds_per_step": row.batch * row.length / row.speed,
            "flops_per_step": row.operations, "limit_tokens_per_second": row.limit(session.rates),
            "mfu": row.speed / row.limit(session.rates), "compile_seconds": row.compile_seconds,
            "peak_memory_bytes": row.peak_memory,
        }
        for row in session.rows
        if row.seconds and session.rates.timed
    ]  # fmt: skip


def train_table(found: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    columns = ["test", "batch", "tokens/s", "s per step", "GFLOP per step", "limit, tokens/s", "MFU", "compile, s",
               "memory"]  # fmt: skip
    rows = [
        [
            r["test"], str(r["batch"]), with_deviation(r["tokens_per_second"], r["deviation"]),
            number(r["seconds_per_step"]), number(r["flops_per_step"] / 1e9), number(r["limit_tokens_per_second"]),
            f"{r['mfu']:.0%}", f"{r['compile_seconds']:.1f}",
            "" if r["peak_memory_bytes"] is None else gigabytes(r["peak_memory_bytes"]),
        ]
        for r in found
    ]  # fmt: skip
    return markdown(columns, rows)


def load_records(session: "LoadSession") -> list[dict[str, Any]]:
    """The measurement for JSON, in a list; empty before the first round is complete."""
    if not session.load_seconds:
        return []
    mean = session.file_bytes / session.speed
    return [{
        "test": "load", "rounds": len(session.load_seconds), "files": session.files,
        "file_bytes": session.file_bytes, "weight_bytes": session.weight_bytes, "seconds": mean,
        "bytes_per_second": session.speed, "deviation": session.deviation,
        "limit_bytes_per_second": session.read_speed, "fraction_of_limit": session.speed / session.read_speed,
        "peak_memory_bytes": session.peak_memory,
    }]  # fmt: skip


def load_table(found: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table. The limit is a plain reader of the same files."""
    columns = ["test", "files", "weights", "s", "GB/s", "limit, GB/s", "of limit", "memory", "of weights"]
    rows = [
        [
            r["test"], gigabytes(r["file_bytes"]), gigabytes(r["weight_bytes"]), number(r["seconds"]),
            with_deviation(r["bytes_per_second"] / 1e9, r["deviation"] / 1e9),
            number(r["limit_bytes_per_second"] / 1e9), f"{r['fraction_of_limit']:.0%}",
            *(["", ""] if r["peak_memory_bytes"] is None else
              [gigabytes(r["peak_memory_bytes"]), f"{r['peak_memory_bytes'] / r['weight_bytes']:.2f} x"]),
        ]
        for r in found
    ]  # fmt: skip
    return markdown(columns, rows)

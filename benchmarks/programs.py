"""The programs of generation compiled for TPU slices, without a TPU: their memory and their collectives.

    pip install "jax[tpu]"
    python benchmarks/programs.py                                           # the table of docs/scaling.md
    python benchmarks/programs.py --chip v6e --slice 2x4 --model llama-3.1-8b [--mesh data=1,model=8] [--batch 8]
                                  [--context 8192] [--program decode] [--logprobs 5] [--json]

Weights, KV cache and state are shapes with shardings on the slice's devices; nothing is allocated. The programs are
those of jaxlm.generate: one chunk of prefill for all rows at once, and a decode program with as many steps as on a TPU.
Memory is the compiler's account of one device, compared with the chip's published HBM. Exit status 1 if a program does
not fit or has an unexpected collective.

Results are appended to --out, and an interrupted table resumes from there. Delete the file after a change of the code.
A case takes one or two minutes.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from published import MODELS

from jaxlm import models
from jaxlm.bench.hlo import Collective, collectives
from jaxlm.bench.programs import Setting, decode, prefill, share, state, tpu_slice, weights
from jaxlm.devices import hardware, mesh, topology
from jaxlm.devices.specs import BY_NAME
from jaxlm.inference import roofline

PROGRAMS = ("decode", "prefill")
EVERY = ("llama-3.1-8b", "llama-3.1-70b", "gemma-3-27b", "qwen3-32b")
# chip, slice, models, mesh (None: the default of `load`). Slices that cannot hold the weights are left out.
TABLE: list[tuple[str, str, tuple[str, ...], str | None]] = [
    ("v5e", "2x4", ("llama-3.1-8b", "gemma-3-27b", "qwen3-32b"), None),
    ("v5e", "4x4", ("llama-3.1-70b",), None),
    ("v5e", "16x16", EVERY, None),
    ("v6e", "2x4", EVERY, None),
    ("v6e", "8x8", ("llama-3.1-8b", "llama-3.1-70b"), None),
    ("v6e", "16x16", EVERY, None),
    ("v6e", "16x16", ("llama-3.1-8b", "llama-3.1-70b"), "data=16,model=16"),
    ("v5p", "2x2x1", EVERY, None),
    ("v5p", "4x4x4", ("llama-3.1-8b", "llama-3.1-70b"), None),
    ("v5p", "4x8x8", EVERY, None),
]


@dataclass(frozen=True)
class Case:
    """One program on one slice.

    Attributes:
        batch: rows (None: 8 per part of `data`).
        logprobs: number of top log-probabilities to return.
        layers: number of layers (None: all).
    """

    model: str
    chip: str
    slice: str
    mesh: str | None = None
    program: str = "decode"
    batch: int | None = None
    context: int = 8192
    logprobs: int | None = None
    layers: int | None = None


def setting(case: Case) -> Setting:
    hf = MODELS[case.model]
    family = models.family_of(hf["model_type"])
    cfg = family.Config.from_hf({**hf, "num_hidden_layers": case.layers or hf["num_hidden_layers"]})
    slice_ = tpu_slice(f"{case.chip}:{case.slice}")
    over = topology.make(case.mesh or topology.default({"N": cfg.N, "F": cfg.F}, len(slice_)), cfg.K, slice_)
    return Setting(family, cfg, over, case.batch or 8 * over.shape[mesh.DATA])


def tokens(case: Case, where: Setting) -> int:
    """Tokens per row of one call, as the engine passes them."""
    return 1 if case.program == "decode" else roofline.prefill_tokens(where.batch, "tpu")


def compiled(case: Case, where: Setting) -> Any:
    """The program, compiled by the code that generation uses."""
    if case.program == "decode":
        return decode(where, case.context, "tpu", case.logprobs)
    return prefill(where, case.context, "tpu")


def memory(case: Case, where: Setting, program: Any) -> dict[str, int]:
    """Bytes on one device, by arithmetic if there is no program. beside: the KV cache of the rows that decode, which
    exists while others are prefilled."""
    held, kept = share(weights(where)), share(state(where, case.context).kv)
    used = {"arguments": held + kept, "temporaries": 0, "output": 0, "aliased": 0, "code": 0}
    if program is not None:
        found = program.memory_analysis()
        used = {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "output": found.output_size_in_bytes,
            "aliased": found.alias_size_in_bytes,  # of the arguments: donated to the output
            "code": found.generated_code_size_in_bytes,
        }
    used["beside"] = kept if case.program == "prefill" else 0
    return {**used, "total": sum(used.values()) - 2 * used["aliased"], "weights": held, "cache": kept}


def faults(case: Case, where: Setting, found: list[Collective]) -> list[str]:
    """The unexpected collectives of a program, in words.

    Expected are two all-reduces of activations per layer and one for the embedding (each may also be a reduce-scatter
    and an all-gather). Decode programs also have small values per row, and candidates if log-probabilities are
    returned.
    """
    rows = where.batch // where.over.shape[mesh.DATA]
    wide = where.over.size // where.over.shape[mesh.DATA]
    activation = rows * tokens(case, where) * where.cfg.D
    small = max(where.batch, rows * wide) * case.logprobs if case.logprobs else where.batch
    wrong, sums, scattered, gathered = [], 0, 0, 0
    for one in found:
        sizes = {math.prod(shape) for _, shape in one.tensors}
        within = one.groups is not None and all(len({i // wide for i in group}) == 1 for group in one.groups)
        meant = within and not one.conditional
        if meant and one.kind == "all-reduce" and sizes == {activation}:
            sums += len(one.tensors)
        elif meant and one.kind == "reduce-scatter" and sizes == {activation // wide}:
            scattered += len(one.tensors)
        elif meant and one.kind == "all-gather" and sizes == {activation}:
            gathered += len(one.tensors)
        elif case.program != "decode" or one.kind not in ("all-reduce", "all-gather") or max(sizes) > small:
            wrong.append(f"{one}{'' if within else ' across data'}")
    if sums + scattered != 2 * where.cfg.L + 1:
        wrong.append(f"{sums + scattered} sums of activations, not {2 * where.cfg.L + 1}: two per layer and one")
    if gathered != scattered:
        wrong.append(f"activations are scattered {scattered} times and gathered {gathered} times")
    return wrong


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case. Returns the figures of docs/scaling.md, and more."""
    where = setting(case)
    start = time.perf_counter()
    try:
        program = compiled(case, where)
        found = collectives(program.as_text())
        wrong = faults(case, where, found)
    except jax.errors.JaxRuntimeError as error:  # newer compilers refuse programs that do not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program, found, wrong = None, [], [str(error).splitlines()[0]]
    seconds = time.perf_counter() - start
    used = memory(case, where, program)
    kinds = Counter((str(one), one.nbytes, one.conditional) for one in found)
    hbm = BY_NAME[case.chip].memory
    if used["total"] > hbm:
        wrong.insert(0, f"{hardware.gigabytes(used['total'])} do not fit {hardware.gigabytes(int(hbm))}")
    return {
        **asdict(case),
        "chips": where.over.size,
        "axes": dict(where.over.shape),
        "rows": where.batch,
        "memory": used,
        "hbm": hbm,
        "collectives": [
            {"count": count, "what": what, "bytes": nbytes, "conditional": conditional}
            for (what, nbytes, conditional), count in kinds.items()
        ],
        "faults": wrong,
        "compile_seconds": round(seconds, 1),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "date": datetime.date.today().isoformat(),
    }


def table() -> list[Case]:
    return [
        Case(model, chip, slice_, over, program)
        for chip, slice_, names, over in TABLE
        for model in names
        for program in PROGRAMS
    ]


HEADS = ("model", "slice", "data x model (x group)", "rows", "weights", "cache", "decode", "prefill", "of memory",
         "collectives in decode", "collectives in prefill", "compile time, s", "check")  # fmt: skip


def line(rows: list[dict[str, Any]]) -> list[str]:
    """A row of the table: the programs of one case."""
    first = rows[0]
    used, axes = first["memory"], first["axes"]
    by_program = {row["program"]: row for row in rows}
    faults = [fault for row in rows for fault in row["faults"][:3]]
    most = max(row["memory"]["total"] for row in rows)
    return [
        first["model"],
        f"{first['chip']} {first['slice']}",
        " x ".join(str(axes[axis]) for axis in (mesh.DATA, mesh.MODEL, mesh.GROUP) if axis in axes),
        str(first["rows"]),
        f"{used['weights'] / 1e9:.2f}",
        f"{used['cache'] / 1e9:.2f}",
        *(f"{by_program[name]['memory']['total'] / 1e9:.2f}" if name in by_program else "" for name in PROGRAMS),
        f"{most / first['hbm']:.0%} of {first['hbm'] / 1e9:.0f}",
        *(exchange(by_program[name]["collectives"]) if name in by_program else "" for name in PROGRAMS),
        " + ".join(f"{row['compile_seconds']:.0f}" for row in rows),
        "; ".join(faults) or "ok",
    ]


def exchange(kinds: list[dict[str, Any]]) -> str:
    """The collectives in short: the largest, the others that always run, those of sampling."""
    most = max((kind["bytes"] for kind in kinds), default=0)
    size = f"{most / 1e6:.1f} MB" if most >= 1e6 else f"{most / 1e3:.0f} kB"
    parts = [
        ([kind for kind in kinds if kind["bytes"] == most], f"of {size}"),
        ([kind for kind in kinds if kind["bytes"] < most and not kind["conditional"]], "small"),
        ([kind for kind in kinds if kind["bytes"] < most and kind["conditional"]], "when sampled"),
    ]
    return ", ".join(f"{sum(kind['count'] for kind in part)} {what}" for part, what in parts if part)


def show(rows: list[dict[str, Any]], markdown: bool) -> None:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = [row[field] for field in Case.__dataclass_fields__ if field != "program"]
        cases.setdefault(repr(key), []).append(row)
    if markdown:
        print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
        for several in cases.values():
            print(f"| {' | '.join(line(several))} |")
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*HEADS)
    for several in cases.values():
        drawn.add_row(*line(several), style="red" if any(row["faults"] for row in several) else None)
    Console(width=None if sys.stdout.isatty() else 240).print(drawn)


def known(out: Path | None) -> dict[Case, dict[str, Any]]:
    """Results of earlier calls with this jax and libtpu."""
    if out is None or not out.exists():
        return {}
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    now = jax.__version__, importlib.metadata.version("libtpu")
    fields = Case.__dataclass_fields__
    return {Case(**{f: row[f] for f in fields}): row for row in rows if (row["jax"], row["libtpu"]) == now}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=("v5e", "v6e", "v5p"))
    parser.add_argument("--slice", help="chips along each side: 2x4, 16x16; v5p 4x8x8")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated")
    parser.add_argument("--mesh", help="data=…,model=… (default: that of jaxlm.load)")
    parser.add_argument("--program", choices=PROGRAMS)
    parser.add_argument("--batch", type=int, help="rows (default: 8 per part of data)")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--logprobs", type=int, help="number of top log-probabilities to return")
    parser.add_argument("--out", type=Path, help="file for results (for the table: programs.jsonl)")
    parser.add_argument("--json", action="store_true", help="results as JSON lines on stdout")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
    if bool(args.chip) != bool(args.slice):
        parser.error("--chip and --slice go together; without them the whole table is compiled")
    names, wanted = args.model or EVERY, [args.program] if args.program else PROGRAMS
    if args.chip:
        more = {"batch": args.batch, "context": args.context, "logprobs": args.logprobs}
        cases = [Case(name, args.chip, args.slice, args.mesh, program, **more) for name in names for program in wanted]
    else:
        args.out = args.out or Path("programs.jsonl")
        cases = [case for case in table() if case.model in names and case.program in wanted]
    have, rows = known(args.out), []
    for number, case in enumerate(cases, 1):
        if (row := have.get(case)) is None:
            what = f"{case.model} {case.program}, {case.chip} {case.slice}"
            print(f"{number} of {len(cases)}: {what}", file=sys.stderr, flush=True)
            row = measure(case)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
    if not args.json:
        show(rows, args.markdown)
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

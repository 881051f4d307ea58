"""The training step compiled for TPU chips and slices, without a TPU: memory, predicted time and MFU, collectives.

    pip install "jax[tpu]" optax
    python benchmarks/train_programs.py                                           # the table of docs/scaling.md
    python benchmarks/train_programs.py --chip v6e --slice 2x4 --mesh data=8 [--model llama-3.1-8b] [--rows 1]
                                        [--length 8192] [--accumulate 1] [--remat full] [--optimizer adamw]
                                        [--weight-dtype bfloat16] [--grad-dtype bfloat16] [--moment-dtype bfloat16]
                                        [--json]
    python benchmarks/train_programs.py --chip v6e --slice 1 --model qwen3-4b --rows 8 --length 512
                                        --optimizer adafactor --weight-dtype bfloat16 --grad-dtype bfloat16

The state and a batch are shapes with shardings on the slice's devices; nothing is allocated. The program is that of
`jaxlm train --dtype bfloat16` with the same options, with all layers. `--slice 1` is one chip, without a mesh.

The predicted time is the sum of the compiler's `estimated_cycles` at the chip's clock, without the time of collectives
that nothing hides. It is within 10 % for programs of the matrix unit and too long for fusions on the vector unit: a
comparison of two versions of one program. MFU is jaxlm.nn.flops.training over the chip's specified bfloat16 peak.

On a mesh this is expected: each matrix of a layer is
all-gathered over `data` in bfloat16 once forward and once backward, embedding and head once, and each gradient is
reduce-scattered once per gradient accumulation step. Exit status 1 if a program does not fit or does anything else. A
case takes some minutes.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax
from published import MODELS

from jaxlm import models
from jaxlm.bench import programs
from jaxlm.bench.hlo import Met, estimated_cycles, met, splash_products, total
from jaxlm.bench.plan_training import Training
from jaxlm.bench.programs import Setting, share, tpu_slice
from jaxlm.devices import hardware, mesh, topology
from jaxlm.devices.specs import BY_NAME
from jaxlm.nn import flops, params
from jaxlm.training import step


@dataclass(frozen=True)
class Case:
    """One program on one slice.

    Attributes:
        rows: rows per part of `data` and gradient accumulation step.
        layers: number of layers (None: all).
    """

    model: str
    chip: str
    slice: str
    mesh: str
    length: int = 8192
    rows: int = 1
    accumulate: int = 1
    remat: str = "full"
    layers: int | None = None
    optimizer: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    weight_dtype: str = "float32"
    grad_dtype: str = "float32"
    moment_dtype: str = "float32"


# The compiler has no estimate for kernels. Splash attention is assumed to reach this fraction of the peak: what a video
# model on TPU 7x, most of whose work is attention, reaches as a whole with its own variant of the kernel
# (github.com/AI-Hypercomputer/maxdiffusion, pull request 487).
SPLASH_RATE = 0.4
ONE_CHIP = {"v5e": "2x2", "v6e": "2x2", "v5p": "2x2x1"}  # the smallest slice, of which --slice 1 is the first chip

TABLE = [
    Case("qwen3-4b", "v6e", "1", "", 512, 8, optimizer="adafactor", weight_dtype="bfloat16", grad_dtype="bfloat16"),
    Case("llama-3.1-8b", "v6e", "2x4", "data=8"),
    Case("llama-3.1-8b", "v6e", "2x4", "data=8", accumulate=4),
    Case("llama-3.1-8b", "v6e", "2x4", "data=8", rows=2),
    Case("llama-3.1-8b", "v5e", "16x16", "data=128,model=2"),
    Case("llama-3.1-8b", "v5e", "16x16", "data=64,model=4"),
    Case("llama-3.1-8b", "v5e", "16x16", "data=256"),
]


def setting(case: Case) -> Setting:
    hf = MODELS[case.model]
    family = models.family_of(hf["model_type"])
    cfg = family.Config.from_hf({**hf, "num_hidden_layers": case.layers or hf["num_hidden_layers"]})
    if case.slice == "1":
        return Setting(family, cfg, None, case.rows, tpu_slice(f"{case.chip}:{ONE_CHIP[case.chip]}")[0])
    over = topology.make(case.mesh, cfg.K, tpu_slice(f"{case.chip}:{case.slice}"))
    return Setting(family, cfg, over, case.rows * over.shape[mesh.DATA])


def training(case: Case) -> Training:
    return Training(**{name: getattr(case, name) for name in Training._fields})


def compiled(case: Case, where: Setting) -> Any:
    """The program, as `training.loop` compiles it."""
    return programs.train(where, training(case))


def matrices(where: Setting, layers: bool) -> Counter[int]:
    """The number of matrices of each size (elements per part of `model`) in one layer, or outside layers. A tied
    embedding counts twice."""
    found: Counter[int] = Counter()
    for row in params.tensors(where.family.PARAMS, where.cfg):
        if row.letters not in params.NORMS and row.path.startswith("layers.0." if layers else ("embed", "head")):
            uses = 2 if where.cfg.tied and row.path == "embed" else 1
            found[math.prod(row.shape) // mesh.num_shards(row.letters, row.shape, where.over)] += uses
    return found


class Exchanged(NamedTuple):
    """What is exchanged between parts of `data`, by the number of elements of a tensor.

    Attributes:
        gathered: all-gathers in each loop that has any (bodies of the loops around them, outermost first).
        runs: how often each of these loops runs.
        wide: all-gathers in another dtype than bfloat16.
        scattered: reduce-scatters.
        summed: all-reduces.
        sent: bytes that a device sends per step, by kind, on all axes.
    """

    gathered: dict[tuple[str, ...], Counter[int]]
    runs: dict[tuple[str, ...], int]
    wide: Counter[int]
    scattered: Counter[int]
    summed: Counter[int]
    sent: Counter[str]


def exchanged(where: Setting, found: list[Met]) -> Exchanged:
    """Sorts a program's collectives. Tensors smaller than every matrix are ignored."""
    out = Exchanged({}, {}, Counter(), Counter(), Counter(), Counter())
    if where.over is None:
        out.sent.update({one.kind: one.nbytes for one, _, _ in found})
        return out
    wide = where.over.size // where.over.shape[mesh.DATA]
    least = min(matrices(where, True))
    for one, loops, times in found:
        size = len(one.groups[0]) if one.groups else where.over.size
        ways = 2 if one.kind == "all-reduce" else 1
        out.sent[one.kind] += ways * times * one.nbytes * (size - 1) // size
        across = one.groups is None or any(len({i // wide for i in group}) > 1 for group in one.groups)
        sizes = Counter(n for n in (math.prod(shape) for _, shape in one.tensors) if across and n >= least)
        if one.kind == "all-gather" and sizes:
            out.gathered.setdefault(loops, Counter()).update(sizes)
            out.runs[loops] = times
            if any(dtype != "bf16" for dtype, _ in one.tensors):
                out.wide.update(sizes)
        elif one.kind in ("reduce-scatter", "all-reduce"):
            into = out.scattered if one.kind == "reduce-scatter" else out.summed
            into.update({n: count * times for n, count in sizes.items()})
    return out


def faults(case: Case, where: Setting, found: Exchanged) -> list[str]:
    """The unexpected collectives of a program, in words."""
    if where.over is None:
        return [f"a collective on one device: {found.sent}"] if found.sent else []
    layer, apart, wrong = matrices(where, True), matrices(where, False), []
    period = len(params.period(where.cfg.windows))
    turns = case.accumulate * (where.cfg.L // period)
    wanted = Counter({n: count * period for n, count in layer.items()})
    loops = [sizes for name, sizes in found.gathered.items() if found.runs[name] == turns]
    if loops != [wanted, wanted]:
        wrong.append(f"layers gather {[dict(sizes) for sizes in loops]}, not {dict(wanted)} forward and backward")
    # With gradient accumulation the compiler may gather some of these once for all parts.
    rest = [sizes for name, sizes in found.gathered.items() if found.runs[name] in (1, case.accumulate)]
    if sum(rest, Counter()) != apart:
        wrong.append(f"outside layers {dict(sum(rest, Counter()))} are gathered, not {dict(apart)}")
    if len(loops) + len(rest) < len(found.gathered):
        wrong.append("a loop within gathers weights")
    meant = Counter({n: count * where.cfg.L * case.accumulate for n, count in layer.items()})
    meant.update({n: count * case.accumulate for n, count in apart.items()})
    if found.scattered != meant:
        wrong.append(f"{dict(found.scattered)} are scattered, not {dict(meant)}")
    if found.wide:
        wrong.append(f"{dict(found.wide)} are not gathered in bfloat16")
    if found.summed:
        wrong.append(f"{dict(found.summed)} are summed whole")
    return wrong


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case. Returns the figures of docs/scaling.md, and more. Bytes are of one device."""
    where, start = setting(case), time.perf_counter()
    size = where.over.size if where.over else 1
    row = {**asdict(case), "chips": size, "hbm": BY_NAME[case.chip].memory, "jax": jax.__version__}
    shapes = programs.training_shapes(where, training(case))
    held = share(shapes.state.weights) + share(shapes.state.opt_state)
    try:
        program = compiled(case, where)
    except jax.errors.JaxRuntimeError as error:  # newer compilers refuse programs that do not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = round(time.perf_counter() - start, 1)
        return {**row, "state": held, "faults": [str(error).splitlines()[0]], "compile_seconds": seconds}
    used, seconds = program.memory_analysis(), round(time.perf_counter() - start, 1)
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes + used.generated_code_size_in_bytes
    peak += used.output_size_in_bytes - used.alias_size_in_bytes
    text = program.as_text()
    found = exchanged(where, met(text))
    wrong = faults(case, where, found)
    work = flops.training(where.family.PARAMS, where.cfg, case.length) * math.prod(shapes.batch.tokens.shape) / size
    products = total(text, splash_products)
    predicted = None
    if case.chip in ("v5e", "v6e"):
        # Of this device, and causal: half of the scores.
        heads = where.cfg.N // (where.over.shape[mesh.MODEL] if where.over else 1)
        attention = products * case.rows * heads * where.cfg.H * case.length**2
        predicted = total(text, estimated_cycles) / BY_NAME[case.chip].clock
        predicted += attention / (SPLASH_RATE * BY_NAME[case.chip].flops)
    if peak > BY_NAME[case.chip].memory:
        wrong.insert(0, f"{hardware.gigabytes(peak)} do not fit")
    return {
        **row,
        "state": held,
        "temporaries": used.temp_size_in_bytes,
        "peak": peak,
        "splash_products": products,
        "predicted_seconds": predicted,
        "mfu": work / predicted / BY_NAME[case.chip].flops if predicted else None,
        "gathered": [[found.runs[name], sum(sizes.values())] for name, sizes in found.gathered.items()],
        "scattered": found.scattered.total(),
        "summed": found.summed.total(),
        "sent": dict(found.sent),
        "faults": wrong,
        "compile_seconds": seconds,
    }


HEADS = ("model", "slice", "mesh", "rows x length per device", "remat", "optimizer", "bfloat16", "state", "temporaries",
         "peak", "of memory", "predicted step, ms", "predicted MFU",
         "all-gathers (times x matrices)", "reduce-scatters", "all-reduces of gradients", "GB sent", "compile time, s",
         "check")  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table; GB of 10^9 bytes."""
    parts = f"{row['accumulate']} x " if row["accumulate"] > 1 else ""
    known = "peak" in row
    return [
        row["model"],
        f"{row['chip']} {row['slice']}",
        row["mesh"],
        f"{parts}{row['rows']} x {row['length']:,}",
        row["remat"],
        row["optimizer"],
        ", ".join(kind + "s" for kind in ("weight", "grad", "moment") if row[f"{kind}_dtype"] == "bfloat16"),
        f"{row['state'] / 1e9:.2f}",
        *(f"{row[name] / 1e9:.2f}" if known else "" for name in ("temporaries", "peak")),
        f"{row['peak'] / row['hbm']:.0%} of {row['hbm'] / 1e9:.0f}" if known else "",
        f"{row['predicted_seconds'] * 1e3:.0f}" if row.get("predicted_seconds") else "",
        f"{row['mfu']:.1%}" if row.get("mfu") else "",
        " + ".join(f"{times} x {count}" for times, count in row.get("gathered", ())),
        str(row.get("scattered", "")),
        str(row.get("summed", "")),
        ", ".join(f"{kind} {n / 1e9:.1f}" for kind, n in row.get("sent", {}).items() if n > 5e7),
        f"{row['compile_seconds']:.0f}",
        "; ".join(row["faults"]) or "ok",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--chip", choices=("v5e", "v6e", "v5p"))
    parser.add_argument("--slice", help="chips along each side: 2x4, 16x16; v5p 4x8x8; 1: one chip, without --mesh")
    parser.add_argument("--mesh", default="", help="data=…,model=…")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1, help="rows per part of data and gradient accumulation step")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", choices=tuple(step.REMAT), default="full")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "adafactor", "lion"), default="adamw")
    for name in ("weight", "grad", "moment"):
        parser.add_argument(f"--{name}-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="results as JSON lines on stdout")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
    if len({bool(args.chip), bool(args.slice), bool(args.mesh) or args.slice == "1"}) > 1:
        parser.error("--chip, --slice and --mesh go together; without them the whole table is compiled")
    given = {name: value for name, value in vars(args).items() if name in Case.__dataclass_fields__}
    rows = []
    if not args.json:
        print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
    for case in [Case(**given)] if args.chip else TABLE:
        rows.append(measure(case))
        print(json.dumps(rows[-1]) if args.json else f"| {' | '.join(line(rows[-1]))} |", flush=True)
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

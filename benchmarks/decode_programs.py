"""The decode program compiled for one TPU chip, without a TPU: predicted time, temporaries, and copies of the KV cache.

    pip install "jax[tpu]"
    python benchmarks/decode_programs.py                                     # the table of docs/performance.md
    python benchmarks/decode_programs.py --model llama-3.1-8b --rows 8 --context 2048 [--chip v6e] [--json]
    python benchmarks/decode_programs.py --model llama-3.1-8b --rows 1 --quantize int8 int4

The program is the one that jaxlm.generate runs on a TPU. It is compiled with one and with two periods of layers; the
figures of the whole model follow from the difference.

The floor is the time in which the chip reads all weights (of an untied embedding only the rows of the tokens) and the
whole KV cache once, at its published bandwidth. Predicted times are the sum of the compiler's `estimated_cycles` at the
chip's clock. The compiler is too pessimistic for fusions on the vector unit, and estimates no scatter and no kernel:
compare two versions of one program with it, and no more (docs/performance.md).
"""

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
from published import MODELS

from jaxlm import models
from jaxlm.bench import programs
from jaxlm.bench.hlo import WIDTH, Instruction, arrays, parse, trips
from jaxlm.bench.programs import Setting, state, tpu_slice, weights
from jaxlm.devices import hardware
from jaxlm.devices.specs import BY_NAME
from jaxlm.nn import params
from jaxlm.nn.quantize import TYPES
from jaxlm.nn.quantized_kv import DTYPES, dtype_of


@dataclass(frozen=True)
class Case:
    model: str
    rows: int
    context: int
    chip: str = "v6e"
    kv_dtype: str = "bfloat16"
    quantize: str | None = None


TABLE = [
    Case("llama-3.1-8b", 1, 2048),
    Case("llama-3.1-8b", 8, 2048),
    Case("llama-3.1-8b", 64, 512),
    Case("qwen3-4b", 1, 2048),
    Case("gemma-3-4b", 1, 2048),
    Case("gemma-3-4b", 8, 2048),
    Case("qwen3-0.6b", 1, 2048),
    Case("qwen3-0.6b", 8, 2048),
]


class Account(NamedTuple):
    """What a program costs. Copies count arrays as large as a layer's keys.

    Attributes:
        cycles: the compiler's estimate for one step.
        temporaries: bytes.
        copies: bytes that copies and transposes of parts of the KV cache write in one call.
        kernels: instructions that a step launches.
    """

    cycles: float
    temporaries: float
    copies: float
    kernels: float


def setting(case: Case, layers: int) -> Setting:
    hf = MODELS[case.model]
    family = models.family_of(hf["model_type"])
    device = tpu_slice(f"{case.chip}:2x2")[0]
    cfg = family.Config.from_hf({**hf, "num_hidden_layers": layers})
    return Setting(family, cfg, None, case.rows, device, quantize=case.quantize,
                   kv_dtype=dtype_of(case.kv_dtype))  # fmt: skip


def compiled(case: Case, where: Setting) -> Any:
    return programs.decode(where, case.context, "tpu")


def account(program: Any, nbytes: int, steps: int) -> Account:
    """The account of a compiled program.

    Args:
        program: The program.
        nbytes: Size of one layer's keys.
        steps: Decode steps per call.
    """
    computations, entry = parse(program.as_text())

    def walk(name: str, times: int) -> tuple[float, float, float]:
        cycles = copies = kernels = 0.0
        for step in computations[name]:
            if step.op == "while":
                body, condition = (re.findall(rf"{part}=%?([\w.\-]+)", step.rest)[0] for part in ("body", "condition"))
                more = walk(body, times * trips(computations, condition))
                cycles, copies, kernels = cycles + more[0], copies + more[1], kernels + more[2]
                continue
            found = re.search(r'"estimated_cycles":"(\d+)"', step.rest)
            cycles += times * int(found[1]) if found else 0
            kernels += times * (step.op not in FREE)
            copies += times * _copied(computations, step, nbytes)
        return cycles, copies, kernels

    cycles, copies, kernels = walk(entry, 1)
    return Account(cycles / steps, program.memory_analysis().temp_size_in_bytes, copies, kernels / steps)


FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def _copied(computations: dict[str, list[Instruction]], step: Instruction, nbytes: int) -> int:
    """Bytes that an instruction writes, if it only moves an array as large as a layer's keys."""
    called = re.search(r"calls=%?([\w.\-]+)", step.rest)
    inner = computations[called[1]] if called and called[1] in computations else []
    moves = {"copy", "transpose"}
    if step.op not in moves and not (inner and {i.op for i in inner} <= {*moves, *FREE}):
        return 0
    sizes = [size for size in map(_nbytes, arrays(step.shape)) if size >= nbytes]
    return max(sizes, default=0)


def _nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    return WIDTH[tensor[0]] * math.prod(tensor[1])


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case."""
    L, steps = MODELS[case.model]["num_hidden_layers"], hardware.STEPS["tpu"]
    whole = setting(case, L)
    period = max(2, len(params.period(whole.cfg.windows)))
    accounts = []
    for layers in (period, 2 * period):
        where = setting(case, layers)
        keys = min(params.nbytes(jax.tree.leaves(layer["k"])[0]) for layer in state(where, case.context).kv.layers)
        accounts.append(account(compiled(case, where), keys, steps))
    layer = Account(*((two - one) / period for one, two in zip(*accounts)))
    total = Account(*(one + (L - period) * each for one, each in zip(accounts[0], layer)))
    held = weights(whole)
    read = held if whole.cfg.tied else {**held, "embed": []}
    chip = BY_NAME[case.chip]
    floor = params.nbytes([read, state(whole, case.context).kv.layers]) / chip.bandwidth
    predicted = total.cycles / chip.clock
    return {
        **asdict(case),
        "floor_ms": floor * 1e3,
        "predicted_ms": predicted * 1e3,
        "fraction": floor / predicted,
        **total._asdict(),
        "layer": layer._asdict(),
        "jax": jax.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=("v5e", "v6e"), default="v6e")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantize", choices=("none", *TYPES), nargs="+", default=("none",))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.model and tuple(args.quantize) != ("none",):
        parser.error("--quantize needs --model")
    types = [None if name == "none" else name for name in args.quantize]
    chosen = [Case(args.model, args.rows, args.context, args.chip, args.kv_dtype, type) for type in types]
    for case in chosen if args.model else TABLE:
        row = measure(case)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{case.model:12} {case.quantize or '':12} {case.rows:2} x {case.context:5,}  "
            f"floor {row['floor_ms']:5.2f} ms  predicted "
            f"{row['predicted_ms']:5.2f} ms  {row['fraction']:4.0%}  temporaries {row['temporaries'] / 1e9:5.2f} GB  "
            f"copies {row['copies'] / 1e9:5.2f} GB  {row['layer']['kernels']:4.1f} instructions a layer",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

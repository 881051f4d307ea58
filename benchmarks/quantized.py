"""Quantized weights against bfloat16 and llama.cpp: speed with random weights, loss and memory of real models.

    python benchmarks/quantized.py speed [--shape Qwen/Qwen3-0.6B] [--types int8,int4] [--rounds 5] [--rivals]
    python benchmarks/quantized.py loss MODEL TEXT [--types int8,int8-weights,int4,fp8]

`speed` runs all contestants in turns in one process, llama.cpp in processes of its own. `loss` evaluates each type on
the same text: bits per byte, the KL divergence from the unquantized model, how often both have the same likeliest token,
bytes of the weights, and decoded tokens per second; with --rivals those of llama.cpp at the nearest type.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxlm.bench import rivals
from jaxlm.bench.cases import Case
from jaxlm.bench.measure import Jaxlm
from jaxlm.bench.random_model import random_model
from jaxlm.bench.rival_files import placeholder_tokenizer
from jaxlm.bench.sources import find
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices.hardware import gigabytes
from jaxlm.exporting import export
from jaxlm.model import Model
from jaxlm.nn import params
from jaxlm.nn.quantize import quantizer

NEAREST = {"bfloat16": "bf16", "int8": "q8_0", "int8-weights": "q8_0", "int4": "q4_0", "fp8": "q8_0"}


def quantized(model: Model, type: str) -> Model:
    """The model with quantized weights. The float ones stay."""
    run, weights = quantizer(type), {}
    for row in params.tensors(model.family.PARAMS, model.config):
        params.put(weights, row.path, run(row, params.get(model.weights, row.path)))
    return replace(model, weights=weights)


def speed(args: argparse.Namespace) -> None:
    shape = find(ModelSource(args.shape))
    model = random_model(shape, "bfloat16")
    models = {"bfloat16": model} | {type: quantized(model, type) for type in args.types.split(",")}
    ours: dict[str, Any] = {f"jaxlm {name}": Jaxlm(each) for name, each in models.items()}
    cases = [Case(kind, *map(int, sizes)) for kind, *sizes in (case.split("/") for case in args.cases.split(","))]
    others: dict[str, Any] = {}
    slots, context = max(case.batch for case in cases), max(case.prompt_tokens + case.max_tokens for case in cases) + 16
    try:
        for type in dict.fromkeys(NEAREST[name] for name in models) if args.rivals else ():
            file = args.out / f"{Path(args.shape).name}-{type}.gguf"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                export(replace(model, tokenizer=placeholder_tokenizer(model.config.V)), file, type=type)
            others[f"llama.cpp {type}"] = rivals.start_llama_cpp(file, type, slots, context)
        measure(ours | others, cases, model.config.V, args.rounds)
    finally:
        for rival in others.values():
            rival.close()


def measure(contestants: dict[str, Any], cases: list[Case], V: int, rounds: int) -> None:
    """Tokens per second of each, the best and the median of the rounds."""
    found: dict[tuple[Case, str], list[float]] = {}
    for number in range(rounds + 1):
        for case in cases:
            prompts = case.prompts(V)
            for name, who in contestants.items():
                sample = who.run(case, prompts)
                if number and sample is not None:
                    tokens = case.batch * case.tokens
                    found.setdefault((case, name), []).append(tokens / sample.seconds)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {rounds} rounds: tokens/s, best (median)")
    print(f"| | {' | '.join(contestants)} |\n" + "| --- " * (len(contestants) + 1) + "|")
    for case in cases:
        cells = [f"{max(a):.1f} ({statistics.median(a):.1f})" for name in contestants if (a := found[case, name])]
        print(f"| {case.name}, batch {case.batch} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    of_speed = commands.add_parser("speed")
    of_speed.add_argument("--shape", default="Qwen/Qwen3-0.6B")
    of_speed.add_argument("--types", default="int8,int4")
    of_speed.add_argument("--cases", default="decode/64/0/1,decode/64/0/8,prefill/512/0/1")
    of_speed.add_argument("--rounds", type=int, default=5)
    of_speed.add_argument("--rivals", action="store_true")
    of_speed.add_argument("--out", type=Path, default=Path("build/quantized"))
    of_speed.set_defaults(run=speed)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""Quantized weights against bfloat16 and llama.cpp: speed with random weights, loss and memory of real models.

    python benchmarks/quantized.py speed [--shape Qwen/Qwen3-0.6B] [--types int8,int4] [--rounds 5] [--rivals]
    python benchmarks/quantized.py loss MODEL TEXT [--types int8,int8-weights,int4,fp8]

`speed` runs all contestants in turns in one process, llama.cpp in processes of its own. `loss` compares each type with
the unquantized model on the same text: bits per byte, KL divergence, how often the likeliest token is the same, and
bytes of the weights.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
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
from jaxlm.nn.quantize import TYPES, quantizer

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
                    print(f"{case.name}, batch {case.batch}, {name}: {tokens / sample.seconds:.1f}", file=sys.stderr)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {rounds} rounds: tokens/s, best (median)")
    print(f"| | {' | '.join(contestants)} |\n" + "| --- " * (len(contestants) + 1) + "|")
    for case in cases:
        cells = [f"{max(a):.1f} ({statistics.median(a):.1f})" for name in contestants if (a := found[case, name])]
        print(f"| {case.name}, batch {case.batch} | {' | '.join(cells)} |", flush=True)


def loss(args: argparse.Namespace) -> None:
    """Every type on the same text, beside the model as it is loaded in float32."""
    model = jaxlm.load(args.model, dtype=args.dtype)
    text = Path(args.text).read_bytes()[: args.bytes].decode(errors="ignore")
    ids = np.array(model.tokenizer.encode(text), np.int32)
    size = args.length * args.batch
    rows = ids[: len(ids) // size * size].reshape(-1, args.length)
    nbytes = len(model.tokenizer.decode(rows.ravel().tolist()).encode())
    if model.tokenizer.bos_id is not None:  # some models need it; it is not predicted
        rows = np.insert(rows, 0, model.tokenizer.bos_id, axis=1)
    print(f"{Path(args.model).name}: {rows.size:,} tokens, {nbytes:,} bytes, jax {jax.__version__}")
    print("| type | bits per byte | change | KL, nats | same top-1 | weights |\n| --- | --- | --- | --- | --- | --- |")
    whole = None
    for type in (None, *args.types.split(",")):
        other = model if type is None else jaxlm.load(args.model, dtype=args.dtype, quantize=type)
        sums = compare(model, other, rows, args.batch)
        bits = sums[0] / np.log(2) / nbytes
        whole = whole or bits
        count = rows.size - len(rows)
        size = gigabytes(params.nbytes(other.weights))
        print(f"| {type or args.dtype} | {bits:.4f} | {bits / whole - 1:+.2%} | {sums[1] / count:.4f} | "
              f"{sums[2] / count:.2%} | {size} |", flush=True)  # fmt: skip


def compare(model: Model, other: Model, rows: np.ndarray, batch: int) -> np.ndarray:
    """Sums over all predicted tokens: nats of `other`, KL(model || other), and equal likeliest tokens."""

    @jax.jit
    def of_batch(tokens: jax.Array, one: Any, two: Any) -> jax.Array:
        p, q = (jax.nn.log_softmax(model.forward(tokens, w)[0][:, :-1]) for w in (one, two))
        nats = -jnp.sum(jnp.take_along_axis(q, tokens[:, 1:, None], axis=-1))
        same = jnp.sum(p.argmax(axis=-1) == q.argmax(axis=-1)).astype(jnp.float32)
        return jnp.stack([nats, jnp.sum(jnp.exp(p) * (p - q)), same])

    parts = [of_batch(jnp.asarray(rows[i : i + batch]), model.weights, other.weights)
             for i in range(0, len(rows), batch)]  # fmt: skip
    return np.sum([np.asarray(part, np.float64) for part in parts], axis=0)


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
    of_loss = commands.add_parser("loss")
    of_loss.add_argument("model")
    of_loss.add_argument("text")
    of_loss.add_argument("--types", default=",".join(TYPES))
    of_loss.add_argument("--bytes", type=int, default=120_000)
    of_loss.add_argument("--dtype", default="float32")
    of_loss.add_argument("--length", type=int, default=512)
    of_loss.add_argument("--batch", type=int, default=4)
    of_loss.set_defaults(run=loss)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""Quantized weights against bfloat16 and llama.cpp: speed with random weights, loss and memory of real models.

    python benchmarks/quantized.py speed [--shape Qwen/Qwen3-0.6B] [--types int8,int4] [--rounds 5] [--rivals]
    python benchmarks/quantized.py receipts MODEL TEXT [--types int8,int8-weights,int4,fp8] [--stored] [--rivals]
    python benchmarks/quantized.py stored MODEL.gguf

`speed` runs all contestants in turns in one process, llama.cpp in processes of its own. `receipts` makes the table of
docs/quantization.md. It compares each type with the unquantized model on the same text: bits per byte (`jaxlm eval`),
KL divergence, how often the likeliest token is the same, memory, and decoded tokens per second.
"""

import argparse
import json
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
from jaxlm.nn.quantized import is_quantized

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
        everyone = ours | others
        show(everyone, measure(everyone, cases, model.config.V, args.rounds), cases, args.rounds)
    finally:
        for rival in others.values():
            rival.close()


def measure(contestants: dict[str, Any], cases: list[Case], V: int, rounds: int) -> dict[tuple[Case, str], list[float]]:
    """Tokens per second of each in every round, in turns. The first round compiles."""
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
    return found


def show(
    contestants: dict[str, Any], found: dict[tuple[Case, str], list[float]], cases: list[Case], rounds: int
) -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {rounds} rounds: tokens/s, best (median)")
    print(f"| | {' | '.join(contestants)} |\n" + "| --- " * (len(contestants) + 1) + "|")
    for case in cases:
        cells = [f"{max(a):.1f} ({statistics.median(a):.1f})" for name in contestants if (a := found[case, name])]
        print(f"| {case.name}, batch {case.batch} | {' | '.join(cells)} |", flush=True)


def receipts(args: argparse.Namespace) -> None:
    """What each type costs and gives, for a real model: `jaxlm eval` of the text, beside the model in float32; memory;
    and decoded tokens per second in bfloat16, all in turns, beside llama.cpp at the nearest type."""
    text = args.out / "text.txt"
    args.out.mkdir(parents=True, exist_ok=True)
    text.write_text(Path(args.text).read_bytes()[: args.bytes].decode(errors="ignore"))
    types = [None, *(["as stored"] if args.stored else []), *args.types.split(",")]

    def load(type: str | None, dtype: str) -> Model:
        if type == "as stored":  # the blocks of a GGUF file; the dtype is that of products
            model = jaxlm.load(args.model, quantize="stored")
            as_dtype = lambda w: replace(w, dtype=jnp.dtype(dtype)) if is_quantized(w) else w.astype(dtype)  # noqa: E731
            return replace(model, weights=jax.tree.map(as_dtype, model.weights, is_leaf=is_quantized))
        return jaxlm.load(args.model, dtype=dtype, quantize=type)

    model = load(None, "float32")
    ids = np.array(model.tokenizer.encode(text.read_text()), np.int32)
    size = args.length * args.batch
    rows = ids[: len(ids) // size * size].reshape(-1, args.length)
    if model.tokenizer.bos_id is not None:  # some models need it; it is not predicted
        rows = np.insert(rows, 0, model.tokenizer.bos_id, axis=1)
    found: dict[str | None, list[str]] = {}
    done = args.out / "losses.json"  # a run that was interrupted resumes
    losses = json.loads(done.read_text()) if done.exists() else {}
    whole = 0.0
    for type in types:
        key = f"{Path(args.model).name}, {args.bytes} bytes, length {args.length}: {type or 'float'}"
        if key not in losses:
            other = model if type is None else load(type, "float32")
            bits = jaxlm.evaluate(other, text, length=args.length, stride=args.length).bits_per_byte
            losses[key] = [bits, *(compare(model, other, rows, args.batch)[1:] / (rows.size - len(rows)))]
            done.write_text(json.dumps(losses))
        bits, divergence, same = losses[key]
        whole = whole or bits
        found[type] = [f"{bits:.4f}", f"{bits / whole - 1:+.2%}", f"{divergence:.4f}", f"{same:.1%}"]
        print(type or "float", found[type], file=sys.stderr, flush=True)
    contestants: dict[str, Any] = {}
    rivals_of: dict[str | None, str] = {}
    case = Case("decode", 64, 0, 1)
    try:
        for type in types:
            other = load(type, "bfloat16")
            contestants[type or "bfloat16"] = Jaxlm(other)
            found[type].append(gigabytes(params.nbytes(other.weights)))
            if not args.rivals:
                continue
            nearest = NEAREST.get(type or "bfloat16")
            file = Path(args.model) if nearest is None else args.out / f"{nearest}.gguf"
            rivals_of[type] = f"llama.cpp {nearest or 'as stored'}"
            if rivals_of[type] not in contestants:
                if nearest is not None:
                    export(other if type is None else load(None, "bfloat16"), file, type=nearest)
                contestants[rivals_of[type]] = rivals.start_llama_cpp(file, nearest or "", 1, 256)
        speeds = measure(contestants, [case], model.config.V, args.rounds)
    finally:
        for who in contestants.values():
            who.close()
    columns = ["type", "bits per byte", "change", "KL, nats", "same top-1", "weights", "tokens/s"]
    print(f"{Path(args.model).name}: {len(ids):,} tokens of {Path(args.text).name}, jax {jax.__version__}")
    print(f"| {' | '.join(columns + ['llama.cpp'] * args.rivals)} |\n" + "| --- " * (len(columns) + args.rivals) + "|")
    for type in types:
        cells = [*found[type], f"{max(speeds[case, type or 'bfloat16']):.0f}"]
        if args.rivals:
            cells.append(f"{max(speeds[case, rivals_of[type]]):.0f} ({rivals_of[type].removeprefix('llama.cpp ')})")
        print(f"| {type or 'not quantized'} | {' | '.join(cells)} |")


def stored(args: argparse.Namespace) -> None:
    """A GGUF file whose blocks stay as they are, against its weights in bfloat16: tokens per second, and seconds of
    compilation."""
    models = {"stored": {"quantize": "stored"}, "bfloat16": {"dtype": "bfloat16"}}
    contestants: dict[str, Any] = {name: Jaxlm(jaxlm.load(args.model, **options)) for name, options in models.items()}
    cases = [Case("decode", 32, 0, 1), Case("prefill", 256, 0, 1), Case("decode", 32, 0, 8)]
    V = contestants["stored"].model.config.V
    for case in cases:
        prompts = case.prompts(V)
        for name, who in contestants.items():
            if (sample := who.run(case, prompts)) is not None and sample.compile_seconds:
                print(f"{case.name}, batch {case.batch}, {name}: {sample.compile_seconds:.1f} s to compile")
    show(contestants, measure(contestants, cases, V, args.rounds), cases, args.rounds)


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
    of_speed.set_defaults(run=speed)
    of_receipts = commands.add_parser("receipts")
    of_receipts.add_argument("model")
    of_receipts.add_argument("text")
    of_receipts.add_argument("--types", default=",".join(TYPES))
    of_receipts.add_argument("--stored", action="store_true", help="also the blocks of a GGUF file as they are stored")
    of_receipts.add_argument("--bytes", type=int, default=60_000)
    of_receipts.add_argument("--length", type=int, default=512)
    of_receipts.add_argument("--batch", type=int, default=4)
    of_receipts.set_defaults(run=receipts)
    of_stored = commands.add_parser("stored")
    of_stored.add_argument("model")
    of_stored.set_defaults(run=stored)
    for command in (of_speed, of_receipts, of_stored):
        command.add_argument("--rounds", type=int, default=5)
    for command in (of_speed, of_receipts):
        command.add_argument("--rivals", action="store_true", help="llama.cpp too")
        command.add_argument("--out", type=Path, default=Path("build/quantized"))
    args = parser.parse_args()
    jaxlm.use_compiler_flags()  # as the commands do
    args.run(args)


if __name__ == "__main__":
    main()

"""Time to the first tokens of a fresh process: loading, tracing and lowering, compilation, and the rest.

    python benchmarks/first_token.py [--shape Llama-3.2-1B] [--rounds 1] [--python PYTHON] [--quick]

A round runs two fresh processes with one folder of compiled programs: the first finds it empty (cold), the second has
what the first has compiled (warm). Each process loads the model once and answers several prompts with other lengths and
another max_tokens. Programs are all that XLA compiles or that jax reads from the folder, also those of single
operations outside a program.

Times are seconds of the wall clock: "trace" and "compile" count a moment once, however many threads trace or compile in
it, and "trace" leaves out those in which a program is compiled beside it. "CPU" are seconds of all threads together,
which depend less on other work on the machine. The best of the rounds is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

from common import SHAPES, checkpoint

# Tokens of the prompt, max_tokens.
CASES = ((32, 64), (50, 100), (200, 400), (32, 64))
TRACE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
COMPILE = ("/jax/core/compile/backend_compile_duration",)

parser = argparse.ArgumentParser()
parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B")
parser.add_argument("--rounds", type=int, default=1)
parser.add_argument("--python", default=sys.executable, help="the interpreter that is measured")
parser.add_argument("--quick", action="store_true", help="the first prompt only")
parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
args = parser.parse_args()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one span."""
    total, end = 0.0, 0.0
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def child(programs: str) -> None:
    """Measures this process and prints a line of JSON."""
    start, cpu = time.time(), time.process_time()
    import jax

    import jaxlm

    jaxlm.use_compilation_cache(programs)
    spans: list[tuple[str, float, float]] = []

    def record(event: str, start_time: float, end_time: float, **_: Any) -> None:
        spans.append((event, start_time, end_time))

    jax.monitoring.register_event_time_span_listener(record)

    def measured(begin: float) -> dict[str, Any]:
        nonlocal cpu
        end, used, now = time.time(), time.process_time() - cpu, list(spans)
        cpu += used
        # A program that another thread compiles may have been started earlier.
        compiled = [(max(a, begin), b) for name, a, b in now if name in COMPILE]
        traced = [(a, b) for name, a, b in now if name in TRACE] + compiled
        spans.clear()
        return {
            "seconds": end - begin,
            "cpu": used,
            "trace": covered(traced) - covered(compiled),
            "compile": covered(compiled),
            "programs": len(compiled),
        }

    imported = time.time() - start
    start = time.time()
    model = jaxlm.load(checkpoint(args.shape))
    rows = [{"import": imported, **measured(start)}]
    for length, max_tokens in CASES[: 1 if args.quick else None]:
        prompt = [(7 * i) % model.config.V for i in range(length)]
        start = time.time()
        pieces = jaxlm.stream(model, prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
        next(pieces)
        first = measured(start)
        start = time.time()
        list(islice(pieces, 2))
        rows.append({"first": first, "next": measured(start)})
    print(json.dumps(rows))


def run(programs: str) -> list[dict[str, Any]]:
    command = [args.python, __file__, "--shape", args.shape, "--child", programs, *["--quick"] * args.quick]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def line(what: str, parts: list[dict[str, Any]]) -> str:
    best = min(parts, key=lambda part: part["seconds"])
    rest = best["seconds"] - best["trace"] - best["compile"]
    figures = " | ".join(f"{x:.2f}" for x in (best["seconds"], best["trace"], best["compile"], rest, best["cpu"]))
    return f"| {what} | {figures} | {best['programs']} |"


if args.child:
    child(args.child)
    sys.exit()
checkpoint(args.shape)
found: dict[str, list[list[dict[str, Any]]]] = {"cold": [], "warm": []}
for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as programs:
        for name, runs in found.items():
            runs.append(run(programs))
            print(f"{name}: {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
version = subprocess.run([args.python, "-c", "import jax; print(jax.__version__)"], capture_output=True, text=True)
print(f"{args.shape}, jax {version.stdout.strip()}, the best of {args.rounds} rounds, seconds")
print("| | all | trace | compile | rest | CPU | programs |\n" + "| --- " * 7 + "|")
for name, runs in found.items():
    print(line(f"{name}: load", [rows[0] for rows in runs]))
    for number, (length, max_tokens) in enumerate(CASES[: 1 if args.quick else None], 1):
        what = f"{name}: prompt {length}, max_tokens {max_tokens}"
        print(line(f"{what}, first token", [rows[number]["first"] for rows in runs]))
        print(line(f"{what}, two more tokens", [rows[number]["next"] for rows in runs]))

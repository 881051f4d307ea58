"""The engine: many requests beside one, cached prompts beside new ones, this version beside an earlier one.

    python benchmarks/engine.py throughput [MODEL ...] [--requests 1,2,4,8] [--tokens 64] [--rounds 5]
    python benchmarks/engine.py prefix [MODEL ...] [--prompt 500] [--rounds 5]
    python benchmarks/engine.py masks [MODEL ...] [--tokenizer FOLDER] [--requests 1,8] [--rounds 5]
    python benchmarks/engine.py before --source OTHER/src [MODEL ...] [--tokens 64] [--rounds 7]

MODEL is a model, or the name of a shape with random weights (benchmarks/common.py), with ":float32" or another dtype
behind it. All cases of a table take turns, round by round. Programs are compiled before. Figures are medians.

`before` runs `jaxlm.generate` with one prompt in two processes, with this source and with that of another version. They
take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from common import SHAPES, checkpoint

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SOURCE = Path(__file__).parents[1] / "src"


def load(name: str) -> Any:
    import jaxlm

    name, _, dtype = name.partition(":")
    return jaxlm.load(str(checkpoint(name)) if name in SHAPES else name, dtype=dtype or "auto")


def prompt(length: int, number: int) -> list[int]:
    """Tokens of a prompt that shares no prefix with those of other numbers."""
    return [1000 + number, *((37 * i + 101 * number) % 900 + 50 for i in range(length - 1))]


def alternate(cases: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """The results of each case, which take turns. The first round is not counted."""
    found: dict[Any, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            result = case()
            if number:
                found[name].append(result)
    return found


def throughput(name: str, args: argparse.Namespace) -> None:
    """Tokens per second of all requests together, prefill included."""
    import jaxlm

    model = load(name)
    numbers = iter(range(1_000_000))

    def case(requests: int) -> Callable[[], float]:
        engine = jaxlm.Engine(model, requests, length=1024)

        def run() -> float:
            start = time.perf_counter()
            for _ in range(requests):
                engine.submit(prompt(32, next(numbers)), max_tokens=args.tokens, **GREEDY)
            while engine.is_busy:
                engine.step()
            return requests * args.tokens / (time.perf_counter() - start)

        return run

    found = alternate({n: case(n) for n in args.requests}, args.rounds)
    print(f"\n| {name}: requests | tokens/s | of one |\n| --- | --- | --- |")
    for n, rates in found.items():
        ratio = median(rate / one for rate, one in zip(rates, found[args.requests[0]]))
        print(f"| {n} | {median(rates):.1f} | {ratio:.2f} x |", flush=True)


def prefix(name: str, args: argparse.Namespace) -> None:
    """Time to the first token of a prompt that is new, and of one whose prefix is cached."""
    import jaxlm

    model = load(name)
    engine = jaxlm.Engine(model, 2, length=1024)
    numbers = iter(range(1_000_000))
    last: list[int] = []

    def first_token(tokens: list[int]) -> float:
        start = time.perf_counter()
        request = engine.submit(tokens, max_tokens=1, **GREEDY)
        while engine.is_busy:
            engine.step()
        return request.first - start

    def cold() -> float:
        last[:] = prompt(args.prompt, next(numbers))
        return first_token(last)

    found = alternate({"new": cold, "cached": lambda: first_token(last)}, args.rounds)
    print(f"\n| {name}: prompt of {args.prompt} tokens | first token | of the new one |\n| --- | --- | --- |")
    for case, seconds in found.items():
        ratio = median(a / b for a, b in zip(seconds, found["new"]))
        print(f"| {case} | {1000 * median(seconds):.0f} ms | {ratio:.3f} |", flush=True)


def masks(name: str, args: argparse.Namespace) -> None:
    """Tokens per second of requests with a regular expression, beside the same requests without one."""
    import jaxlm
    from jaxlm.processing.tokenizer import Tokenizer

    model = load(name)
    if args.tokenizer:
        model = replace(model, tokenizer=Tokenizer.load(args.tokenizer))
    numbers = iter(range(1_000_000))

    def case(engine: Any, requests: int, options: dict[str, Any]) -> Callable[[], float]:
        def run() -> float:
            asked = []
            for _ in range(requests):
                asked.append(engine.submit(prompt(32, next(numbers)), max_tokens=args.tokens, temperature=0, **options))
            while not all(request.tokens for request in asked):
                engine.step()
            before, start = sum(len(request.tokens) for request in asked), time.perf_counter()
            while engine.is_busy:
                engine.step()
            return (sum(len(request.tokens) for request in asked) - before) / (time.perf_counter() - start)

        return run

    print(f"\n| {name}: requests | tokens/s | with a regular expression | ratio |\n| --- | --- | --- | --- |")
    for n in args.requests:
        engine = jaxlm.Engine(model, n, length=1024)
        kinds = {"free": {"ignore_eos": True}, "regex": {"regex": r"([a-z]+[ .,\n]){500,}"}}
        found = alternate({kind: case(engine, n, options) for kind, options in kinds.items()}, args.rounds)
        ratio = median(a / b for a, b in zip(found["regex"], found["free"]))
        print(f"| {n} | {median(found['free']):.1f} | {median(found['regex']):.1f} | {ratio:.3f} |", flush=True)


def before(name: str, args: argparse.Namespace) -> None:
    """Time of `jaxlm.generate` with one prompt, this version beside another one."""
    sources = {"this version": SOURCE, "before": Path(args.source).resolve()}
    children = {}
    for label, source in sources.items():
        environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parent}"}
        command = [sys.executable, __file__, "child", name, "--tokens", str(args.tokens)]
        children[label] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(child: Any) -> float:
        child.stdin.write("\n")
        return json.loads(child.stdout.readline())

    found = alternate({label: lambda child=child: ask(child) for label, child in children.items()}, args.rounds)
    for child in children.values():
        child.stdin.close()
        child.wait()
    ratios = sorted(a / b for a, b in zip(*found.values()))
    print(f"\n| {name}: {args.tokens} tokens at batch 1 | seconds | ratio | of the rounds |\n| --- | --- | --- | --- |")
    for label, seconds in found.items():
        print(f"| {label} | {median(seconds):.3f} | | |")
    best = min(found["this version"]) / min(found["before"])
    print(
        f"| ratio | | {median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f}; of the best {best:.3f} |", flush=True
    )


def child(name: str, args: argparse.Namespace) -> None:
    """Answers each line of stdin with the seconds of one `generate`."""
    import jaxlm

    model = load(name)
    for _ in sys.stdin:
        start = time.perf_counter()
        jaxlm.generate(model, prompt(32, 1), max_tokens=args.tokens, **GREEDY)
        print(json.dumps(time.perf_counter() - start), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "prefix", "masks", "before", "child"])
    parser.add_argument("models", nargs="*", default=["Qwen3-0.6B"])
    parser.add_argument("--requests", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", help="of a shape, which has none")
    parser.add_argument("--source", help="the src folder of the other version")
    args = parser.parse_intermixed_args()
    if args.what == "before" and not args.source:
        parser.error("before needs --source")
    for name in args.models:
        {"throughput": throughput, "prefix": prefix, "masks": masks, "before": before, "child": child}[args.what](
            name, args
        )


if __name__ == "__main__":
    main()

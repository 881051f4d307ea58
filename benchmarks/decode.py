"""Decode speed compared with transformers and llama.cpp, on the same weights, in one run.

    python benchmarks/decode.py [--shape Qwen3-0.6B] [--prompt 32,512,2048] [--tokens 48] [--batch 1,2,4,8] [--rounds 2]
                                [--torch-python PYTHON] [--llama-python PYTHON] [--compile]

Tokens a second of all rows together. Rounds alternate between the contestants, batch by batch, so that a noisy machine
is noisy for all; the best round counts. The limit is this run's memory read rate over the bytes of a step: every weight
once (a tied embedding is the head) and the cache. transformers runs in a process of its own, where torch is installed
(extra `oracle`): float32, bfloat16, and with --compile a compiled static cache. llama.cpp runs where xllamacpp is
installed (benchmarks/llama_cpp.py).
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import SHAPES, checkpoint, read_rate, rivals

Run = Callable[[int, int], float]  # batch, prompt length -> tokens a second
parser = argparse.ArgumentParser()
parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B", help="the architecture, with random weights")
parser.add_argument("--prompt", default="32", help="one length of the prompts, or several: 32,512,2048")
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--batch", default="1", help="one number of rows, or several: 1,2,4,8")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
parser.add_argument("--rival-dtypes", nargs="*", default=["float32", "bfloat16"])
parser.add_argument("--torch-python", help="an interpreter that has torch, where this one has none")
parser.add_argument("--llama-python", help="an interpreter that has xllamacpp and gguf")
parser.add_argument("--theirs", action="store_true", help="run transformers alone, as standard input asks")
args = parser.parse_args()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prompts(batch: int, length: int, vocab: int) -> list[list[int]]:
    return [[(7 * i + row) % vocab for i in range(length)] for row in range(batch)]


def ours(dtype: str) -> tuple[Callable[[int, int], int], Run]:
    """-> the bytes of a step at a batch and prompt length, and a run."""
    import jaxlm
    from jaxlm.inference.memory import kv_bytes
    from jaxlm.nn import params

    model = jaxlm.load(checkpoint(args.shape), dtype=dtype)

    def step(batch: int, length: int) -> int:
        return params.nbytes(model.weights) + batch * kv_bytes(model, length + args.tokens // 2)

    def run(batch: int, length: int) -> float:
        last = {}
        how = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "batch_size": batch}
        for piece in jaxlm.stream(model, prompts(batch, length, model.config.V), **how):
            last[piece.index] = piece
        return sum(piece.tokens_per_second for piece in last.values())

    return step, run


def theirs(dtype: str, static: bool = False) -> Run:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(args.shape), dtype=getattr(torch, dtype)
    ).eval()
    more = {"cache_implementation": "static"} if static else {}

    def run(batch: int, length: int, tokens: int = args.tokens) -> float:
        ids, at = torch.tensor(prompts(batch, length, model.config.vocab_size)), []
        common = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        watch = [lambda *_, **__: bool(at.append(time.perf_counter()))]  # stops nothing: the time of each token
        with torch.no_grad():
            model.generate(ids, max_new_tokens=tokens, stopping_criteria=watch, **common, **more)
        return batch * (len(at) - 1) / (at[-1] - at[0])

    run(1, 32, 4)
    return run


def serve() -> None:
    """transformers' side: its contestants' names on one line, then for each line [name, batch, length] a speed."""
    found = {f"transformers {dtype}": theirs(dtype) for dtype in args.rival_dtypes}
    if args.compile:
        found["transformers bfloat16 static, compiled"] = theirs("bfloat16", static=True)
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        name, batch, length = json.loads(line)
        print(json.dumps(found[name](batch, length)), flush=True)


cases = [(int(n), int(length)) for length in args.prompt.split(",") for n in args.batch.split(",")]
if args.theirs:
    serve()
    sys.exit()
models = {f"jaxlm {dtype}": ours(dtype) for dtype in args.dtypes}
runs = {name: run for name, (_, run) in models.items()}
python = args.torch_python or (sys.executable if importlib.util.find_spec("torch") else None)
runs |= rivals([python, __file__, *sys.argv[1:], "--theirs"]) if python else {}
if args.llama_python:
    script = str(Path(__file__).with_name("llama_cpp.py"))
    context = max(length for _, length in cases) + args.tokens + 16
    sizes = ("--tokens", args.tokens, "--batch", max(batch for batch, _ in cases), "--context", context)
    runs |= rivals([args.llama_python, script, str(checkpoint(args.shape)), *map(str, sizes)])
for name in models:
    for case in cases:
        runs[name](*case)  # compiles
best = {(name, *case): 0.0 for name in runs for case in cases}
rate = 0.0
for _ in range(args.rounds):
    rate = max(rate, read_rate())
    for batch, length in cases:
        for name, run in runs.items():
            speed = run(batch, length)
            best[name, batch, length] = max(best[name, batch, length], speed)
            print(f"batch {batch}, prompt {length}, {name}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)

import jax  # noqa: E402

print(f"{args.shape}, {args.tokens} tokens, jax {jax.__version__}, "
      f"{jax.devices()[0].device_kind}, memory read {rate / 1e9:.0f} GB/s")  # fmt: skip
print("| batch | prompt | | tokens/s | limit | of the limit | against the best transformers | against llama.cpp |")
print("| --- " * 8 + "|")
for case in cases:
    strongest = {
        kind: max((best[name, *case] for name in runs if name.startswith(kind)), default=0.0)
        for kind in ("transformers", "llama.cpp")
    }
    for name in runs:
        limit = case[0] * rate / models[name][0](*case) if name in models else 0.0
        share = f"{limit:.0f} | {best[name, *case] / limit:.0%}" if limit else " | "
        ratios = " | ".join(f"{best[name, *case] / speed:.2f} x" if speed else "" for speed in strongest.values())
        print(f"| {case[0]} | {case[1]} | {name} | {best[name, *case]:.1f} | {share} | {ratios} |")

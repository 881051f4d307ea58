"""Prefill speed compared with transformers and llama.cpp, on the same weights, in one run.

    python benchmarks/prefill.py [--shape Qwen3-0.6B] [--lengths 128,512] [--rounds 3] [--torch-python PYTHON]
                                 [--llama-python PYTHON]

Tokens/s are those of the prompt, until its first token is sampled. Rounds alternate between the contestants, and the
best round counts. The limit is this run's matrix product rate (float32) divided by the FLOPs per token: 2 per weight of
the layers, and 2 L N H T for attention (causal, products with k and v). transformers runs in a process of its own,
where torch is installed (extra `oracle`), llama.cpp where xllamacpp is (benchmarks/llama_cpp.py).
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import SHAPES, checkpoint, matmul_rate, rivals

Run = Callable[[int, int], float]  # batch (always 1), prompt length -> tokens a second of the prompt
parser = argparse.ArgumentParser()
parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B")
parser.add_argument("--lengths", default="128,512", help="one length of the prompt, or several: 128,512")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
parser.add_argument("--rival-dtypes", nargs="*", default=["float32", "bfloat16"])
parser.add_argument("--torch-python", help="an interpreter that has torch, where this one has none")
parser.add_argument("--llama-python", help="an interpreter that has xllamacpp and gguf")
parser.add_argument("--theirs", action="store_true", help="run transformers alone, as standard input asks")
args = parser.parse_args()


def prompt(length: int, vocab: int) -> list[int]:
    return [(7 * i) % vocab for i in range(length)]


def ours(dtype: str) -> Run:
    import jaxlm

    model = jaxlm.load(checkpoint(args.shape), dtype=dtype)

    def run(batch: int, length: int) -> float:
        piece = next(iter(jaxlm.stream(model, prompt(length, model.config.V), max_tokens=1, temperature=0)))
        return length / piece.first_token_seconds

    return run


def theirs(dtype: str) -> Run:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(args.shape), dtype=getattr(torch, dtype)
    ).eval()

    def run(batch: int, length: int) -> float:
        ids = torch.tensor([prompt(length, model.config.vocab_size)])
        start = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        return length / (time.perf_counter() - start)

    run(1, 32)
    return run


def serve() -> None:
    """transformers' side: its contestants' names on one line, then for each line [name, batch, length] a speed."""
    found = {f"transformers {dtype}": theirs(dtype) for dtype in args.rival_dtypes}
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        name, batch, length = json.loads(line)
        print(json.dumps(found[name](batch, length)), flush=True)


lengths = [int(length) for length in args.lengths.split(",")]
if args.theirs:
    serve()
    sys.exit()
runs = {f"jaxlm {dtype}": ours(dtype) for dtype in args.dtypes}
python = args.torch_python or (sys.executable if importlib.util.find_spec("torch") else None)
runs |= rivals([python, __file__, *sys.argv[1:], "--theirs"]) if python else {}
if args.llama_python:
    script = str(Path(__file__).with_name("llama_cpp.py"))
    sizes = ("--tokens", 1, "--batch", 1, "--context", max(lengths) + 16)
    runs |= rivals([args.llama_python, script, str(checkpoint(args.shape)), *map(str, sizes), "--prefill"])
for name in runs:
    if name.startswith("jaxlm"):
        for length in lengths:
            runs[name](1, length)  # compiles
best = {(name, length): 0.0 for name in runs for length in lengths}
rate = 0.0
for _ in range(args.rounds):
    rate = max(rate, matmul_rate())
    for length in lengths:
        for name, run in runs.items():
            speed = run(1, length)
            best[name, length] = max(best[name, length], speed)
            print(f"prompt {length}, {name}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)

import jax  # noqa: E402

from jaxlm import models  # noqa: E402
from jaxlm.checkpoint.hf import read_json  # noqa: E402
from jaxlm.nn import params  # noqa: E402

hf = read_json(checkpoint(args.shape) / "config.json")
family = models.family_of(hf["model_type"])
cfg = family.Config.from_hf(hf)
layers = params.count(family.PARAMS, cfg) - cfg.V * cfg.D * (1 if cfg.tied else 2)
print(f"{args.shape}, jax {jax.__version__}, {jax.devices()[0].device_kind}, matrix product {rate / 1e9:.0f} GFLOP/s")
print("| prompt | | tokens/s | of the limit | against the best transformers | against llama.cpp |")
print("| --- " * 6 + "|")
for length in lengths:
    limit = rate / (2 * layers + 2 * cfg.L * cfg.N * cfg.H * length)
    strongest = [max((best[name, length] for name in runs if name.startswith(kind)), default=0.0)
                 for kind in ("transformers", "llama.cpp")]  # fmt: skip
    for name in runs:
        speed = best[name, length]
        ratios = " | ".join(f"{speed / rival:.2f} x" if rival else "" for rival in strongest)
        print(f"| {length} | {name} | {speed:.0f} | {speed / limit:.0%} | {ratios} |")

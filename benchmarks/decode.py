"""Decode speed compared with transformers, on the same weights, in one run.

    python benchmarks/decode.py [--shape Qwen3-0.6B] [--prompt 32] [--tokens 48] [--batch 1] [--rounds 2]

Rounds alternate between the implementations, so that noise of the machine affects all of them. The best round counts.
The limit is this run's memory read rate divided by the bytes of a step: every weight once (a tied embedding is the
head) and the KV cache. transformers runs if torch is installed (extra `oracle`): float32, bfloat16, and with --compile
a compiled static cache.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

from common import checkpoint, read_rate

parser = argparse.ArgumentParser()
parser.add_argument("--shape", default="Qwen3-0.6B")
parser.add_argument("--prompt", type=int, default=32)
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
parser.add_argument("--torch-python", help="an interpreter with torch, if this one has none")
parser.add_argument("--theirs", action="store_true", help="run transformers only and print its speeds as JSON")
args = parser.parse_args()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def ours(dtype: str):
    """Returns (name, bytes per step, run). `run` returns tokens per second."""
    import jaxlm
    from jaxlm.inference.memory import kv_bytes
    from jaxlm.nn import params

    model = jaxlm.load(checkpoint(args.shape), dtype=dtype)
    prompts = [[(7 * i + row) % model.config.V for i in range(args.prompt)] for row in range(args.batch)]
    step = params.nbytes(model.weights) + args.batch * kv_bytes(model, args.prompt + args.tokens // 2)

    def run() -> float:
        last = {}
        for piece in jaxlm.stream(model, prompts, max_tokens=args.tokens, temperature=0, ignore_eos=True):
            last[piece.index] = piece
        return sum(piece.tokens_per_second for piece in last.values())

    run()  # compiles
    return f"jaxlm {dtype}", step, run


def theirs(dtype: str, static: bool = False):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(args.shape), dtype=getattr(torch, dtype)
    ).eval()
    ids = torch.tensor(
        [[(7 * i + row) % model.config.vocab_size for i in range(args.prompt)] for row in range(args.batch)]
    )
    more = {"cache_implementation": "static"} if static else {}
    common = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        **more,
    }

    def timed(n: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, **common)
        return time.perf_counter() - start

    def run() -> float:
        return args.batch * (args.tokens - 4) / (timed(args.tokens) - timed(4))

    timed(4)
    return f"transformers {dtype}{' static, compiled' if static else ''}", 0, run


def rivals() -> list:
    found = [theirs("float32"), theirs("bfloat16")]
    return found + ([theirs("bfloat16", static=True)] if args.compile else [])


def elsewhere() -> dict[str, float]:
    """The speeds of transformers, from the interpreter that has torch."""
    flags = [
        "--shape",
        args.shape,
        "--prompt",
        str(args.prompt),
        "--tokens",
        str(args.tokens),
        "--batch",
        str(args.batch),
    ]
    flags += ["--theirs", "--rounds", "1"] + (["--compile"] if args.compile else [])
    out = subprocess.run([args.torch_python, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


if args.theirs:
    print(json.dumps({name: run() for name, _, run in rivals()}))
    sys.exit()
contestants = [ours(dtype) for dtype in args.dtypes]
if importlib.util.find_spec("torch"):
    contestants += rivals()
best = {name: 0.0 for name, *_ in contestants}
rate = 0.0
for _ in range(args.rounds):
    rate = max(rate, read_rate())
    speeds = {name: run() for name, _, run in contestants}
    speeds |= elsewhere() if args.torch_python else {}
    best = {name: max(best.get(name, 0.0), speed) for name, speed in speeds.items()}
contestants += [(name, 0, None) for name in best if name not in {c[0] for c in contestants}]

import jax  # noqa: E402

print(f"{args.shape}, batch {args.batch}, prompt {args.prompt}, {args.tokens} tokens, jax {jax.__version__}, "
      f"{jax.devices()[0].device_kind}, memory read {rate / 1e9:.0f} GB/s")  # fmt: skip
strongest = max((best[name] for name, *_ in contestants if name.startswith("transformers")), default=0.0)
print("| | tokens/s | limit | of limit | vs. fastest transformers |\n| --- | --- | --- | --- | --- |")
for name, step, _ in contestants:
    limit = args.batch * rate / step if step else 0.0
    share = f"{limit:.0f} | {best[name] / limit:.0%}" if step else " | "
    print(f"| {name} | {best[name]:.1f} | {share} | {f'{best[name] / strongest:.1f} x' if strongest else ''} |")

"""Prefill speed compared with transformers, on the same weights, in one run.

    python benchmarks/prefill.py [--shape Qwen3-0.6B] [--lengths 128 512] [--rounds 3]

Tokens/s are those of the prompt, until its first token is sampled. The limit is this run's matrix product rate
(float32) divided by the FLOPs per token: 2 per weight of the layers, and 2 L N H T for attention (causal, products with
k and v).
"""

import argparse
import time

from common import SHAPES, checkpoint, matmul_rate

parser = argparse.ArgumentParser()
parser.add_argument("--shape", choices=SHAPES, default="Qwen3-0.6B")
parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512])
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
args = parser.parse_args()


def prompt(length: int, vocab: int) -> list[int]:
    return [(7 * i) % vocab for i in range(length)]


def ours(dtype: str):
    import jaxlm

    model = jaxlm.load(checkpoint(args.shape), dtype=dtype)

    def run(length: int) -> float:
        piece = next(iter(jaxlm.stream(model, prompt(length, model.config.V), max_tokens=1, temperature=0)))
        return length / piece.first_token_seconds

    return f"jaxlm {dtype}", run


def theirs(dtype: str):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(args.shape), dtype=getattr(torch, dtype)
    ).eval()

    def run(length: int) -> float:
        ids = torch.tensor([prompt(length, model.config.vocab_size)])
        start = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        return length / (time.perf_counter() - start)

    return f"transformers {dtype}", run


contestants = [ours(dtype) for dtype in args.dtypes]
try:
    import torch  # noqa: F401

    contestants += [theirs("float32"), theirs("bfloat16")]
except ImportError:
    print("torch is not installed: transformers is skipped")

best: dict[tuple[str, int], float] = {}
rate = 0.0
for _ in range(args.rounds):
    rate = max(rate, matmul_rate())
    for name, run in contestants:
        for length in args.lengths:
            best[name, length] = max(best.get((name, length), 0.0), run(length))

import jax  # noqa: E402

from jaxlm import models  # noqa: E402
from jaxlm.checkpoint.hf import read_json  # noqa: E402
from jaxlm.nn import params  # noqa: E402

hf = read_json(checkpoint(args.shape) / "config.json")
family = models.family_of(hf["model_type"])
cfg = family.Config.from_hf(hf)
layers = params.count(family.PARAMS, cfg) - cfg.V * cfg.D * (1 if cfg.tied else 2)
print(f"{args.shape}, jax {jax.__version__}, {jax.devices()[0].device_kind}, matrix product {rate / 1e9:.0f} GFLOP/s")
print("| | prompt | tokens/s | of limit | vs. fastest transformers |\n| --- | --- | --- | --- | --- |")
for length in args.lengths:
    limit = rate / (2 * layers + 2 * cfg.L * cfg.N * cfg.H * length)
    rivals = max((best[name, length] for name, _ in contestants if name.startswith("transformers")), default=0.0)
    for name, _ in contestants:
        speed = best[name, length]
        print(
            f"| {name} | {length} | {speed:.0f} | {speed / limit:.0%} | {f'{speed / rivals:.1f} x' if rivals else ''} |"
        )

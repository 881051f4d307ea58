"""Loss curves with gradients, moments and weights in bfloat16, beside float32: a small model on CPU.

    python benchmarks/training_types.py TEXT [--steps 300] [--seeds 1] [--out build/training_types]

TEXT is trained on, but for 0.3 % of its documents, which give the validation loss. All runs with one seed have the same
initial weights and batches, and float32 products: they differ in what is stored only. "Rounded to nearest" replaces
the stochastic rounding of stored bfloat16 values. It is no option of a run, and shows what the rounding is for.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxlm.training import loop, metrics, step
from jaxlm.training.config import Data, Optimizer, Run

ROOT = Path(__file__).parents[1]
SHAPE = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 172,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True}  # fmt: skip
HALF: dict[str, Any] = {"grad_dtype": "bfloat16", "weight_dtype": "bfloat16", "moment_dtype": "bfloat16"}
NEAREST = ", rounded to nearest"
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "gradients": ("grad_dtype",),
    "moments": ("moment_dtype",),
    "weights": ("weight_dtype",),
    "weights" + NEAREST: ("weight_dtype",),
    "all": tuple(HALF),
    "all" + NEAREST: tuple(HALF),
}


def trained(base: Run, name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The metrics of a variant. A finished run is not repeated."""
    fields = {field: HALF[field] for field in VARIANTS[name]}
    moments = {"moment_dtype": fields.pop("moment_dtype", "float32")}
    out = folder / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    run = replace(base, out=out, seed=seed, optimizer=replace(base.optimizer, **moments), **fields)

    def nearest(x: jax.Array, key: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)

    if not (out / "model").exists():
        with mock.patch.object(step, "stochastic_round", nearest if name.endswith(NEAREST) else step.stochastic_round):
            loop.train(run)
    return metrics.read(out / "metrics.jsonl")


def smooth(losses: list[float], width: int = 4) -> np.ndarray:
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("build/training_types"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "shape.json").write_text(json.dumps(SHAPE))
    base = Run(
        shape=args.out / "shape.json", tokenizer=ROOT / "src/jaxlm/stories", dtype="float32",
        data=Data(train=(args.text,), valid_split=0.003), batch=8, length=128, steps=args.steps, log_every=5,
        eval_every=0, save_every=args.steps, optimizer=Optimizer(lr=args.lr),
    )  # fmt: skip
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):  # all variants of one seed, then the next
        for name in VARIANTS:
            lines = trained(base, name, seed, args.out)
            valid = next(line["valid_loss"] for line in reversed(lines) if "valid_loss" in line)
            losses = [line["loss"] for line in lines if "loss" in line]
            found.setdefault(name, []).append(valid)
            print(json.dumps({"name": name, "seed": seed, "valid_loss": valid}), flush=True)
            if not seed:
                curve = smooth(losses)
                steps = np.linspace(base.log_every, args.steps, len(losses))[-len(curve) :]
                axes.plot(steps, curve, label=name, linestyle=":" if name.endswith(NEAREST) else "-")
    print("| stored in bfloat16 | validation loss, nats per token | minus float32 |\n| --- | --- | --- |")
    for name, values in found.items():
        apart = statistics.mean(a - b for a, b in zip(values, found["float32"], strict=True))
        print(f"| {name} | {', '.join(f'{value:.4f}' for value in values)} | {apart:+.4f} |")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="What is stored in bfloat16")
    axes.legend()
    figure.savefig(args.out / "curves.png", dpi=120)


if __name__ == "__main__":
    main()

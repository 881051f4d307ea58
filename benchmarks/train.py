"""Training speed compared with torch: the same model, batches, optimizer and dtype, in one run.

    python benchmarks/train.py [--shape stories | FILE] [--batch 8] [--length 256] [--steps 6] [--rounds 2]
                               [--torch-python PYTHON] [--compile]
    python benchmarks/train.py --model FOLDER --lora [--rank 16] …      LoRA on all matrices, compared with PEFT

Rounds alternate between the two, so that noise of the machine affects both. The median step of the best round counts,
after two warm-up steps. MFU is analytic and causal (jaxlm.nn.flops: recomputed work does not count). Its peak is a
large float32 matrix product timed in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import Model, export, load, models
from jaxlm.data.packing import Batch
from jaxlm.devices import hardware
from jaxlm.nn import flops, lora, params
from jaxlm.training import optimizers, step
from jaxlm.training.config import Optimizer

STORIES = Path(__file__).parents[1] / "examples/stories/shape.json"
WARM = 2
ALPHA = 32.0


def batches(V: int, B: int, T: int, steps: int) -> dict[str, np.ndarray]:
    """Random rows: speed does not depend on their contents."""
    rows = np.random.default_rng(0).integers(0, V, (steps, B, T + 1)).astype(np.int32)
    pos = np.broadcast_to(np.arange(T, dtype=np.int32), (steps, B, T))
    return {"tokens": rows[..., :-1], "targets": rows[..., 1:], "pos": pos, "loss_mask": np.ones((steps, B, T), bool)}


def adapter_of(model: Model, rank: int) -> Any:
    rows = lora.targets(model.family.PARAMS, model.config, ("all-linear",))
    return lora.init(rows, model.config.L, rank, lora.scale(ALPHA, rank, False), jax.random.key(0))


def ours(model: Model, data: dict[str, np.ndarray], of: Optimizer, remat: str, rank: int) -> tuple[Any, Any]:
    """Seconds and loss of each step. A rank of 0 trains all weights."""
    period = len(params.period(model.config.windows))
    base = weights = params.stack(model.weights, period)
    if rank:
        weights = params.stack(adapter_of(model, rank), period)
    frozen = base if rank else None
    tx = optimizers.make_optimizer(of, len(data["tokens"]), params.letters(model.family.PARAMS, weights))
    state = jax.jit(lambda w: step.init_state(tx, w))(weights)
    take = jax.jit(step.make_step(model.family, model.config, tx, remat=remat), donate_argnums=0)
    seconds, losses = [], []
    for i in range(len(data["tokens"])):
        batch = Batch(**{name: jnp.asarray(a[i]) for name, a in data.items()})
        begin = time.perf_counter()
        state, metrics = take(state, batch, frozen)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def theirs(python: str, folder: Path) -> tuple[Any, Any]:
    done = subprocess.run([python, str(Path(__file__).with_name("train_torch.py")), str(folder)],
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["losses"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default=str(STORIES), help="a config.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remat", default="none", choices=list(step.REMAT))
    parser.add_argument("--torch-python", help="an interpreter with torch and transformers; default: this one")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--model", help="folder of a checkpoint, instead of random weights of --shape")
    parser.add_argument("--lora", action="store_true", help="train an adapter; compared with PEFT")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    args = parser.parse_args()
    raw = json.loads((Path(args.model) / "config.json" if args.model else Path(args.shape)).read_text())
    family = models.family_of(raw["model_type"])
    model = load(args.model, dtype="float32") if args.model else (
        Model.init(family, family.Config.from_hf(raw), jax.random.key(0))
    )  # fmt: skip
    rank = args.rank if args.lora else 0
    data, of = batches(model.config.V, args.batch, args.length, args.steps + WARM), Optimizer()
    best: dict[str, float] = {}
    peak, source = 0.0, ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(model, Path(temporary) / "model", config=raw).folder
        np.savez(folder / "batches.npz", **data)
        run = {name: getattr(of, name) for name in ("weight_decay", "b1", "b2", "eps", "clip")}
        run |= {"rates": [1e-4] * len(data["tokens"]), "evaluate": [], "at": [], "compile": args.compile}
        run |= {"rank": rank, "alpha": ALPHA}
        (folder / "run.json").write_text(json.dumps(run))
        for _ in range(args.rounds):
            peak, source = max((peak, source), hardware.peak(jax.devices()[0]))
            found = {"jaxlm": ours(model, data, of, args.remat, rank)}
            found["torch"] = theirs(args.torch_python or sys.executable, folder)
            np.testing.assert_allclose(found["jaxlm"][1][0], found["torch"][1][0], rtol=1e-4)  # the same first loss
            for name, (seconds, _) in found.items():
                best[name] = min(best.get(name, 1e9), statistics.median(seconds[WARM:]))
    size = params.num_elements(adapter_of(model, rank)) if rank else None
    cost = flops.training(family.PARAMS, model.config, args.length, size) * args.batch * args.length
    print(f"{params.count(family.PARAMS, model.config):,} parameters, {args.batch} x {args.length} tokens, float32, "
          f"jax {jax.__version__}, {source}, {cost / 1e9:.1f} GFLOP per step")  # fmt: skip
    print("| | s per step | tokens/s | MFU | vs. torch |\n| --- | --- | --- | --- | --- |")
    for name, seconds in best.items():
        speed = args.batch * args.length / seconds
        ratio = f"{best['torch'] / seconds:.2f} x"
        print(f"| {name} | {seconds:.3f} | {speed:,.0f} | {cost / seconds / peak:.1%} | {ratio} |")


if __name__ == "__main__":
    main()

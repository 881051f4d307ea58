"""A small training run compared with torch: WikiText-2, three seeds.

    python benchmarks/wikitext.py FOLDER [--torch-python PYTHON] [--steps 300] [--out build/wikitext]

FOLDER holds wikitext2_valid_tokenised.txt, which is trained on, and wikitext2_test_tokenised.txt, which is evaluated.
jaxlm runs as a user would run it (`training.loop.train`). torch gets the same initial weights, batches and learning
rates. The losses must agree within the spread of the seeds. The plot shows both curves.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxlm import export
from jaxlm.cli import main as jaxlm
from jaxlm.nn import params
from jaxlm.training import loop, metrics, optimizers
from jaxlm.training.config import Data, Optimizer, Run
from jaxlm.training.init_state import init_weights
from jaxlm.training.setup import set_up

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 128,
         "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
         "tie_word_embeddings": True}  # fmt: skip
SEEDS = (0, 1, 2)


def ours(run: Run) -> tuple[list[float], list[float], float]:
    """Training losses of the logged steps, losses on the test file, tokens per second."""
    loop.train(run)
    lines = metrics.read(run.out / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, [line["valid_loss"] for line in lines if "valid_loss" in line], statistics.median(speeds)


def theirs(run: Run, python: str) -> tuple[list[float], list[float], float]:
    """The same with torch."""
    setup = set_up(run)
    run, folder = setup.run, run.out / "torch"
    model = setup.model(params.unstack(init_weights(setup)))
    export(model, folder, config=SHAPE, force=True)
    for name, batches in (("batches", [setup.data.batch(i) for i in range(run.steps)]), ("test", setup.valid.once())):
        columns = zip(*batches, strict=True)
        fields = ("tokens", "targets", "pos", "loss_mask")
        np.savez(folder / f"{name}.npz", **{field: np.stack(rows) for field, rows in zip(fields, columns)})
    rate = optimizers.schedule(run.optimizer, run.steps)
    settings = {name: getattr(run.optimizer, name) for name in ("weight_decay", "b1", "b2", "eps", "clip")}
    settings |= {"rates": [float(rate(i)) for i in range(run.steps)], "compile": False, "evaluate": ["test"]}
    settings |= {"at": [run.steps]}
    (folder / "run.json").write_text(json.dumps(settings))
    script = str(Path(__file__).with_name("train_torch.py"))
    done = subprocess.run([python, script, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    speed = run.batch * run.length / statistics.median(found["seconds"])
    return found["losses"][run.log_every - 1 :: run.log_every], [row[0] for row in found["valid"]], speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/wikitext"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = (str(args.folder / f"wikitext2_{name}_tokenised.txt") for name in ("valid", "test"))
    (args.out / "shape.json").write_text(json.dumps(SHAPE))
    tokenizer = args.out / "tokenizer"
    if not tokenizer.exists():
        assert jaxlm(["tokenizer", "train", train, "--vocab-size", "1024", "--out", str(tokenizer)]) == 0
    found: dict[str, list] = {"jaxlm": [], "torch": []}
    for seed in SEEDS:  # in turns, so that noise of the machine affects both
        run = Run(
            out=args.out / f"seed{seed}", shape=args.out / "shape.json", tokenizer=tokenizer, seed=seed, batch=16,
            length=128, steps=args.steps, data=Data(train=(train,), valid=(test,)), log_every=5, eval_every=0,
            optimizer=Optimizer(lr=2e-3), save_every=args.steps,
        )  # fmt: skip
        found["jaxlm"].append(ours(run))
        found["torch"].append(theirs(run, args.torch_python))
    (args.out / "found.json").write_text(json.dumps(found))
    report(found, args.steps, args.out / "curves.png")


def report(found: dict[str, list], steps: int, path: Path) -> None:
    print("| | test loss (nats per token), 3 seeds | mean | spread | tokens/s |\n| --- | --- | --- | --- | --- |")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"jaxlm": {"color": "C0", "linewidth": 2.5, "alpha": 0.5}, "torch": {"color": "k", "linestyle": ":"}}
    for name, runs in found.items():
        last = [valid[-1] for _, valid, _ in runs]
        speed = statistics.median(speed for *_, speed in runs)
        print(f"| {name} | {', '.join(f'{x:.4f}' for x in last)} | {statistics.mean(last):.4f} | "
              f"{max(last) - min(last):.4f} | {speed:,.0f} |")  # fmt: skip
        for losses, valid, _ in runs:
            axes.plot(np.linspace(5, steps, len(losses)), losses, **styles[name])
            axes.plot(steps, valid[-1], "o" if name == "jaxlm" else "x", color=styles[name]["color"])
        axes.plot([], [], **styles[name], label=f"{name}: training, and final test")
    apart = [abs(a[1][-1] - b[1][-1]) for a, b in zip(*found.values())]
    each = max(abs(x - y) for a, b in zip(*found.values()) for x, y in zip(a[0], b[0]))
    print(f"same seed: test losses differ by {max(apart):.5f} at most, training losses by {each:.5f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="WikiText-2, 1.0 M parameters, three seeds")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

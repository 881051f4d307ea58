"""For tests of training runs: a tiny model, two texts, and a run of a dozen steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny_models import SIZES
from jaxlm.training.config import Data, Optimizer, Run

SHAPE = {"model_type": "llama", **SIZES, "vocab_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}
CLOCK = ("tokens_per_second", "mfu")  # metrics that depend on the machine


def write_files(folder: Path, shared: Path) -> dict[str, str]:
    """Writes a config.json and two texts. Returns the flags that name them and a tokenizer."""
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "ran", "home", "and", "a", "big", "red"]
    for name in ("train", "valid"):
        stories = [" ".join(rng.choice(words, 30)) for _ in range(40)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    return {"shape": str(folder / "shape.json"), "tokenizer": str(shared / "checkpoints/stories260K"),
            "train": str(folder / "train.txt"), "valid": str(folder / "valid.txt")}  # fmt: skip


def run_of(files: dict[str, str], out: Path, **fields: Any) -> Run:
    """Returns a run of 12 steps with checkpoints and evaluations; fields override it."""
    data = Data(train=(files["train"],), valid=(files["valid"],))
    sizes: dict[str, Any] = {"steps": 12, "batch": 4, "length": 32, "log_every": 2, "save_every": 5, "eval_every": 6}
    defaults = {"shape": Path(files["shape"]), "tokenizer": Path(files["tokenizer"]), "data": data, **sizes}
    return Run(out=out, **{**defaults, "optimizer": Optimizer(lr=1e-2), "eval_batches": 2, **fields})


def lines(out: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without the metrics that depend on the machine."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in found]


class Stopped(Exception):
    """Raised by `stopping_at`."""


def stopping_at(at: int) -> Any:
    """Returns a `log` that raises Stopped at the first metrics of a step."""

    def log(line: dict[str, Any]) -> None:
        if line["step"] == at and len(line) > 1 and "note" not in line:
            raise Stopped

    return log


def command(files: dict[str, str], out: Path) -> list[str]:
    """Returns `run_of` as flags."""
    return ["--shape", files["shape"], "--tokenizer", files["tokenizer"], "--data.train", files["train"],
            "--data.valid", files["valid"], "--optimizer.lr", "0.01", "--steps", "12", "--batch", "4", "--length", "32",
            "--log-every", "2", "--save-every", "5", "--eval-every", "6", "--eval-batches", "2",
            "--out", str(out)]  # fmt: skip

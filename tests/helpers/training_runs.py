"""For tests of training runs: a tiny model, its tokenizer, two texts, and a run of a dozen steps."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from helpers import checkpoint_files
from helpers.random_weights import draw
from helpers.tiny_models import SIZES
from jaxlm.devices import hardware
from jaxlm.models import llama3
from jaxlm.nn import params
from jaxlm.training import loop, metrics, resume
from jaxlm.training.config import Data, Optimizer, Run, to_dict
from jaxlm.training.setup import Setup

SHAPE = {"model_type": "llama", **SIZES, "vocab_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}
CLOCK = ("tokens_per_second", "loss_tokens_per_second", "mfu")  # metrics that depend on the machine


def write_files(folder: Path) -> dict[str, str]:
    """Writes a config.json, two texts, and a checkpoint with a tokenizer. Returns the flags that name them."""
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sat", "ran", "home", "and", "a", "big", "red"]
    for name in ("train", "valid"):
        stories = [" ".join(rng.choice(words, 30)) for _ in range(40)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    write_base(folder / "tokenizer", " ".join(words))
    names = {"shape": "shape.json", "tokenizer": "tokenizer", "train": "train.txt", "valid": "valid.txt"}
    return {name: str(folder / file) for name, file in names.items()}


BASE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_base(folder: Path, text: str = "") -> Path:
    """A Llama with random weights. Its tokenizer has a token per byte and per word of a text, and adds BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rows = params.tensors(llama3.PARAMS, llama3.Config.from_hf(BASE))
    checkpoint_files.folder(folder, BASE, {row.names[0]: draw(row.names[0], row.stored_shape) for row in rows})
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=BASE["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator([text], trainer)
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tok.save(str(folder / "tokenizer.json"))
    return folder


def run_of(files: dict[str, str], out: Path, **fields: Any) -> Run:
    """Returns a run of 12 steps with checkpoints and evaluations; fields override it."""
    data = Data(train=(files["train"],), valid=(files["valid"],))
    sizes: dict[str, Any] = {"steps": 12, "batch": 4, "length": 32, "log_every": 2, "save_every": 5, "eval_every": 6}
    defaults = {"shape": Path(files["shape"]), "tokenizer": Path(files["tokenizer"]), "data": data, **sizes}
    return Run(out=out, **{**defaults, "optimizer": Optimizer(lr=1e-2), "eval_batches": 2, **fields})


@contextmanager
def quick_runs() -> Iterator[None]:
    """Runs write an empty loss.png (plots: test_metrics.py) and measure the CPU's speed, for MFU, with a small matrix.

    Both would take longer than a dozen steps.
    """
    small = partial(hardware.peak, sizes=(16,))
    plot = mock.patch.object(metrics, "plot_loss", lambda lines, path, title: path.touch())
    with plot, mock.patch.object(hardware, "peak", small):
        yield


def program_key(setup: Setup) -> tuple[Any, ...]:
    """Returns all that the first state and the programs of a run depend on: its learning rate, the fields that must
    stay when it resumes except for its data, the architecture and the mesh."""
    fields = resume.flatten({**to_dict(setup.run), "data": {}})
    free = set(resume.MUTABLE_FIELDS) - {"optimizer.lr", "remat"}
    fixed = {name: value for name, value in fields.items() if name not in free}
    return json.dumps(fixed), setup.config, setup.mesh


@contextmanager
def shared_programs() -> Iterator[None]:
    """Equal runs share their compiled programs and their first state. To trace and compile them is most of a short run.

    A run that resumes still reads its state from the checkpoint.
    """
    make, start = loop.Loop.__init__, loop.init_state
    programs: dict[Any, Any] = {}
    states: dict[Any, Any] = {}

    def init(self: Any, setup: Setup, *rest: Any) -> None:
        make(self, setup, *rest)
        own = self.step, self.loss, self.unstack
        self.step, self.loss, self.unstack = programs.setdefault(program_key(setup), own)

    def init_state(setup: Setup) -> Any:
        key = program_key(setup)
        if key not in states:
            states[key] = jax.device_get(start(setup))  # a copy, for the first step takes over the arrays
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), states[key], setup.state)

    with mock.patch.object(loop.Loop, "__init__", init), mock.patch.object(loop, "init_state", init_state):
        yield


def lines(out: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without the metrics that depend on the machine."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in found]


class Stopped(BaseException):
    """Raised by `stopping_at`. Like a kill, and other than an Exception, it ends a run without another checkpoint."""


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

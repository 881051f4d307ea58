"""One of two processes of a distributed run: python train_pair_script.py PORT INDEX FOLDER OUT MESH [adapter|chats]."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxlm
from helpers.training_runs import Stopped, lines, run_of, stopping_at
from jaxlm.devices import distributed
from jaxlm.training import loop
from jaxlm.training.config import Data, LoraOptions, Run


def run_for(folder: Path, out: Path, mesh: str, what: str = "") -> Run:
    """Returns the run of both processes, or of one alone: of a new model, of an adapter, or of a base model on chats
    with new tokens, in a streamed mixture with texts."""
    names = {"shape": "shape.json", "tokenizer": "tokenizer", "train": "train.txt", "valid": "valid.txt"}
    files = {name: str(folder / file) for name, file in names.items()}
    run = run_of(files, out, batch=8, steps=6, save_every=4, eval_every=3, mesh=mesh)
    if what == "chats":
        train = (f"{folder / 'chats.jsonl'}=0.7", f"{files['train']}=0.3")
        data = Data(train, (files["valid"],), streaming=True, shuffle_buffer=7)
        base = {"model": str(folder / "full"), "shape": None, "tokenizer": None, "chat_template": "chatml"}
        return replace(run, **base, length=96, data=data)
    if what == "adapter":
        lora = LoraOptions(rank=4, dropout=0.1)
        return replace(run, shape=None, tokenizer=None, model=files["tokenizer"], method="lora", lora=lora)
    return replace(run, samples=("the cat",), sample_tokens=3)


def assert_same_run(folder: Path, both: Path, mesh: str, what: str = "") -> Path:
    """Repeats the run `both` of two processes in this one. Returns its folder.

    Metrics and weights agree to float32 rounding: only the order of sums over devices differs. An empty mesh is one
    device.
    """
    one = folder / "one"
    loop.train(run_for(folder, one, mesh, what))
    for line, other in zip(lines(both), lines(one), strict=True):
        assert line.keys() == other.keys()
        numbers = [name for name, value in line.items() if not isinstance(value, str)]
        np.testing.assert_allclose([line[n] for n in numbers], [other[n] for n in numbers], rtol=1e-4)
    if what != "adapter":
        jax.tree.map(assert_near, *(jaxlm.load(out / "model").weights for out in (both, one)))
    return one


def assert_near(a: Any, b: Any) -> None:
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def main(port: str, index: str, folder: str, out: str, mesh: str, what: str = "") -> None:
    distributed.start(f"127.0.0.1:{port}", 2, int(index))
    distributed.gather("here")
    run = run_for(Path(folder), Path(out), mesh, what)
    if what:  # interrupted after a checkpoint
        try:
            loop.train(replace(run, save_every=2), stopping_at(4))
            raise AssertionError("the run was not interrupted")
        except Stopped:
            pass
    loop.train(run)


if __name__ == "__main__":
    main(*sys.argv[1:])

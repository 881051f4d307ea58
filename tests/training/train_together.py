"""One of two processes that train as one: python together.py PORT INDEX FOLDER OUT MESH."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.runs import run_of

from jaxlm import processes
from jaxlm.training import loop


def main(port: str, index: str, folder: str, out: str, mesh: str) -> None:
    processes.start(f"127.0.0.1:{port}", 2, int(index))
    processes.gather("here")
    names = {"shape": "shape.json", "tokenizer": "tokenizer", "train": "train.txt", "valid": "valid.txt"}
    files = {name: str(Path(folder) / file) for name, file in names.items()}
    run = run_of(files, Path(out), batch=8, steps=6, save_every=4, eval_every=3, mesh=mesh)
    loop.train(replace(run, samples=("the cat",), sample_tokens=3))


if __name__ == "__main__":
    main(*sys.argv[1:])

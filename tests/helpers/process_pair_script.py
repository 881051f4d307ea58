"""One of the two processes of test_distributed.py: python process_pair_script.py PORT INDEX FOLDER MESH TRAIN_MESH.

One pair does all that the tests compare: starting it costs more than what it does. FOLDER holds the checkpoints `model`
and `other` and the files of a training run.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxlm
from helpers.train_pair_script import run_for
from helpers.training_runs import quick_runs
from jaxlm.cli import main as command
from jaxlm.training import loop

PROMPTS = [[1, 5, 9], [4, 4]]
# One prompt at a time, so that the compiled programs are those of the command.
GREEDY = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "batch_size": 1}
DRAWN = {**GREEDY, "temperature": 1.0}
TEXT = ["--max-tokens", "4", "--temperature", "0", "--ignore-eos"]


def error_of(act: Callable[[], Any]) -> str | None:
    """Returns the message of the ValueError that `act` raises."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


def main(port: str, index: str, folder: str, mesh: str, train_mesh: str) -> None:
    files, here = Path(folder), int(index)
    joint = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", index]
    # The command comes first: its flags start jax.distributed. Only the coordinator has a prompt on stdin.
    sys.stdin = io.StringIO("Once upon a time") if here == 0 else None  # type: ignore
    assert command(["generate", "-", "-m", str(files / "model"), *TEXT, *joint]) == 0

    model = jaxlm.load(files / "model", mesh=mesh)
    q = model.weights["layers"][0]["q"]
    blocks = {str(shard.index): shard.data.nbytes for shard in q.addressable_shards}
    drawn = jaxlm.generate(model, PROMPTS, **DRAWN)
    result = {
        "part": sum(blocks.values()) / q.nbytes,
        "texts": [text.tokens for text in jaxlm.generate(model, PROMPTS, **GREEDY)],
        "drawn": [text.tokens for text in drawn],
        "seed": drawn[0].seed,
        "prompts": error_of(lambda: jaxlm.generate(model, [1, 5 + here])),
        "models": error_of(lambda: jaxlm.load(files / ("model", "other")[here], mesh=mesh)),
    }
    jaxlm.export(model, files / "exported")
    with quick_runs():
        loop.train(run_for(files, files / "both", train_mesh))
    (files / f"{index}.json").write_text(json.dumps(result))
    # The last one, for an error ends the process. The coordinator ends first: the other one still prints its error.
    time.sleep(2 * here)
    command(["generate", "Once", "-m", str(files / "model"), "--mesh", "model=4", *joint])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The program of each process in test_distributed.py: python process_pair_script.py PORT INDEX FOLDER OUT MESH."""

import json
import sys
from pathlib import Path

import jaxlm
from jaxlm.devices import distributed

PROMPTS = [[1, 5, 9], [4, 4]]
GREEDY = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
DRAWN = {"max_tokens": 6, "temperature": 1.0, "ignore_eos": True}


def main(port: str, index: str, folder: str, out: str, mesh: str) -> None:
    distributed.start(f"127.0.0.1:{port}", 2, int(index))
    distributed.gather("here")
    model = jaxlm.load(folder, mesh=mesh)
    q = model.weights["layers"][0]["q"]
    blocks = {str(shard.index): shard.data.nbytes for shard in q.addressable_shards}
    drawn = jaxlm.generate(model, PROMPTS, **DRAWN)
    result = {
        "part": sum(blocks.values()) / q.nbytes,
        "texts": [text.tokens for text in jaxlm.generate(model, PROMPTS, **GREEDY)],
        "drawn": [text.tokens for text in drawn],
        "seed": drawn[0].seed,
    }
    jaxlm.export(model, Path(out) / "exported")
    (Path(out) / f"{index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

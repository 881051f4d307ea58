"""What each of two processes does in test_processes.py: python together.py PORT INDEX FOLDER OUT."""

import json
import sys
from pathlib import Path

import jaxlm
from jaxlm import processes


def main(port: str, index: str, folder: str, out: str) -> None:
    processes.start(f"127.0.0.1:{port}", 2, int(index))
    told = {}
    for mesh in ("model=8", "data=2,model=4"):
        model = jaxlm.load(folder, mesh=mesh)
        q = model.weights["layers"][0]["q"]
        blocks = {str(shard.index): shard.data.nbytes for shard in q.addressable_shards}
        texts = jaxlm.generate(model, [[1, 5, 9], [4, 4]], max_tokens=6, temperature=0, ignore_eos=True)
        told[mesh] = {"texts": [text.tokens for text in texts], "part": sum(blocks.values()) / q.nbytes}
        if mesh == "model=8":
            drawn = jaxlm.generate(model, [1, 5, 9], max_tokens=6, temperature=1.0, ignore_eos=True)
            told["drawn"] = {"tokens": drawn.tokens, "seed": drawn.seed}
            jaxlm.export(model, Path(out) / "exported")
    (Path(out) / f"{index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])

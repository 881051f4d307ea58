"""Makes the recordings in this folder from transformers: `PYTHONPATH=src:tests python tests/recordings/make.py`, or
only those whose names follow. New cases belong at the end, because the place of a case is its seed.

One npz per case: config.json as transformers writes it, token ids, positions, float32 logits at some of them, and the
rotary frequencies. Weights are not stored: helpers.random_weights draws them again.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from oracle import reference
from oracle.cases import TIED, WIDE_YARN, gemma_rope, llama3_rope, rope, shape, yarn
from oracle.reference import FULL, SLIDING
from oracle.test_frequencies import oracle_ropes

KEPT = [0, 1, 4, 7, 12, 20, 31, 32, 33, 40, 51, 63]  # columns whose logits are stored
CASES = {
    "llama3_scaled_tied": ("llama3", shape(N=6, K=2, D=48, **TIED, **llama3_rope(32.0))),
    "llama3_yarn_width_apart": ("llama3", shape(N=3, K=1, head_dim=26, **yarn())),
    "qwen3_one_kv_head": ("qwen3", shape(L=3, N=4, K=1, head_dim=12, **rope("default", 1e6))),
    "qwen3_yarn_mscale_tied": ("qwen3", shape(N=5, K=5, head_dim=22, **TIED, **yarn(mscale=1.2, mscale_all_dim=0.7))),
    "olmo2_three_heads": ("olmo2", shape(N=3, K=1, **rope("default", 5e5))),
    "olmo2_linear_tied": ("olmo2", shape(L=3, N=8, K=4, D=64, **TIED, **rope("linear", factor=4.0))),
    "gemma3_pattern": ("gemma3", shape(L=7, layer_types=None, sliding_window=8,
                                       **gemma_rope(rope_type="linear", factor=8.0))),
    "gemma3_kinds_untied": ("gemma3", shape(L=3, N=3, K=3, layer_types=[FULL, SLIDING, SLIDING], sliding_window=5,
                                            tie_word_embeddings=False)),
    "gemma3_one_layer": ("gemma3", shape(L=1, K=1, head_dim=32, layer_types=[SLIDING], sliding_window=8)),
    "olmo3_yarn": ("olmo3", shape(L=4, N=6, K=2, layer_types=None, **gemma_rope(5e5, 5e5, **WIDE_YARN))),
    "smollm3_pattern": ("smollm3", shape(L=5, N=3, K=1, no_rope_layers=None, use_sliding_window=True,
                                         sliding_window=9)),
}  # fmt: skip


def record(family: str, fields: dict, seed: int) -> dict[str, np.ndarray]:
    oracle = reference.build(family, seed=seed, **fields)
    tokens, pos = reference.near_and_far()
    with tempfile.TemporaryDirectory() as folder:
        oracle.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    config["architectures"] = [type(oracle).__name__]
    arrays = {
        "config": np.array(json.dumps(config)),
        "seed": np.array(seed),
        "tokens": tokens.astype(np.uint8),
        "pos": pos.astype(np.int16),
        "kept": np.array(KEPT, np.uint8),
        "logits": reference.logits(oracle, tokens, pos)[:, KEPT],
        "deviation": reference.logits(oracle, tokens, pos).std(),
    }
    for kind, (radians, amplitude) in oracle_ropes(oracle.config).items():
        arrays |= {f"{kind}_radians": radians, f"{kind}_amplitude": np.array(amplitude)}
    assert reference.score_deviation(oracle, tokens, pos) >= 1
    return arrays


if __name__ == "__main__":
    with reference.quiet():
        for seed, (name, (family, fields)) in enumerate(CASES.items()):
            if name in (sys.argv[1:] or CASES):
                np.savez_compressed(Path(__file__).parent / f"{name}.npz", **record(family, fields, seed))

"""The configurations that are compared with transformers: what is saved, and a fault that must show."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from oracle import faults
from oracle.faults import Fault
from oracle.reference import FULL, SLIDING


class Case(NamedTuple):
    """A model of `family` with these config fields. old: rewritten to the older spelling of rope; shards: saved in
    small files; stored: dtype of the files; change: of the drawn weights; drop: fields to remove from config.json."""

    family: str
    name: str
    fields: dict[str, Any]
    fault: Fault
    old: bool = False
    shards: bool = False
    stored: str = "float32"
    change: Callable[[str, np.ndarray], np.ndarray] | None = None
    drop: tuple[str, ...] = ()


def shape(L: int = 2, N: int = 4, K: int = 2, D: int = 48, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "hidden_size": D,
        **more,
    }


def rope(kind: str, theta: float = 10_000.0, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


def llama3_rope(factor: float) -> dict[str, Any]:
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return rope("llama3", 500_000.0, factor=factor, **numbers)


def yarn(**numbers: Any) -> dict[str, Any]:
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 512, **numbers})


def gemma_rope(theta: float = 1_000_000.0, local: float = 10_000.0, **wide: Any) -> dict[str, Any]:
    wide = {"rope_type": "default", **wide, "rope_theta": theta}
    return {"rope_parameters": {FULL: wide, SLIDING: {"rope_type": "default", "rope_theta": local}}}


def faint(name: str, value: np.ndarray) -> np.ndarray:
    """Embeddings so small that a norm's epsilon matters."""
    return value * np.float32(4e-3) if "embed_tokens" in name else value


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ROPES = [
    ("linear", rope("linear", factor=4.0), faults.rope(type="default"), False),
    ("linear, old spelling", rope("linear", 20_000.0, factor=2.0), faults.rope(factor=1.0), True),
    ("llama3, factor 8, old spelling", llama3_rope(8.0), faults.rope(type="default"), True),
    ("llama3, factor 32", llama3_rope(32.0), faults.rope(factor=8.0), False),
    ("yarn", yarn(), faults.rope(amplitude=1.0), False),
    ("yarn, old spelling", yarn(factor=2.0), faults.rope(type="linear"), True),
    ("yarn, mscale", yarn(mscale=1.2, mscale_all_dim=0.7), faults.rope(amplitude=0.1 * np.log(4) + 1), False),
    ("yarn, mscales alike", yarn(mscale=1.0, mscale_all_dim=1.0), faults.rope(amplitude=0.1 * np.log(4) + 1), True),
    ("yarn, attention_factor", yarn(attention_factor=1.3), faults.rope(amplitude=1.0), False),
    ("yarn, ramp", yarn(beta_fast=16.0, beta_slow=2.0, truncate=False), faults.rope(truncate=True), False),
]


def ropes(family: str, *names: str, **fields: Any) -> list[Case]:
    """A case for each of these rope sections, or for all."""
    chosen = [row for row in ROPES if not names or row[0] in names]
    return [Case(family, name, {**shape(), **section, **fields}, fault, old) for name, section, fault, old in chosen]


LLAMA3 = [
    Case("llama3", "untied", shape(), faults.skipped_layer),
    Case("llama3", "tied, 3 heads", shape(N=3, K=1, **TIED), faults.tied_head_ignored),
    Case("llama3", "untied, 3 kv heads", shape(N=3, K=3), faults.tied_by_mistake),
    Case("llama3", "head width apart", shape(N=3, K=3, head_dim=26), faults.interleaved),
    Case("llama3", "6 heads on 3", shape(N=6, K=3, D=96), faults.rolled_kv_heads),
    Case("llama3", "one layer, one kv head", shape(L=1, N=8, K=1, D=32), faults.norms_forgotten),
    Case("llama3", "epsilon", shape(rms_norm_eps=1e-5), faults.config(eps=1e-6), change=faint),
    Case("llama3", "bfloat16, sharded", shape(L=3, **TIED), faults.swapped_norms, shards=True, stored="bfloat16"),
    Case("llama3", "float16, 4 layers", shape(L=4), faults.skipped_layer, shards=True, stored="float16", old=True),
    *ropes("llama3"),
]
QWEN3 = [
    Case("qwen3", "untied", shape(head_dim=16), faults.norms_forgotten),
    Case("qwen3", "tied, old spelling", shape(head_dim=16, **TIED), faults.tied_head_ignored, old=True),
    Case("qwen3", "5 heads of width 22", shape(N=5, K=5, head_dim=22), faults.interleaved),
    Case("qwen3", "7 heads on 1", shape(N=7, K=1, head_dim=12), faults.weights("q_norm", lambda w: w * 0 + 1)),
    Case("qwen3", "one layer", shape(L=1, N=6, K=2, head_dim=32), faults.rolled_kv_heads),
    Case("qwen3", "epsilon", shape(rms_norm_eps=1e-5, head_dim=8), faults.config(eps=1e-6), change=faint),
    Case("qwen3", "theta", shape(head_dim=32, **rope("default", 1e6)), faults.rope(theta=1e4), old=True),
    Case("qwen3", "head_dim left out", shape(head_dim=128), faults.skipped_layer, drop=("head_dim",)),
    Case("qwen3", "bfloat16, sharded", shape(L=3, D=96), faults.swapped_norms, shards=True, stored="bfloat16"),
    Case("qwen3", "float16", shape(L=4, **TIED), faults.skipped_layer, stored="float16"),
    *ropes("qwen3", "linear", "llama3, factor 32", "yarn", "yarn, old spelling", "yarn, mscale", head_dim=24),
]
OLMO2 = [
    Case("olmo2", "untied", shape(), faults.norm_of_each_head),
    Case("olmo2", "tied, 3 heads", shape(N=3, K=1, **TIED), faults.tied_head_ignored),
    Case("olmo2", "untied, 3 kv heads, old spelling", shape(N=3, K=3), faults.tied_by_mistake, old=True),
    Case("olmo2", "6 heads on 3", shape(N=6, K=3, D=96), faults.rolled_kv_heads),
    Case("olmo2", "one layer, one kv head", shape(L=1, N=8, K=1, D=32), faults.norms_forgotten),
    Case("olmo2", "epsilon", shape(rms_norm_eps=1e-6), faults.config(eps=1e-5), change=faint),
    Case("olmo2", "theta", shape(**rope("default", 5e5)), faults.rope(theta=1e4), old=True),
    Case("olmo2", "bfloat16, sharded", shape(L=3), faults.swapped_norms, shards=True, stored="bfloat16"),
    Case("olmo2", "float16", shape(L=4, **TIED), faults.skipped_layer, stored="float16"),
    Case("olmo2", "permutation", shape(N=2, K=2), faults.interleaved),
    *ropes("olmo2", "linear, old spelling", "llama3, factor 8, old spelling", "yarn", "yarn, mscale"),
]
WIDE_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
OLMO3 = [
    Case("olmo3", "pattern 4", shape(L=5, layer_types=None), faults.window_off),
    Case("olmo3", "yarn", shape(L=4, layer_types=None, **gemma_rope(5e5, 5e5, **WIDE_YARN)), faults.scaling_everywhere),
    Case(
        "olmo3", "yarn, old spelling", shape(**gemma_rope(5e5, 5e5, **WIDE_YARN)), faults.rope(type="default"), old=True
    ),
    Case("olmo3", "kinds out of order", shape(L=3, N=3, K=1, layer_types=[FULL, SLIDING, SLIDING]), faults.window(-1)),
    Case("olmo3", "two thetas", shape(**gemma_rope(5e5, 2e4)), faults.local_theta_is_global),
    Case("olmo3", "thetas left out", shape(), faults.rope(theta=1e4), drop=("rope_parameters",)),
    Case("olmo3", "6 heads on 3", shape(N=6, K=3, D=96), faults.norm_of_each_head),
    Case("olmo3", "bfloat16, tied, sharded", shape(**TIED), faults.swapped_norms, shards=True, stored="bfloat16"),
]
SMOLLM3 = [
    Case("smollm3", "pattern 4", shape(L=5, no_rope_layers=None), faults.rope_in_every_layer),
    Case("smollm3", "listed", shape(L=3, N=3, K=1, no_rope_layers=[0, 1, 1]), faults.rope_in_the_other_layers),
    Case(
        "smollm3",
        "windows, every second",
        shape(L=3, no_rope_layers=None, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7),
        faults.window_off,
    ),
    Case(
        "smollm3",
        "windows with RoPE",
        shape(layer_types=[SLIDING, FULL], use_sliding_window=True, sliding_window=7),
        faults.window(1),
    ),
    Case("smollm3", "untied", shape(**UNTIED), faults.tied_by_mistake),
    Case("smollm3", "theta left out", shape(), faults.rope(theta=1e4), drop=("rope_parameters",)),
    *ropes("smollm3", "yarn, old spelling", no_rope_layers=[1, 0]),
]
GEMMA3 = [
    Case("gemma3", "pattern 6", shape(L=7, layer_types=None), faults.window_off),
    Case("gemma3", "pattern 6, old spelling", shape(L=6, layer_types=None), faults.local_theta_is_global, old=True),
    Case("gemma3", "pattern 2", shape(L=3, layer_types=None, sliding_window_pattern=2), faults.window(1), old=True),
    Case("gemma3", "kinds out of order", shape(L=3, layer_types=[FULL, SLIDING, SLIDING]), faults.window(-1)),
    Case("gemma3", "linear factor", shape(**gemma_rope(rope_type="linear", factor=8.0)), faults.rope(type="default")),
    Case("gemma3", "linear factor, old", shape(L=6, layer_types=None, **gemma_rope(rope_type="linear", factor=8.0)),
         faults.scaling_everywhere, old=True),
    Case("gemma3", "window 1", shape(sliding_window=1), faults.window(1)),
    Case("gemma3", "window 31", shape(sliding_window=31), faults.window_off),
    Case("gemma3", "one local layer", shape(L=1, layer_types=[SLIDING], sliding_window=5), faults.window(1)),
    Case("gemma3", "one global layer", shape(L=1, layer_types=[FULL]), faults.rope(theta=1e4)),
    Case("gemma3", "untied", shape(N=3, K=1, **UNTIED), faults.tied_by_mistake),
    Case("gemma3", "tied, 3 kv heads", shape(N=3, K=3), faults.tied_head_ignored),
    Case("gemma3", "norms", shape(N=6, K=3, D=96), faults.norm_without_one),
    Case("gemma3", "q norm", shape(head_dim=32), faults.q_norm_forgotten),
    Case("gemma3", "query scale", shape(query_pre_attn_scalar=9, head_dim=24), faults.query_scale_of_width),
    Case("gemma3", "embedding scale", shape(D=32), faults.embedding_unscaled),
    Case("gemma3", "epsilon", shape(rms_norm_eps=1e-5), faults.config(eps=1e-6), change=faint),
    Case("gemma3", "bfloat16, sharded", shape(L=3, layer_types=None), faults.swapped_norms, shards=True,
         stored="bfloat16"),
    Case("gemma3", "float16", shape(N=8, K=1, D=64), faults.skipped_layer, stored="float16"),
    Case("gemma3", "permutation, theta", shape(**gemma_rope(5e5, 2e4)), faults.interleaved),
]  # fmt: skip
CASES = LLAMA3 + QWEN3 + OLMO2 + OLMO3 + SMOLLM3 + GEMMA3

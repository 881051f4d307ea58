"""The configs of published models (jaxlm/bench/published.py), their params.json, parameter counts, and the names of
their tensors. tests/models/test_counts.py compares them with the published files."""

from typing import Any

from jaxlm.bench.published import MODELS

# name in ../shared/data/configs (the pretrained model where there are both) -> hub id in bench/published.py
IDS = {
    "meta-llama-Meta-Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "meta-llama-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "meta-llama-Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "meta-llama-Llama-3.3-70B": "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama-Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "meta-llama-Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Qwen-Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    "Qwen-Qwen3-1.7B": "Qwen/Qwen3-1.7B",
    "Qwen-Qwen3-4B": "Qwen/Qwen3-4B",
    "Qwen-Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen-Qwen3-14B": "Qwen/Qwen3-14B",
    "Qwen-Qwen3-32B": "Qwen/Qwen3-32B",
    "allenai-OLMo-2-0425-1B": "allenai/OLMo-2-0425-1B-Instruct",
    "allenai-OLMo-2-1124-7B": "allenai/OLMo-2-1124-7B-Instruct",
    "allenai-OLMo-2-1124-13B": "allenai/OLMo-2-1124-13B-Instruct",
    "allenai-OLMo-2-0325-32B": "allenai/OLMo-2-0325-32B-Instruct",
    "google-gemma-3-270m": "google/gemma-3-270m",
    "google-gemma-3-1b": "google/gemma-3-1b-pt",
    "google-gemma-3-4b": "google/gemma-3-4b-pt",
    "google-gemma-3-12b": "google/gemma-3-12b-pt",
    "google-gemma-3-27b": "google/gemma-3-27b-pt",
}
CONFIGS = {name: MODELS[id].config for name, id in IDS.items()}
MIXTURE_OF_EXPERTS = {
    **CONFIGS["Qwen-Qwen3-8B"], "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip

# Language models of the vision-language Gemmas: keras-hub's presets count 262,144 rows of the embedding, the hub's
# checkpoints have 262,208.
COUNTS = {
    "meta-llama-Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama-Llama-3.1-8B": 8_030_261_248,
    "meta-llama-Llama-3.1-70B": 70_553_706_496,
    "meta-llama-Llama-3.3-70B": 70_553_706_496,
    "meta-llama-Llama-3.2-1B": 1_235_814_400,
    "meta-llama-Llama-3.2-3B": 3_212_749_824,
    "Qwen-Qwen3-0.6B": 596_049_920,
    "Qwen-Qwen3-1.7B": 1_720_574_976,
    "Qwen-Qwen3-4B": 4_022_468_096,
    "Qwen-Qwen3-8B": 8_190_735_360,
    "Qwen-Qwen3-14B": 14_768_307_200,
    "Qwen-Qwen3-32B": 32_762_123_264,
    "allenai-OLMo-2-0425-1B": 1_484_916_736,
    "allenai-OLMo-2-1124-7B": 7_298_617_344,
    "allenai-OLMo-2-1124-13B": 13_716_198_400,
    "allenai-OLMo-2-0325-32B": 32_234_279_936,
    "google-gemma-3-270m": 268_098_176,
    "google-gemma-3-1b": 999_885_952,
    "google-gemma-3-4b": 3_880_099_328 + 64 * 2560,
    "google-gemma-3-12b": 11_765_788_416 + 64 * 3840,
    "google-gemma-3-27b": 27_009_002_240 + 64 * 5376,
}

# Models whose config.json is not among the published files: the total of their safetensors files, without a tied head.
MORE_COUNTS = {
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "allenai/Olmo-3-32B-Think": 32_233_522_176,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}


def _params(D: int, L: int, N: int, multiplier: float, multiple: int, scaled: bool = True) -> dict[str, Any]:
    return {"dim": D, "n_layers": L, "n_heads": N, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5,
            "ffn_dim_multiplier": multiplier, "multiple_of": multiple, "rope_theta": 500000.0,
            "use_scaled_rope": scaled}  # fmt: skip


# Meta's params.json of the models above.
META_PARAMS = {
    "meta-llama-Meta-Llama-3-8B": _params(4096, 32, 32, 1.3, 1024, scaled=False),
    "meta-llama-Llama-3.1-8B": _params(4096, 32, 32, 1.3, 1024),
    "meta-llama-Llama-3.1-70B": _params(8192, 80, 64, 1.3, 4096),
    "meta-llama-Llama-3.2-1B": _params(2048, 16, 32, 1.5, 256),
    "meta-llama-Llama-3.2-3B": _params(3072, 28, 24, 1.0, 256),
}

# Of a layer: the name of each tensor and its shape. q and k are the widths of all heads and of all kv heads.
ATTENTION = {"self_attn.q_proj": "q D", "self_attn.k_proj": "k D", "self_attn.v_proj": "k D", "self_attn.o_proj": "D q"}
MLP = {"mlp.gate_proj": "F D", "mlp.up_proj": "F D", "mlp.down_proj": "D F"}
QK_NORMS = {"self_attn.q_norm": "H", "self_attn.k_norm": "H"}
PRE_NORMS = {"input_layernorm": "D", "post_attention_layernorm": "D"}
MLP_NORMS = {"pre_feedforward_layernorm": "D", "post_feedforward_layernorm": "D"}
LAYER_TENSORS = {
    "llama": ATTENTION | MLP | PRE_NORMS,
    "qwen3": ATTENTION | MLP | PRE_NORMS | QK_NORMS,
    "olmo2": ATTENTION | MLP | {"self_attn.q_norm": "q", "self_attn.k_norm": "k", "post_attention_layernorm": "D",
                                "post_feedforward_layernorm": "D"},
    "gemma3_text": ATTENTION | MLP | PRE_NORMS | QK_NORMS | MLP_NORMS,
}  # fmt: skip


def tensor_shapes(config: dict[str, Any], prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a checkpoint. prefix: in front of all but the head."""
    D, N, K = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim", D // N)
    sizes = {"D": D, "F": config["intermediate_size"], "H": H, "q": N * H, "k": K * H}
    top = (config["vocab_size"], D)
    shapes = {f"{prefix}embed_tokens.weight": top, f"{prefix}norm.weight": (D,), "lm_head.weight": top}
    for layer in range(config["num_hidden_layers"]):
        for name, letters in LAYER_TENSORS[config["model_type"]].items():
            shapes[f"{prefix}layers.{layer}.{name}.weight"] = tuple(sizes[letter] for letter in letters.split())
    return shapes

"""The sizes of published models as config.json and params.json state them, their parameter counts, and the names of
their tensors. tests/models/test_counts.py compares them with the published files."""

from typing import Any

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip


def _config(kind: str, D: int, F: int, L: int, N: int, K: int, V: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
            "num_attention_heads": N, "num_key_value_heads": K, "vocab_size": V, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **fields}  # fmt: skip


def _llama(D: int, F: int, L: int, N: int, factor: float = 0.0, **fields: Any) -> dict[str, Any]:
    scaling = {**LLAMA3_ROPE, "factor": factor} if factor else None
    common = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "rope_scaling": scaling,
              "max_position_embeddings": 131072 if factor else 8192}  # fmt: skip
    return _config("llama", D, F, L, N, 8, 128256, **common, **fields)


def _qwen(D: int, F: int, L: int, N: int, tied: bool) -> dict[str, Any]:
    return _config("qwen3", D, F, L, N, 8, 151936, head_dim=128, rope_theta=1000000, tie_word_embeddings=tied,
                   max_position_embeddings=40960, hidden_act="silu")  # fmt: skip


def _olmo(D: int, F: int, L: int, N: int, K: int) -> dict[str, Any]:
    return _config("olmo2", D, F, L, N, K, 100352, rope_theta=500000, max_position_embeddings=4096, hidden_act="silu")


def _gemma(D: int, F: int, L: int, N: int, K: int, V: int = 262144, **fields: Any) -> dict[str, Any]:
    """A text model: five layers of sliding-window attention, then one of full attention."""
    common = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
              "rope_theta": 1000000, "rope_local_base_freq": 10000, "max_position_embeddings": 32768,
              "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}  # fmt: skip
    return _config("gemma3_text", D, F, L, N, K, V, **{**common, **fields})


def _vision(*sizes: int, **fields: Any) -> dict[str, Any]:
    """A vision-language model, whose text model has rope scaling and a longer context."""
    linear = {"rope_type": "linear", "factor": 8.0}
    text = _gemma(*sizes, 262208, rope_scaling=linear, sliding_window=1024, max_position_embeddings=131072, **fields)
    return {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1}}


CONFIGS = {
    "meta-llama-Meta-Llama-3-8B": _llama(4096, 14336, 32, 32),
    "meta-llama-Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8.0),
    "meta-llama-Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8.0),
    "meta-llama-Llama-3.3-70B": _llama(8192, 28672, 80, 64, 8.0, head_dim=128),
    "meta-llama-Llama-3.2-1B": _llama(2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True),
    "meta-llama-Llama-3.2-3B": _llama(3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True),
    "Qwen-Qwen3-0.6B": _qwen(1024, 3072, 28, 16, True),
    "Qwen-Qwen3-1.7B": _qwen(2048, 6144, 28, 16, True),
    "Qwen-Qwen3-4B": _qwen(2560, 9728, 36, 32, True),
    "Qwen-Qwen3-8B": _qwen(4096, 12288, 36, 32, False),
    "Qwen-Qwen3-14B": _qwen(5120, 17408, 40, 40, False),
    "Qwen-Qwen3-32B": _qwen(5120, 25600, 64, 64, False),
    "allenai-OLMo-2-0425-1B": _olmo(2048, 8192, 16, 16, 16),
    "allenai-OLMo-2-1124-7B": _olmo(4096, 11008, 32, 32, 32),
    "allenai-OLMo-2-1124-13B": _olmo(5120, 13824, 40, 40, 40),
    "allenai-OLMo-2-0325-32B": _olmo(5120, 27648, 64, 40, 8),
    "google-gemma-3-270m": _gemma(640, 2048, 18, 4, 1),
    "google-gemma-3-1b": _gemma(1152, 6912, 26, 4, 1),
    "google-gemma-3-4b": _vision(2560, 10240, 34, 8, 4),
    "google-gemma-3-12b": _vision(3840, 15360, 48, 16, 8),
    "google-gemma-3-27b": _vision(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
}
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

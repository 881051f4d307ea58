"""Published figures: memory of chips, and the config.json of models on the Hugging Face hub."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Memory of a chip. hbm: bytes; a published GB counts as 10^9, the smaller of the two readings."""

    hbm: float
    source: str


MLPERF = "https://github.com/mlcommons/inference_results"
CHIPS = {
    "v5e": Chip(16e9, "https://docs.cloud.google.com/tpu/docs/v5e"),
    "v6e": Chip(32e9, "https://docs.cloud.google.com/tpu/docs/v6e"),
    "v5p": Chip(95e9, "https://docs.cloud.google.com/tpu/docs/v5p"),
    "H100": Chip(80e9, f"{MLPERF}_v3.1/blob/main/closed/Dell/systems/XE9680_H100_SXM_80GBx8_TRT.json"),
    "H200": Chip(141e9, f"{MLPERF}_v4.1/blob/main/closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json"),
}

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
# What config.json of these checkpoints on the Hugging Face hub says of the text model.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {  # meta-llama/Llama-3.1-8B
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-3.2-1b": {  # meta-llama/Llama-3.2-1B
        **LLAMA,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": {**LLAMA["rope_scaling"], "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-70b": {  # meta-llama/Llama-3.1-70B-Instruct
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "gemma-3-4b": {  # google/gemma-3-4b-it, text_config
        **GEMMA3,
        "head_dim": 256,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_hidden_layers": 34,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
    },
    "gemma-3-27b": {  # google/gemma-3-27b-it, text_config
        **GEMMA3,
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    },
    "qwen3-0.6b": {  # Qwen/Qwen3-0.6B
        **QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {  # Qwen/Qwen3-4B
        **QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "qwen3-14b": {  # Qwen/Qwen3-14B
        **QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
    },
    "qwen3-32b": {  # Qwen/Qwen3-32B
        **QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
    },
}

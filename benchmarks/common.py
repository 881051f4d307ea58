"""Shared by the benchmarks: checkpoints with random weights of known shapes."""

import json
import tempfile
from pathlib import Path

import numpy as np

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "Qwen3-0.6B": QWEN3_06B,
    "Llama-3.2-1B": LLAMA_32_1B,
    "tiny": {**QWEN3_06B, "num_hidden_layers": 2, "vocab_size": 4096},
}


def checkpoint(shape: str) -> Path:
    """Returns a checkpoint folder with random bfloat16 weights of a shape. It is made once, in the temporary folder."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from jaxlm import models
    from jaxlm.nn import params

    folder = Path(tempfile.gettempdir()) / f"jaxlm-bench-{shape}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(exist_ok=True)
    hf = SHAPES[shape]
    family = models.family_of(hf["model_type"])
    rng, tensors = np.random.default_rng(0), {}
    for row in params.tensors(family.PARAMS, family.Config.from_hf(hf)):
        norm = row.path.endswith("norm")
        scale = row.stored_shape[-1] ** -0.5
        value = (
            np.full(row.stored_shape, family.NORM_IDENTITY)
            if norm
            else rng.standard_normal(row.stored_shape, np.float32) * scale
        )
        tensors[row.names[0]] = value.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "done").touch()
    return folder

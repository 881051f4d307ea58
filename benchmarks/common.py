"""Shared by the benchmarks: checkpoints with random weights of known shapes, and the limits of this machine."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
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


def read_rate(seconds: float = 1.0) -> float:
    """Bytes per second at which all cores together read memory: the limit of decoding, measured in this run."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1 << 28,), jnp.float32)  # 1 GiB
    parts = jax.jit(lambda x: jnp.max(x.reshape(64, -1), axis=1))
    parts(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        parts(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def matmul_rate(dtype: str = "float32") -> float:
    """FLOP/s of a large square matrix product: the limit of prefill, measured in this run."""
    import jax
    import jax.numpy as jnp

    n = 2048
    a = jnp.ones((n, n), dtype)
    f = jax.jit(lambda a: a @ a)
    f(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        f(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def rivals(command: list[str]) -> dict[str, Callable[..., float]]:
    """Starts a process that writes the names of its contestants on one line, then answers each line [name, ...] with a
    speed. Returns a function for each contestant, which asks it."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def asked(name: str, *case: int) -> float:
        process.stdin.write(json.dumps([name, *case]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    return {name: partial(asked, name) for name in json.loads(process.stdout.readline())}

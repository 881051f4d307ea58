"""Checkpoints in Meta's original format, made from arrays under Hugging Face's names.

Names and row order are written out here independently of the package, so that a mistake in its tables shows.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers import checkpoint_files
from helpers.meta_writer import write_pth
from helpers.random_weights import draw
from jaxlm.checkpoint import safetensors
from jaxlm.models import llama3
from jaxlm.nn import params

# A config.json and the params.json that says the same. 8 heads over 4 kv heads, so that each of 4 shards has one.
RAW = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
PARAMS = {
    "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 24, "ffn_dim_multiplier": 0.25,
    "multiple_of": 24, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": False,
}  # fmt: skip
META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def weights(raw: dict[str, Any] = RAW, kind: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays under Hugging Face's names."""
    rows = params.tensors(llama3.PARAMS, llama3.Config.from_hf(raw))
    return {
        row.names[0]: draw(row.names[0], row.stored_shape, seed).astype(checkpoint_files.KINDS[kind]) for row in rows
    }


def pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in Meta's order, a row at a time."""
    out, H = np.empty_like(w), len(w) // heads
    for head in range(heads):
        for i in range(H // 2):
            out[head * H + 2 * i] = w[head * H + i]
            out[head * H + 2 * i + 1] = w[head * H + H // 2 + i]
    return out


def renamed(arrays: dict[str, np.ndarray], raw: dict[str, Any] = RAW) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under Meta's names and in Meta's row order."""
    converted = {}
    for name, value in arrays.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2], "")
        for theirs, metas in META_NAMES.items():
            name = name.replace(f"{theirs}.", f"{metas}.")
        converted[name] = pairs(value, raw[heads]) if heads else value
    return converted


def cut(arrays: dict[str, np.ndarray], shards: int, embed_axis: int = 0) -> list[dict[str, np.ndarray]]:
    """Meta's tensors split into model-parallel shards."""
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embed_axis}
    split = {
        name: [value] * shards if value.ndim == 1 else np.split(value, shards, axes.get(name.split(".")[-2], 0))
        for name, value in arrays.items()
    }
    return [{name: parts[i] for name, parts in split.items()} for i in range(shards)]


def write(path: Path, shards: list[dict[str, np.ndarray]], params: dict[str, Any] = PARAMS) -> Path:
    """A folder in Meta's format."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(params))
    kinds = {np.dtype(kind): name for name, kind in checkpoint_files.KINDS.items()}
    for i, arrays in enumerate(shards):
        tensors = ((name, kinds[value.dtype], value.shape, [value.tobytes()]) for name, value in arrays.items())
        write_pth(path / f"consolidated.{i:02}.pth", tensors)
    return path


def folder(path: Path, shards: int = 1, kind: str = "F32", embed_axis: int = 0, **changed: Any) -> Path:
    """The folder of PARAMS with these fields changed; the values are those of `weights(RAW, kind)`."""
    return write(path, cut(renamed(weights(RAW, kind)), shards, embed_axis), {**PARAMS, **changed})


def convert(hf: Path, out: Path, shards: int = 1) -> Path:
    """A Llama checkpoint in Hugging Face's format, rewritten in Meta's. A tied head is stored, as Meta stores it."""
    raw = json.loads((hf / "config.json").read_text())
    arrays = {name: array(tensor) for name, tensor in safetensors.read_index(hf).items()}
    arrays.setdefault("lm_head.weight", arrays["model.embed_tokens.weight"])
    return write(out, cut(renamed(arrays, raw), shards), params_json(raw))


def array(tensor: safetensors.Tensor) -> np.ndarray:
    """The values of a tensor in a file."""
    data = b"".join(map(bytes, safetensors.chunks(tensor)))
    return np.frombuffer(data, safetensors.DTYPES[tensor.dtype]).reshape(tensor.shape)


def params_json(raw: dict[str, Any]) -> dict[str, Any]:
    """The params.json of a config.json. Meta's code rounds int(8 D / 3) times ffn_dim_multiplier up to multiple_of."""
    D, F = raw["hidden_size"], raw["intermediate_size"]
    return {
        "dim": D, "n_layers": raw["num_hidden_layers"], "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"], "vocab_size": raw["vocab_size"],
        "ffn_dim_multiplier": min(1.0, F / int(8 * D / 3)), "multiple_of": F, "norm_eps": raw["rms_norm_eps"],
        "rope_theta": llama3.Config.from_hf(raw).rope.theta,
        "use_scaled_rope": llama3.Config.from_hf(raw).rope.type == "llama3",
    }  # fmt: skip


def tokenizer(path: Path) -> Path:
    """A folder with a small tokenizer.json: "a", "b", anything else, BOS, and Llama 3's three ends (ids 4 to 6)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path.mkdir()
    tok = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    tok.save(str(path / "tokenizer.json"))
    return path

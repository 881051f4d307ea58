"""Meta's original checkpoints of the Llama 3 family: params.json, and one consolidated.NN.pth per model-parallel shard.

Source: `ModelArgs`, `Transformer` and `apply_scaling` in meta-llama/llama-models, models/llama3.
"""

import math
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.checkpoint.pth import read_pth
from jaxlm.checkpoint.safetensors import Tensor, chunks, listed

PARAMS = "params.json"
# Path in PARAMS: Meta's name.
NAMES = {
    "embed": "tok_embeddings.weight",
    "layers.attn_norm": "layers.{}.attention_norm.weight",
    "layers.q": "layers.{}.attention.wq.weight",
    "layers.k": "layers.{}.attention.wk.weight",
    "layers.v": "layers.{}.attention.wv.weight",
    "layers.o": "layers.{}.attention.wo.weight",
    "layers.mlp_norm": "layers.{}.ffn_norm.weight",
    "layers.gate": "layers.{}.feed_forward.w1.weight",
    "layers.up": "layers.{}.feed_forward.w3.weight",
    "layers.down": "layers.{}.feed_forward.w2.weight",
    "norm": "norm.weight",
    "head": "output.weight",
}
COLUMNS = ("layers.o", "layers.down")  # split along the second axis; norms are replicated in every shard
ROTARY = ("layers.q", "layers.k")  # rows ordered by rotated pairs
IGNORABLE = ("rope.freqs",)  # follows from params.json
# (dim, n_layers, n_heads): RoPE scaling factor, which params.json does not state. 3.1 and 3.3 (8B, 70B, 405B), then 3.2
# (1B, 3B). Source: their config.json.
FACTORS = {(4096, 32, 32): 8.0, (8192, 80, 64): 8.0, (16384, 126, 128): 8.0, (2048, 16, 32): 32.0, (3072, 28, 24): 32.0}
# EOS tokens, as in generation_config.json from 3.1 on.
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
LAYERS = 2_000  # the bound of jaxlm.models.config
# Fields of params.json that do not change what the forward pass computes.
HARMLESS = ("max_batch_size", "max_seq_len")


def in_pairs(w: np.ndarray, H: int) -> np.ndarray:
    """A view [n,H/2,2,D] of whole heads of q or k ([n*H,D] or [n,H,D]): from Hugging Face's row order to Meta's.

    RoPE rotates pairs of rows of a head: i and i + H/2 in Hugging Face's order, 2 i and 2 i + 1 in Meta's.
    """
    return w.reshape(-1, 2, H // 2, w.shape[-1]).swapaxes(1, 2)


# params.json


def hf_config(
    params: Mapping[str, Any],
    vocabulary: int | None = None,
    rope_factor: float | None = None,
    allow: Collection[str] = (),
) -> dict[str, Any]:
    """The config.json that a params.json stands for, with an untied head.

    Args:
        params: contents of params.json.
        vocabulary: number of rows of the embedding, for a params.json without it.
        rope_factor: RoPE scaling factor, for a model with use_scaled_rope that has no published shape.
        allow: unknown fields to accept.

    Raises:
        ValueError: a field is invalid or unknown.
    """
    left = dict(params)
    D, N = (_size(left.pop(name, None), name) for name in ("dim", "n_heads"))
    L = _size(left.pop("n_layers", None), "n_layers", LAYERS)
    K, V = left.pop("n_kv_heads", None), left.pop("vocab_size", None)
    K = N if K is None else _size(K, "n_kv_heads")
    if D % N or N % K:
        raise ValueError(f"{PARAMS}: dim {D}, n_heads {N} and n_kv_heads {K} do not divide each other")
    scaled = left.pop("use_scaled_rope", False)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _size(vocabulary if V is None or V == -1 else V, "vocab_size"),
        "hidden_size": D,
        "intermediate_size": _mlp_width(D, left.pop("multiple_of", 256), left.pop("ffn_dim_multiplier", None)),
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": D // N,
        "hidden_act": "silu",
        "max_position_embeddings": 131072 if scaled else 8192,
        "rms_norm_eps": _real(left.pop("norm_eps", 1e-5), "norm_eps"),
        "rope_theta": _theta(left.pop("rope_theta", None)),
        "rope_scaling": _scaling(scaled, (D, L, N), rope_factor),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    _refuse_unknown(left, allow)
    return config


def _refuse_unknown(left: Mapping[str, Any], allow: Collection[str]) -> None:
    passed = {*HARMLESS, *allow}
    unknown = [n for n, v in left.items() if n not in passed and v not in (None, False, -1)]
    if unknown:
        fields = "; ".join(f"{n[:80]} = {reprlib.repr(left[n])}" for n in unknown[:20])
        raise ValueError(
            f"{PARAMS} has fields that this architecture does not compute: {fields}. If a field does not change the "
            "result, accept it with --allow-field NAME (allow_fields=[NAME])"
        )


def _size(value: Any, name: str, most: int = 2**31 - 1) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{PARAMS}: {name} is {reprlib.repr(value)}, but must be an integer from 1 to {most:,}")
    return value


def _real(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 1e-15 < value < 1e15:
        raise ValueError(f"{PARAMS}: {name} is {reprlib.repr(value)}, but must be a number above 0 (1e-15 to 1e15)")
    return float(value)


def _theta(value: Any) -> float:
    """A missing rope_theta is 10,000 for Llama 1 and 2, and 500,000 in Meta's code for Llama 3: it must be stated."""
    if value is None:
        raise ValueError(
            f"{PARAMS} has no rope_theta, as in the files of Llama 1 and 2, which are not supported in Meta's format. "
            "Use the model in Hugging Face's format (config.json, *.safetensors). If it is a Llama 3, add "
            f'"rope_theta": 500000.0 to {PARAMS}'
        )
    return _real(value, "rope_theta")


def _mlp_width(D: int, multiple: Any, factor: Any) -> int:
    """Two thirds of 4 D, times a factor, rounded up to a multiple (`FeedForward.__init__`)."""
    multiple, F = _size(multiple, "multiple_of"), int(2 * (4 * D) / 3)
    if factor is not None:
        F = int(_real(factor, "ffn_dim_multiplier") * F)
    return -(-F // multiple) * multiple


def _scaling(scaled: Any, shape: tuple[int, int, int], given: float | None) -> dict[str, Any] | None:
    if type(scaled) is not bool:
        raise ValueError(f"{PARAMS}: use_scaled_rope is {reprlib.repr(scaled)}, but must be true or false")
    if given is not None and not (isinstance(given, int | float) and 1 <= given < math.inf):
        raise ValueError(f"--rope-factor {given} (rope_factor=) must be a number of at least 1")
    if not scaled:
        if given is not None:
            raise ValueError(f"--rope-factor {given} (rope_factor=) is for a model whose {PARAMS} has use_scaled_rope")
        return None
    factor = given or FACTORS.get(shape)
    if factor is None:
        raise ValueError(
            f"{PARAMS} has use_scaled_rope without a factor, and (dim, n_layers, n_heads) = {shape} is no published "
            "shape: pass --rope-factor (rope_factor=), 8 as in Llama 3.1 and 3.3 or 32 as in 3.2"
        )
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# Shards


class ConcatTensor(NamedTuple):
    """A tensor that is concatenated from parts along an axis; otherwise like a Tensor. H: the head width if its rows
    are ordered by rotated pairs, else 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]
    axis: int = 0
    H: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def offset(self) -> int:
        return self.parts[0].offset


def read_shards(folder: Path, params: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The tensors of each consolidated.NN.pth, in order. FileNotFoundError if a shard is missing."""
    D, numbered = _size(params.get("dim"), "dim"), {}
    for path in folder.glob("consolidated.*.pth"):
        if match := re.fullmatch(r"consolidated\.(\d\d\d?)\.pth", path.name):
            numbered[int(match[1])] = path
    shards = {i: read_pth(path) for i, path in sorted(numbered.items())}
    # The share of the D rows in one shard tells the number of shards, even if the last ones are missing.
    cut = next(iter(shards.values()), {}).get(NAMES["layers.q"].format(0))
    count = max(max(numbered, default=0) + 1, min(D // max(cut.shape[0], 1), 999) if cut and cut.shape else 1)
    if absent := [f"consolidated.{i:02}.pth" for i in range(count) if i not in numbered]:
        raise FileNotFoundError(f"{folder} lacks {listed(absent)} of {count} shards: download them again")
    return [shards[i] for i in range(count)]


def vocabulary(shards: Sequence[Mapping[str, Tensor]], params: Mapping[str, Any]) -> int | None:
    """The number of rows of the whole embedding, None without one."""
    embed = shards[0].get(NAMES["embed"])
    if embed is None or len(embed.shape) != 2:
        return None
    return embed.shape[0] * (len(shards) if embed.shape[1] == params["dim"] else 1)


def join(
    shards: Sequence[Mapping[str, Tensor]], D: int, H: int
) -> tuple[dict[str, ConcatTensor], dict[str, list[str]]]:
    """The whole tensors by Meta's names, and the faults of the shards (what is wrong: names)."""
    joined: dict[str, ConcatTensor] = {}
    absent, unequal, unlike = [], [], []
    for name in dict.fromkeys(name for shard in shards for name in shard if name not in IGNORABLE):
        parts = tuple(shard[name] for shard in shards if name in shard)
        if len(parts) < len(shards):
            absent.append(name)
        if len({(part.dtype, part.shape) for part in parts}) > 1:
            unequal.append(name)
        path = _path(name)
        if len(parts[0].shape) < 2 or path is None:  # a norm, or an unknown tensor, which is reported later
            unlike += [name] if path and not _alike(parts) else []
            joined[name] = ConcatTensor(name, parts[0].dtype, parts[0].shape, parts[:1])
            continue
        # Before Llama 3 the embedding was split by columns: only one axis gives a width of D.
        axis = int(path in COLUMNS or (path == "embed" and parts[0].shape[1] != D))
        whole = list(parts[0].shape)
        whole[axis] *= len(shards)
        heads = H if path in ROTARY else 0
        if heads and parts[0].shape[0] % heads:
            unequal.append(f"{name} (a head is split over two shards)")
        joined[name] = ConcatTensor(name, parts[0].dtype, tuple(whole), parts, axis, heads)
    faults = {
        "not in every shard": absent,
        "of different types or shapes in the shards": unequal,
        "replicated in every shard, with different values": unlike,
    }
    return joined, faults


def _path(name: str) -> str | None:
    """The path in PARAMS of one of Meta's names (`layers.q`)."""
    plain = re.sub(r"^layers\.\d+\.", "layers.{}.", name)
    return next((path for path, theirs in NAMES.items() if theirs == plain), None)


def _alike(parts: Sequence[Tensor]) -> bool:
    return all(np.array_equal(x, y) for part in parts[1:] for x, y in zip(chunks(parts[0]), chunks(part)))

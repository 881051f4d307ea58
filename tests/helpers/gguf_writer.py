"""Writes GGUF files byte by byte, for tests: sound ones of the tiny models, and broken ones."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers.tiny_models import CONFIGS, tiny
from jaxlm.nn import params

F32, F16, Q8_0, Q4_0, Q6_K, BF16 = 0, 1, 8, 2, 14, 30
BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), Q4_0: (32, 18), Q6_K: (256, 210), BF16: (1, 2)}
ARCHITECTURES = {"llama3": "llama", "qwen3": "qwen3", "olmo2": "olmo2", "olmo3": "olmo2", "smollm3": "smollm3",
                 "gemma3": "gemma3"}  # fmt: skip
# The end of a name in Hugging Face's format: in GGUF.
TENSORS = {
    "embed_tokens": "token_embd", "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "norm": "output_norm", "lm_head": "output",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
AFTER = {"llama3": "ffn_norm", "qwen3": "ffn_norm", "smollm3": "ffn_norm"}  # others: post_attention_norm
THETAS = {"gemma3_text": 1e6, "olmo3": 5e5, "smollm3": 2e6}  # without the field rope_theta


class Raw(NamedTuple):
    """A tensor to write: number of its type, shape in numpy's order, and bytes."""

    kind: int
    shape: tuple[int, ...]
    data: bytes


def text(value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def typed(value: Any) -> tuple[int, bytes]:
    """Number of the type of a value, and its bytes. bytes: written as they are, after 4 bytes with the type."""
    if isinstance(value, bytes):
        return struct.unpack("<I", value[:4])[0], value[4:]
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    items = [typed(item) for item in value]
    kind = 5 if items and items[0][0] == 4 else items[0][0] if items else 8  # arrays of integers are signed
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)


def header(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, int, tuple[int, ...], int]], version: int = 3,
           num_tensors: int | None = None, num_keys: int | None = None) -> bytes:  # fmt: skip
    """A header of tensors (name, type, shape in numpy's order, offset). The numbers may be wrong ones."""
    out = b"GGUF" + struct.pack("<I", version)
    out += struct.pack("<QQ", len(tensors) if num_tensors is None else num_tensors,
                       len(metadata) if num_keys is None else num_keys)  # fmt: skip
    for key, value in metadata.items():
        kind, data = typed(value)
        out += text(key) + struct.pack("<I", kind) + data
    for name, kind, shape, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
    return out


def content(metadata: Mapping[str, Any], tensors: Mapping[str, Raw], version: int = 3) -> bytes:
    """A sound file."""
    alignment = metadata.get("general.alignment", 32)
    alignment = alignment if isinstance(alignment, int) else 64
    entries, data = [], b""
    for name, raw in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        entries.append((name, raw.kind, raw.shape, len(data)))
        data += raw.data
    start = header(metadata, entries, version)
    return start + b"\0" * (-len(start) % alignment) + data


def metadata_of(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The metadata that llama.cpp writes for a config.json. The lowest keys of config are those of CONFIGS."""
    N = config["num_attention_heads"]
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": N,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-5 if architecture == "olmo2" else 1e-6),
        "rope.freq_base": float(config.get("rope_theta", THETAS.get(config.get("model_type"), 1e4))),
        "vocab_size": config["vocab_size"],
    }
    if "head_dim" in config:
        found |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    else:
        found["rope.dimension_count"] = config["hidden_size"] // N
    if config.get("sliding_window"):
        found["attention.sliding_window"] = config["sliding_window"]
    if (scaling := config.get("rope_scaling")) and scaling.get("rope_type", scaling.get("type")) == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in found.items()}}


def rope_factors(theta: float, H: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The tensor rope_freqs.weight of Llama 3.1: what frequencies are divided by."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, H, 2) / H)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return factors.astype(np.float32)


def name_of(name: str, family: str) -> str:
    """The name in GGUF of a tensor in Hugging Face's format."""
    parts = name.removesuffix(".weight").split(".")
    end = {**TENSORS, "post_attention_layernorm": AFTER.get(family, "post_attention_norm")}[parts[-1]]
    return f"blk.{parts[2]}.{end}.weight" if "layers" in parts else f"{end}.weight"


def encode(value: np.ndarray, kind: int, rng: np.random.RandomState) -> Raw:
    """A tensor of a type. Blocks of quantized types are random, with finite scales."""
    elements, nbytes = BLOCKS[kind]
    if kind == F32:
        return Raw(kind, value.shape, value.astype(np.float32).tobytes())
    if kind == F16:
        return Raw(kind, value.shape, value.astype(np.float16).tobytes())
    if kind == BF16:
        return Raw(kind, value.shape, (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    raw = rng.randint(0, 256, (value.size // elements, nbytes)).astype(np.uint8)
    at = 208 if kind == Q6_K else 0
    raw[:, at : at + 2] = (rng.rand(len(raw), 1) * 0.002).astype(np.float16).view(np.uint8)
    return Raw(kind, value.shape, raw.tobytes())


def tiny_file(family: str, kind: int = F32, seed: int = 0, **fields: Any) -> tuple[dict[str, Any], dict[str, Raw]]:
    """Metadata and tensors of a tiny model. Norms are float32 whatever the type of the others is."""
    model, rng = tiny(family, seed, **fields), np.random.RandomState(seed)
    config = {**CONFIGS[family], **fields}
    metadata = metadata_of(config, ARCHITECTURES[family])
    if "layer_types" in config:
        local = [kind == "sliding_attention" for kind in config["layer_types"]]
        metadata[f"{ARCHITECTURES[family]}.attention.sliding_window_pattern"] = local
    tensors = {}
    for row in params.tensors(model.family.PARAMS, model.config):
        value = np.asarray(params.get(model.weights, row.path)).reshape(row.stored_shape)
        own = row.path.rpartition(".")[2]
        if family in ("llama3", "smollm3") and own in ("q", "k"):
            value = value.reshape(-1, 2, model.config.H // 2, model.config.D).swapaxes(1, 2).reshape(value.shape)
        if family == "gemma3" and own.endswith("norm"):
            value = value + np.float32(1)
        tensors[name_of(row.names[0], family)] = encode(value, F32 if own.endswith("norm") else kind, rng)
    return metadata, tensors


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Raw], **options: Any) -> Path:
    path.write_bytes(content(metadata, tensors, **options))
    return path


def write_split(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Raw], count: int = 3) -> list[Path]:
    """The files of a split model: path-00001-of-00003.gguf and so on."""
    names, paths = list(tensors), []
    for i in range(count):
        own = {"split.no": i, "split.count": count, "split.tensors.count": len(names)}
        part = {name: tensors[name] for name in names[i::count]}
        name = path.with_name(f"{path.stem}-{i + 1:05}-of-{count:05}.gguf")
        paths.append(write(name, {**metadata, **own} if i == 0 else own, part))
    return paths


def large_file(path: Path, kind: int = Q4_0, D: int = 1024, F: int = 4096, V: int = 16384, L: int = 2) -> Path:
    """A Llama whose blocks are all equal, made without its weights in float: for measurements of memory."""
    N = D // 64
    sizes = {
        "max_position_embeddings": 2048, "hidden_size": D, "num_hidden_layers": L, "intermediate_size": F,
        "num_attention_heads": N, "num_key_value_heads": N, "vocab_size": V,
    }  # fmt: skip
    shapes = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D),
              "attn_output": (D, D), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}  # fmt: skip
    named = {f"blk.{i}.{name}": shape for i in range(L) for name, shape in shapes.items()}
    rng, tensors = np.random.RandomState(0), {}
    for name, shape in {"token_embd": (V, D), **named, "output_norm": (D,)}.items():
        own = F32 if len(shape) == 1 else kind
        block = encode(np.ones(256, np.float32), own, rng).data
        tensors[f"{name}.weight"] = Raw(own, shape, block * (int(np.prod(shape)) // 256))
    return write(path, metadata_of(sizes, "llama"), tensors)

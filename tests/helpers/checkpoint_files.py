"""Checkpoints made by hand, byte by byte, so that they can be wrong in any way."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.models import gemma3, llama3
from jaxlm.nn import params

KINDS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
LLAMA = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {**LLAMA, "model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 16}
GEMMA.pop("rope_theta")
FAMILY = {"llama": llama3, "gemma3_text": gemma3}


def config(raw: dict[str, Any] = LLAMA) -> Any:
    return FAMILY[raw["model_type"]].Config.from_hf(raw)


def tensors(raw: dict[str, Any] = LLAMA, kind: str = "F32", spelling: int = 0) -> dict[str, np.ndarray]:
    """Random values under the checkpoint's names, none twice."""
    rng = np.random.default_rng(0)
    rows = params.tensors(FAMILY[raw["model_type"]].PARAMS, config(raw))
    return {row.names[spelling]: rng.standard_normal(row.stored_shape).astype(KINDS[kind]) for row in rows}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A sound safetensors file."""
    other = {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64,
             "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}  # fmt: skip
    kinds = {np.dtype(kind): name for name, kind in (KINDS | other).items()}
    header, data = {}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kinds[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return write_raw(path, header, data)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, *shape: int, kind: str = "F32", size: int = 4) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, begin + math.prod(shape) * size]}


def folder(path: Path, raw: dict[str, Any], arrays: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint folder: one file, or several with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        write(path / "model.safetensors", arrays)
        return path
    where = {}
    for i in range(shards):
        part = dict(list(arrays.items())[i::shards])
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write(path / name, part)
        where |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path

"""Writes the story model as it ships, in int8: `python examples/stories/package.py MODEL OUT`.

MODEL is the folder that `jaxlm train` wrote. OUT gets a quarter of its size, in the format of compressed-tensors, which
`jaxlm.load` and transformers read. `jaxlm export --quantize` quantizes the matrices of the layers. The embedding is a
fifth of this model, so it is quantized here too.
"""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

SHAPE = Path(__file__).with_name("shape.json")
# https://github.com/vllm-project/compressed-tensors: int8 weights with a scale for each output channel.
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "naive-quantized",
    "quantization_status": "compressed",
    "dequantize": True,  # transformers does not compute with quantized embeddings
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "Embedding"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],  # it is the embedding
}
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 300}


def main(model: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, w in load_file(model / "model.safetensors").items():
        if w.ndim == 2:
            tensors[name], tensors[f"{name}_scale"] = quantized(w)
        else:
            tensors[name] = w.astype(ml_dtypes.bfloat16)  # norms
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model / "tokenizer.json", out)
    shape = json.loads(SHAPE.read_text())
    ends = {name: shape[name] for name in ("bos_token_id", "eos_token_id")}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
                 "eos_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
                 "model_max_length": shape["max_position_embeddings"]}  # fmt: skip
    write(out / "config.json", {**shape, "quantization_config": QUANTIZATION})
    write(out / "generation_config.json", {**GENERATION, **ends})
    write(out / "tokenizer_config.json", tokenizer)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.2f} MB")


def quantized(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [F,D] and float32 scales [F,1] of a matrix [F,D]. The largest weight of a channel becomes 127 or -127."""
    w = w.astype(np.float32)
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(w / np.where(scale > 0, scale, 1)).astype(np.int8), scale


def write(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""`jaxlm verify` at the width of a published model: its config with fewer layers and random weights.

    python benchmarks/verify_shapes.py CONFIG.json [--layers 2] [--against transformers,meta] [--dtype float32]

All other sizes are kept. Weights are drawn so that attention is not flat and norms are not neutral: with the usual
initialization, a wrong RoPE factor changes no logit. The checkpoint is bfloat16, in a temporary folder that is removed
afterwards.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxlm import models
from jaxlm.cli import main
from jaxlm.nn import params

PART = 1 << 24  # values drawn at a time


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], neutral: float) -> np.ndarray:
    """Norms around their neutral value; attention scores with a standard deviation above 1."""
    out = np.empty(int(np.prod(shape)), ml_dtypes.bfloat16)
    norm, scores = name.endswith("norm.weight"), "q_proj" in name or "k_proj" in name
    for begin in range(0, out.size, PART):
        unit = rng.standard_normal(min(PART, out.size - begin), np.float32)
        value = neutral + 0.2 + 0.35 * unit if norm else unit * ((1.3 if scores else 1.0) * shape[-1] ** -0.5)
        out[begin : begin + PART] = value.astype(ml_dtypes.bfloat16)
    return out.reshape(shape)


def write(folder: Path, hf: dict) -> None:
    from safetensors.numpy import save_file

    family = models.family_of(hf["model_type"])
    rng = np.random.default_rng(0)
    rows = params.tensors(family.PARAMS, family.Config.from_hf(hf))
    tensors = {row.names[0]: draw(rng, row.names[0], row.stored_shape, family.NORM_IDENTITY) for row in rows}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))


def shortened(path: str, layers: int) -> dict:
    """The text model's part of a config.json with `layers` layers. If its layers differ in kind, one of each."""
    hf = json.loads(Path(path).read_text())
    if "text_config" in hf:
        hf = {**hf["text_config"], "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    hf["num_hidden_layers"] = layers
    if hf["model_type"] == "gemma3_text":
        kinds = ["sliding_attention", "full_attention"]
        hf["layer_types"] = [kinds[i % 2] for i in range(layers)]
        hf.pop("sliding_window_pattern", None)
    return hf


parser = argparse.ArgumentParser()
parser.add_argument("config")
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--against", default="transformers")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    named = Path(folder) / f"{Path(args.config).stem}-{args.layers}-layers"
    named.mkdir()
    write(named, shortened(args.config, args.layers))
    sys.exit(main(["verify", str(named), "--against", args.against, "--dtype", args.dtype]))

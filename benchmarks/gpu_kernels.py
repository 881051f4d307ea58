"""The kernels that a decode step launches on an NVIDIA GPU, compiled without one.

    pip install "jax[cuda13]"
    JAX_PLATFORMS=cpu python benchmarks/gpu_kernels.py [--device H200] [--model llama-3.1-8b] [--rows 1,8,64]
                      [--context 2048] [--options '{"xla_gpu_dot_merger_threshold_mb": 1000}'] [--text FOLDER]

The kernels of a layer are half of the difference between programs of four and of two layers, so an edge effect shows as
half a kernel. Nothing is autotuned without a GPU: a card may choose other products. Kernels that a library launches
within one call count once.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from published import MODELS

from jaxlm import models
from jaxlm.bench import gpu_targets
from jaxlm.bench.hlo import kernels
from jaxlm.bench.programs import Setting, state, weights
from jaxlm.devices import specs
from jaxlm.inference import decoding

LAYERS = (2, 4)


def compiled(model: str, layers: int, rows: int, context: int, device: Any, options: dict[str, object]) -> str:
    """The text of the program of one decode step."""
    family = models.family_of(MODELS[model]["model_type"])
    where = Setting(family, family.Config.from_hf({**MODELS[model], "num_hidden_layers": layers}), None, rows, device)
    step = partial(decoding.step, family, where.cfg, None, (), 1)
    program = jax.jit(step, donate_argnums=1, compiler_options=options)
    return program.lower(weights(where), state(where, context)).compile().as_text() or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=gpu_targets.TARGETS, default="H200")
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--options", type=json.loads, default={}, help="compiler options, as JSON")
    parser.add_argument("--text", type=Path, help="a folder for the compiled programs")
    args = parser.parse_args()
    device = gpu_targets.devices(specs.BY_NAME[args.device], 1)[0]
    print(f"{args.model}, {device.device_kind}, {args.context} tokens, jax {jax.__version__}")
    print("| rows | kernels a layer | the rest |\n| --- | --- | --- |")
    for rows in map(int, args.rows.split(",")):
        counts = []
        for layers in LAYERS:
            text = compiled(args.model, layers, rows, args.context, device, args.options)
            counts.append(kernels(text).total())
            if args.text:
                args.text.mkdir(parents=True, exist_ok=True)
                (args.text / f"{args.model}-{layers}-layers-{rows}-rows.txt").write_text(text)
        layer = (counts[1] - counts[0]) / (LAYERS[1] - LAYERS[0])
        print(f"| {rows} | {layer:g} | {counts[0] - LAYERS[0] * layer:g} |", flush=True)


if __name__ == "__main__":
    main()

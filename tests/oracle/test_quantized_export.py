"""Quantized folders that jaxlm writes, opened by transformers with the package compressed-tensors."""

import numpy as np
import pytest
from helpers.quantized_models import SIZES, dense, quantized
from helpers.tiny_models import CONFIGS

import jaxlm
from jaxlm.nn.quantized import is_quantized

pytestmark = pytest.mark.oracle
TOKENS = np.random.default_rng(0).integers(0, 199, (2, 9)).astype(np.int32)


def theirs(folder) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()


@pytest.mark.parametrize("type", ["int8", "int8-weights", "fp8"])
def test_logits_of_a_quantized_folder(type: str, tmp_path) -> None:
    """Equal but for rounding in float32. With int8, both round the inputs to 8 bits, with scales that differ by 0.4 %:
    as far apart as the rounded and the exact product are."""
    model, same = quantized("qwen3", type)
    folder = jaxlm.export(model, tmp_path / "out", config={**CONFIGS["qwen3"], **SIZES}).folder
    found = theirs(folder)
    exact = np.asarray(same.forward(TOKENS, same.weights)[0])
    limit = 1e-4 * exact.std()
    if type == "int8":
        rounded = np.asarray(model.forward(TOKENS, {**model.weights, "head": same.weights["head"]})[0])
        limit = 3 * np.abs(rounded - exact).max()
        assert np.abs(found - exact).max() > 1e-3 * exact.std()  # the file asks for rounded inputs
    assert np.abs(found - exact).max() <= limit


def test_logits_of_int4(tmp_path) -> None:
    """The symmetric groups of the file, which `export` fits, are those of a model whose offsets are 0."""
    from dataclasses import replace

    model, _ = quantized("qwen3", "int4")
    layers = [
        {name: replace(w, offset=0 * w.scale) if is_quantized(w) and w.grouped else w for name, w in layer.items()}
        for layer in model.weights["layers"]
    ]
    model = replace(model, weights={**model.weights, "layers": layers})
    folder = jaxlm.export(model, tmp_path / "out", config={**CONFIGS["qwen3"], **SIZES}).folder
    exact = np.asarray(model.forward(TOKENS, dense(model.weights))[0])
    assert np.abs(theirs(folder) - exact).max() <= 1e-4 * exact.std()

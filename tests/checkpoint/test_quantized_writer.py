"""Quantized models in files: every number is decoded here, from the description of the format alone."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.quantized_models import SIZES, quantized
from helpers.tiny_models import CONFIGS, tiny

import jaxlm
from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint import writer as files
from jaxlm.cli import main
from jaxlm.nn import params
from jaxlm.nn.quantize import symmetric_scales

RAW = {**CONFIGS["qwen3"], **SIZES, "tie_word_embeddings": False}
TYPES = {
    "F32": np.float32, "F16": np.float16, "I8": np.int8, "I32": np.int32, "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Slices so small that every tensor has several, the last one shorter."""
    monkeypatch.setattr(files, "SLICE", 6000)


def read(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by name."""
    return {
        name: np.concatenate([np.array(part).view(np.uint8) for part in safetensors.chunks(tensor)])
        .view(TYPES[tensor.dtype])
        .reshape(tensor.shape)
        for name, tensor in safetensors.read_index(folder).items()
    }


def dequantized(tensors: dict[str, np.ndarray], name: str, bits: int) -> np.ndarray:
    """A weight [F,D]. Words of 32 bits begin with their low bits, and hold numbers plus half of their range."""
    scale = tensors[f"{name}.weight_scale"].astype(np.float32)
    if f"{name}.weight" in tensors:
        q = tensors[f"{name}.weight"].astype(np.float32)
    else:
        words = tensors[f"{name}.weight_packed"].view(np.uint32)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        q = (words[..., None] >> shifts & np.uint32(2**bits - 1)).reshape(tensors[f"{name}.weight_shape"])
        q = q.astype(np.float32) - 2 ** (bits - 1)
    return (q.reshape(*scale.shape, -1) * scale[..., None]).reshape(q.shape)


CASES = {"int8": ("int-quantized", 8), "int8-weights": ("pack-quantized", 8), "fp8": ("float-quantized", 8)}


@pytest.mark.parametrize("type", CASES)
def test_a_folder_has_the_values_of_the_model(type: str, tmp_path) -> None:
    """Embedding and head are floats. int8 is rounded again, without the rotation, by at most a step of a channel."""
    form, bits = CASES[type]
    model, same = quantized("qwen3", type)
    done = jaxlm.export(model, tmp_path / "out", config=RAW)
    tensors, config = read(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    for row in params.tensors(model.family.PARAMS, model.config):
        name, expected = row.names[0].removesuffix(".weight"), params.get(same.weights, row.path)
        found = dequantized(tensors, name, bits) if f"{name}.weight_scale" in tensors else tensors[f"{name}.weight"]
        assert (f"{name}.weight_scale" in tensors) == name.endswith("_proj")
        again = type == "int8" and name.endswith("_proj")
        step = np.abs(np.asarray(expected)).max() / 127 if again else 1e-9
        np.testing.assert_allclose(found.reshape(row.shape), expected, rtol=1e-6, atol=float(step))
    config = config["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], config["ignore"], group["targets"]) == (form, ["lm_head"], ["Linear"])
    assert group["weights"]["strategy"] == "channel"
    assert (group["input_activations"] is None) == (type != "int8")
    assert len(done.notes) == (type == "int8")
    assert done.nbytes == sum(array.nbytes for array in tensors.values())


def test_int4_is_fitted_to_symmetric_groups(tmp_path) -> None:
    """From floating point numbers: the error of a group is at most that of its largest number as 7 or -8. `down` has no
    whole groups, and stays as it is."""
    model = tiny("qwen3", **SIZES)
    done = jaxlm.export(model, tmp_path / "out", config=RAW, quantize="int4")
    tensors, config = read(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    for i, layer in enumerate(model.weights["layers"]):
        for ours, theirs in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("up", "mlp.up_proj")):
            groups = np.asarray(layer[ours]).reshape(-1, 32)
            found = dequantized(tensors, f"model.layers.{i}.{theirs}", 4).reshape(-1, 32)
            scale = np.abs(groups).max(axis=1, keepdims=True) / 7
            plain = np.rint(groups / scale) * scale
            error, limit = (np.square(x - groups).sum(axis=1) for x in (found, plain))
            assert (error <= limit * 1.01 + 1e-9).all()
            assert error.sum() < 0.9 * limit.sum()
        assert np.array_equal(tensors[f"model.layers.{i}.mlp.down_proj.weight"], layer["down"])
    config = config["quantization_config"]
    assert config["ignore"] == ["lm_head", *(rf"re:.*layers\.{i}\.mlp\.down_proj$" for i in (0, 1))]
    weights = config["config_groups"]["group_0"]["weights"]
    assert [weights[name] for name in ("num_bits", "symmetric", "strategy", "group_size")] == [4, True, "group", 32]
    assert done.notes == ()


def test_int4_with_offsets_is_rounded_again_and_says_so(tmp_path) -> None:
    """A weight whose groups are symmetric already keeps its values."""
    model, _ = quantized("qwen3", "int4")
    done = jaxlm.export(model, tmp_path / "out", config=RAW)
    assert "rounded again" in done.notes[0]
    layers = [
        {name: replace(w, offset=0 * w.scale) if getattr(w, "grouped", False) else w for name, w in layer.items()}
        for layer in model.weights["layers"]
    ]
    symmetric = replace(model, weights={**model.weights, "layers": layers})
    done = jaxlm.export(symmetric, tmp_path / "symmetric", config=RAW)
    assert done.notes == ()
    tensors = read(tmp_path / "symmetric")
    for name, path in (("q_proj", "q"), ("o_proj", "o")):
        found = dequantized(tensors, f"model.layers.1.self_attn.{name}", 4)
        expected = layers[1][path].dense()
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-7)


def test_without_quantization(tmp_path) -> None:
    """A dtype dequantizes, and so does GGUF."""
    model, same = quantized("llama3", "int4")
    raw = {**CONFIGS["llama3"], **SIZES}
    jaxlm.export(model, tmp_path / "out", config=raw, dtype="float32")
    tensors = read(tmp_path / "out")
    for row in params.tensors(model.family.PARAMS, model.config):
        expected = params.get(same.weights, row.path)
        np.testing.assert_allclose(tensors[row.names[0]].reshape(row.shape), expected, atol=1e-7)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    jaxlm.export(model, tmp_path / "a.gguf", type="f16")
    jaxlm.export(same, tmp_path / "b.gguf", type="f16")
    ours, theirs = (jaxlm.load(tmp_path / f"{name}.gguf", dtype="float32").weights for name in "ab")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_a_model_on_a_mesh(tmp_path) -> None:
    model, _ = quantized("llama3", "int4")
    raw = {**CONFIGS["llama3"], **SIZES}
    jaxlm.export(jaxlm.loading.spread(model, "data=2,model=2"), tmp_path / "mesh", config=raw)
    jaxlm.export(model, tmp_path / "one", config=raw)
    assert (tmp_path / "mesh/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_the_command(tmp_path, capsys) -> None:
    """A checkpoint is quantized from file to file, to the same numbers as its loaded weights."""
    base = jaxlm.export(tiny("qwen3", **SIZES), tmp_path / "base", config=RAW).folder
    assert main(["export", str(base), str(tmp_path / "out"), "--quantize", "int8-weights"]) == 0
    tensors, model = read(tmp_path / "out"), quantized("qwen3", "int8-weights")[1]
    for name, path in (("self_attn.q_proj", "q"), ("mlp.down_proj", "down")):
        found, expected = dequantized(tensors, f"model.layers.1.{name}", 8), model.weights["layers"][1][path]
        difference = np.abs(found - np.asarray(expected).reshape(found.shape))
        scale = tensors[f"model.layers.1.{name}.weight_scale"]
        assert (difference <= 1.01 * scale).all()  # half-way between two codes, either is right
        assert (difference > 0.01 * scale).mean() < 1e-3
    assert main(["export", str(base), str(tmp_path / "a.gguf"), "--quantize", "int4"]) == 1
    assert "applies to a folder" in capsys.readouterr().err


def test_scales_of_groups() -> None:
    """A group of zeros; one whose numbers are codes; one with a large number, whose scale is negative."""
    codes = np.arange(-8, 8, dtype=np.float32).repeat(2)
    w = np.stack([np.zeros(32, np.float32), codes * 0.5, -codes * 0.5])[:, None]
    np.testing.assert_allclose(symmetric_scales(jnp.asarray(w))[:, 0], [0, 0.5, -0.5])

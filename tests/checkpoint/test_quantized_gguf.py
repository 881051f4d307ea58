"""GGUF weights that stay quantized. Their values are those of gguf_types.dequantize, which oracle/test_gguf_oracle.py
compares with llama.cpp's package."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_writer import Q4_0, Q6_K, tiny_file, write

import jaxlm
from jaxlm.checkpoint import gguf_packed, gguf_types, quantized_layout
from jaxlm.checkpoint.meta import ConcatTensor, in_pairs
from jaxlm.checkpoint.safetensors import Tensor
from jaxlm.devices import hardware
from jaxlm.nn import params
from jaxlm.nn.quantized import Quantized

F, D, H = 24, 512, 4
SCALES = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2),
          "Q5_1": (0, 2), "MXFP4": ()}  # fmt: skip


def blocks(name, path):
    """A tensor of random blocks with finite scales, and its values."""
    rng, block = np.random.default_rng(0), gguf_types.BY_NAME[name]
    raw = rng.integers(0, 256, (F, D // block.elements, block.nbytes)).astype(np.uint8)
    for at in SCALES.get(name, (0,)):
        raw[..., at : at + 2] = rng.uniform(-0.01, 0.01, (*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(110, 130, raw.shape[:2])
    path.write_bytes(raw.tobytes())
    tensor = Tensor("w", path, "BF16", (F, D), 0, raw.nbytes, encoding=name)
    return tensor, gguf_types.dequantize(name, raw.reshape(F, -1))


@pytest.mark.parametrize("name", gguf_packed.FORMS)
def test_values_of_every_type(name, tmp_path):
    """Also with rows in rotated pairs, and of a block of the weight; and a product on CPU, in groups of 16 too."""
    tensor, values = blocks(name, tmp_path / "w")
    packed = gguf_packed.packed(tensor)
    assert packed is not None
    weight = replace(jax.tree.map(jnp.asarray, quantized_layout.whole(packed, 8)), dtype=jnp.float32, activations=False)
    np.testing.assert_array_equal(weight.dense(), values)
    np.testing.assert_array_equal(weight.rows(jnp.array([[3, 23], [1, 1]])), values[[[3, 23], [1, 1]]])
    x = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    bound = 1e-5 * np.abs(x) @ np.abs(values).T.max(axis=1)
    np.testing.assert_allclose(weight.product("BD,FD->BF", jnp.asarray(x[None]))[0], values @ x, rtol=0, atol=bound)
    paired = gguf_packed.packed(ConcatTensor("w", "BF16", (F, D), (tensor,), H=H))
    assert paired is not None
    expected = np.empty_like(values)
    in_pairs(expected, H)[...] = values.reshape(-1, H // 2, 2, D)
    part = np.empty((9, 100), np.float32)
    quantized_layout.dense_into(paired, part, 5, 33)
    np.testing.assert_array_equal(part, expected[5:14, 33:133])


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "num_hidden_layers": 1}  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), [("llama3", Q4_0), ("gemma3", Q6_K)])
def test_a_quantized_file_stays_quantized_if_asked(family, kind, tmp_path):
    """Its values are those of the dequantized file, with Llama's rotated pairs and Gemma's norms. Norms are floats."""
    own = {"layer_types": ["full_attention"]} if family == "gemma3" else {}
    path = write(tmp_path / "model.gguf", *tiny_file(family, kind, **SIZES, **own))
    model, dense = jaxlm.load(path, quantize="stored"), jaxlm.load(path, dtype="float32")
    assert model.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(jaxlm.load(path).weights))  # the default
    kept = [row.path for row in params.tensors(model.family.PARAMS, model.config)
            if isinstance(params.get(model.weights, row.path), Quantized)]  # fmt: skip
    assert kept == [
        row.path for row in params.tensors(model.family.PARAMS, model.config) if not row.path.endswith("norm")
    ]
    for name in kept:
        leaf = params.get(model.weights, name)
        assert leaf.activations
        np.testing.assert_array_equal(replace(leaf, dtype=jnp.float32).dense(), params.get(dense.weights, name))
    norm = np.asarray(model.weights["norm"], np.float32)
    np.testing.assert_allclose(norm, dense.weights["norm"], rtol=2**-8)
    assert params.nbytes(model.weights) < 0.3 * params.nbytes(dense.weights)


def test_a_file_that_fits_as_it_is_stored(monkeypatch, tmp_path):
    """The message names the way; without quantized weights there is nothing to keep."""
    path = write(tmp_path / "model.gguf", *tiny_file("llama3", Q4_0, **SIZES))
    free = 0.9 * params.nbytes(jaxlm.load(path).weights)
    monkeypatch.setattr(hardware, "available_memory", lambda device: free)
    with pytest.raises(MemoryError, match=r"--quantize stored, which needs "):
        jaxlm.load(path)
    monkeypatch.undo()
    assert jaxlm.load(path, quantize="stored", dtype="float32").dtype == jnp.float32  # what the numbers stand for
    with pytest.raises(ValueError, match="has no quantized weights"):
        jaxlm.load(write(tmp_path / "float.gguf", *tiny_file("llama3")), quantize="stored")

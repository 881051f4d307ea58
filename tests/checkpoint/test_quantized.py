"""Quantized checkpoints: every format beside its values (helpers/quantized_files.py), and models that have them.

The packages of the formats are compared in oracle/test_quantized_oracle.py.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoint_files, quantized_files

import jaxlm
from jaxlm.checkpoint import quantized, quantized_layout
from jaxlm.checkpoint.safetensors import read_header
from jaxlm.cli import main
from jaxlm.nn import params
from jaxlm.nn.quantized import Quantized

F, D = 96, 192


def joined(path, made, faults_expected=False):
    """The Packed of a weight that is stored in a file."""
    arrays = {f"w.{end}": array for end, array in made.arrays.items()}
    tensors = read_header(checkpoint_files.write(path / "model.safetensors", arrays))
    field = "quantization_config" if "quant_method" in made.section else "quantization"
    found, faults = quantized.join(quantized.scheme_of({field: made.section}), tensors)
    assert bool(faults) == faults_expected, faults
    return (found, faults) if faults_expected else found["w.weight"]


@pytest.mark.parametrize("name", quantized_files.CASES)
def test_values_of_every_format(name, tmp_path):
    made = quantized_files.made(name, F, D)
    packed = joined(tmp_path, made)
    assert (packed.shape, packed.dtype) == ((F, D), "BF16")
    weight = quantized_layout.whole(packed, 16)
    found = np.asarray(replace(jax.tree.map(jnp.asarray, weight), dtype=jnp.float32).dense())
    np.testing.assert_array_equal(found, made.values)
    part = np.empty((21, 50), np.float32)
    quantized_layout.dense_into(packed, part, 11, 33)
    np.testing.assert_array_equal(part, made.values[11:32, 33:83])
    assert sum(a.nbytes for a in jax.tree.leaves(weight)) <= 1.3 * packed.loaded_nbytes + 4 * D


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with its values, for each of a few formats."""
    names = ("GPTQ, asymmetric, act-order", "MLX", "int-quantized", "FP8 blocks, powers of two")
    base = tmp_path_factory.mktemp("quantized")
    return {name: quantized_files.folder(base / str(i), name) for i, name in enumerate(names)}


def assert_values(model, values):
    for row in params.tensors(model.family.PARAMS, model.config):
        leaf = params.get(model.weights, row.path)
        found = replace(leaf, dtype=jnp.float32).dense() if isinstance(leaf, Quantized) else leaf
        np.testing.assert_array_equal(np.asarray(found, np.float32), values[row.path], err_msg=row.path)


def of_type(model, dtype):
    """The model with weights that stand for a type."""
    weights = jax.tree.map(
        lambda leaf: replace(leaf, dtype=dtype) if isinstance(leaf, Quantized) else leaf.astype(dtype),
        model.weights,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )
    return replace(model, weights=weights)


@pytest.mark.parametrize("name", ["GPTQ, asymmetric, act-order", "MLX"])
def test_a_model_computes_with_its_values(name, models):
    folder, values = models[name]
    model = jaxlm.load(folder)
    assert_values(model, values)
    assert isinstance(model.weights["embed"], Quantized) == (name == "MLX")
    assert model.dtype == jnp.bfloat16
    dense = jaxlm.load(folder, dtype="float32")
    assert not any(isinstance(leaf, Quantized) for leaf in dense.weights["layers"][0].values())
    assert_values(dense, values)
    tokens = [[3, 1, 4, 1, 5]]
    ours, theirs = (each.forward(tokens, each.weights)[0] for each in (of_type(model, jnp.float32), dense))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(theirs.std()))


def test_activations_are_rounded_where_the_checkpoint_says_so(models):
    """W8A8 of compressed-tensors. int8 weights are read as they are stored."""
    layer = jaxlm.load(models["int-quantized"][0]).weights["layers"][0]
    assert (layer["q"].activations, layer["q"].grouped, layer["q"].q.shape) == (True, False, (2, 32, 64))
    assert_values(jaxlm.load(models["int-quantized"][0]), models["int-quantized"][1])
    assert not jaxlm.load(models["MLX"][0]).weights["layers"][0]["q"].activations


@pytest.mark.parametrize("name", ["GPTQ, asymmetric, act-order", "FP8 blocks, powers of two"])
def test_a_mesh_has_the_same_values(name, models):
    folder, values = models[name]
    model = jaxlm.load(folder, mesh="model=2")
    layer = model.weights["layers"][0]
    assert layer["q"].q.sharding.shard_shape(layer["q"].q.shape)[1] == 1  # of two heads
    assert_values(model, values)
    assert_values(jaxlm.load(folder, dtype="float32", mesh="model=2"), values)


def test_export_writes_dequantized_weights(models, tmp_path):
    """From disk, in slices; config.json has no quantization any more."""
    folder, values = models["GPTQ, asymmetric, act-order"]
    assert main(["export", str(folder), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_values(jaxlm.load(tmp_path / "out"), values)


def test_quantize_replaces_the_quantization_of_the_file(models):
    folder, values = models["MLX"]
    weight = jaxlm.load(folder, quantize="int8-weights").weights["layers"][0]["up"]
    assert (weight.kind, weight.grouped) == ("int8", False)
    assert np.abs(np.asarray(weight.dense(), np.float32) - values["layers.0.up"]).max() < 0.01


def test_info_shows_types_and_bytes(models, capsys):
    assert main(["info", str(models["MLX"][0]), "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert weights["stored"].keys() == {"int4", "bfloat16"}
    model = jaxlm.load(models["MLX"][0])
    assert weights["bytes"] == params.nbytes(model.weights)
    assert main(["info", str(models["MLX"][0])]) == 0
    assert "quantized" in capsys.readouterr().out


def test_info_of_another_type_shows_its_bytes_alone(models, capsys):
    assert main(["info", str(models["MLX"][0]), "--quantize", "int8"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "weights" in line)
    assert "in int8" in line
    assert "quantized" not in line


# What is refused


def test_a_missing_scale_is_an_error(models, tmp_path):
    """Without it, the weight would be its integers."""
    for name, end in (("int-quantized", "weight_scale"), ("GPTQ", "scales"), ("FP8 blocks", "weight_scale_inv"),
                      ("MLX", "biases"), ("pack-quantized, asymmetric", "weight_zero_point")):  # fmt: skip
        made = quantized_files.made(name, F, D)
        arrays = {other: array for other, array in made.arrays.items() if other != end}
        _, faults = joined(tmp_path, made._replace(arrays=arrays), faults_expected=True)
        assert faults == {"missing, which its quantized weight needs": [f"w.{end}"]}


@pytest.mark.parametrize(("inputs", "group"), [(72, 128), (192, 48)])
def test_groups_that_do_not_divide_the_inputs_are_an_error(inputs, group, tmp_path):
    """Nor do products take groups that neither divide a block of 32 inputs nor consist of whole ones."""
    made = quantized_files.fp8_blocks(np.random.default_rng(0), F, inputs, block=(40, group))
    _, faults = joined(tmp_path, made, faults_expected=True)
    assert list(faults.values()) == [["w"]]


def test_unequal_groups_are_an_error(tmp_path):
    made = quantized_files.made("GPTQ", F, D)
    made.arrays["g_idx"][:] = np.minimum(np.arange(D) // 30, 5)
    with pytest.raises(ValueError, match=r"groups of w\.weight"):
        quantized_layout.whole(joined(tmp_path, made), 32)


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "'bitsandbytes', 4 bits"),
    ({"quant_method": "hqq"}, "'hqq'"),
    ({"quant_method": "gptq", "bits": 3}, "'gptq'.*bits is 3"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'gptq'.*'marlin'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'awq'.*'gemv'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "'fp8'.*'e5m2'"),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'compressed-tensors'.*'marlin-24'"),
    ({"group_size": 64, "bits": 4, "mode": "new"}, "'mlx'.*'new'"),
]


@pytest.mark.parametrize(("section", "what"), REFUSED, ids=[what for _, what in REFUSED])
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantizations_are_refused_by_name(section, what, nested, tmp_path):
    """Also without weights, and in the text_config of a model with vision. allow_fields does not help."""
    field = "quantization_config" if "quant_method" in section else "quantization"
    raw = {**checkpoint_files.LLAMA, "_name_or_path": "some/original"}
    raw |= {"text_config": {field: section}} if nested else {field: section}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"quantized \({what}.*What loads: .*\(some/original\).*GGUF") as refused:
        jaxlm.load(tmp_path, allow_fields=(field,))
    assert "allow" not in str(refused.value)

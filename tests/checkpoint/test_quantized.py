"""Quantized checkpoints: every format beside its values (helpers/quantized_files.py), and models that have them.

The packages of the formats are compared in oracle/test_quantized_oracle.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoint_files, quantized_files

import jaxlm
from jaxlm.checkpoint import quantized, quantized_layout
from jaxlm.checkpoint.safetensors import read_header
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
    weight = quantized_layout.whole(packed)
    found = np.asarray(replace(jax.tree.map(jnp.asarray, weight), dtype=jnp.float32).dense())
    np.testing.assert_array_equal(found, made.values)
    part = np.empty((21, 50), np.float32)
    quantized_layout.dense_into(packed, part, 11, 33)
    np.testing.assert_array_equal(part, made.values[11:32, 33:83])
    assert sum(a.nbytes for a in jax.tree.leaves(weight)) <= 1.3 * packed.loaded_nbytes + 4 * D

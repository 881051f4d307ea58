"""The values of quantized formats (helpers/quantized_files.py) beside the packages that define them.

tests/checkpoint/test_quantized.py compares what jaxlm reads with the same values."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.quantized_files import CASES, made

pytestmark = pytest.mark.oracle
F, D = 96, 192


def tensor(a: np.ndarray) -> Any:
    import torch

    others = {ml_dtypes.bfloat16: (np.int16, torch.bfloat16), ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn),
              ml_dtypes.float8_e8m0fnu: (np.uint8, torch.float8_e8m0fnu)}  # fmt: skip
    for theirs, (bits, dtype) in others.items():
        if a.dtype == theirs:
            return torch.from_numpy(np.array(a).view(bits)).view(dtype)
    return torch.from_numpy(np.array(a))


COMPRESSED = [name for name in CASES if "quantized" in name or name.startswith("compressed")]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name: str) -> None:
    """Newer versions of the package have no order of groups."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = made(name, F, D)
    group = weight.section["config_groups"]["group_0"]
    arrays = {end: tensor(array) for end, array in weight.arrays.items()}
    if "act-order" in name:
        group = {**group, "weights": {**group["weights"], "actorder": None}}
        order = np.argsort(weight.arrays["weight_g_idx"], kind="stable")
        arrays.pop("weight_g_idx")
    scheme = QuantizationScheme.model_validate({**group, "format": weight.section["format"]})
    arrays = {end: a.float() if a.dtype == torch.bfloat16 else a for end, a in arrays.items()}  # computed in its type
    compressor: Any = BaseCompressor.get_value_from_registry(weight.section["format"])
    values = weight.values
    if "act-order" in name:  # the weight with its inputs in the order of the groups
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        codes = unpack_from_int32(arrays["weight_packed"], 4, torch.Size((F, D)))
        arrays["weight_packed"], values = pack_to_int32(codes[:, order.tolist()], 4), values[:, order]
    found = compressor.decompress(arrays, scheme)["weight"].float().numpy()
    # NVFP4 is dequantized in bfloat16.
    np.testing.assert_allclose(found, values, rtol=2**-8 if name.endswith("NVFP4") else 0, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("MLX")])
def test_mlx(name: str) -> None:
    import mlx.core as mx

    weight = made(name, F, D)
    scales, biases = weight.arrays["scales"], weight.arrays.get("biases")
    scales = scales if scales.dtype == np.uint8 else scales.astype(np.float32)
    found = mx.dequantize(
        mx.array(weight.arrays["weight"]), mx.array(scales), None if biases is None else mx.array(biases.astype("f4")),
        group_size=weight.section["group_size"], bits=weight.section["bits"],
        mode=weight.section.get("mode", "affine"), dtype=mx.float32, stream=mx.cpu,
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(found), weight.values)


@pytest.mark.parametrize("name", ["FP8 blocks", "FP8 blocks, powers of two"])
def test_fp8_of_transformers(name: str) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight = made(name, F, D)
    found = _dequantize_fp8_weight(
        tensor(weight.arrays["weight"]), tensor(weight.arrays["weight_scale_inv"]),
        weight.section["weight_block_size"], torch.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), weight.values)


def test_awq() -> None:
    """compressed-tensors converts AutoAWQ's files."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter as Converter

    weight = made("AWQ", F, D)
    words, zeros = (tensor(np.ascontiguousarray(weight.arrays[end])) for end in ("qweight", "qzeros"))
    codes, zeros = Converter.reverse_awq_order(*Converter.unpack_awq(words, zeros, 4), 4)
    codes, zeros = (a.numpy() & 15 for a in (codes, zeros))
    group, scales = np.arange(D) // 32, weight.arrays["scales"].astype(np.float32)
    found = scales[group] * (codes.astype(np.float32) - zeros.astype(np.float32)[group])
    np.testing.assert_array_equal(found.T, weight.values)

"""Weights in the formats of quantized checkpoints, packed from random numbers and scales as each format's specification
says, beside their values. tests/oracle/test_quantized_oracle.py compares the values with the formats' own packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from helpers import checkpoint_files
from jaxlm.nn import params

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# A model whose inputs are a multiple of 32, and its widths no power of two.
WIDE = {**checkpoint_files.LLAMA, "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "head_dim": 32}  # fmt: skip


class Made(NamedTuple):
    """A weight: its tensors by the end of their names, its values [F,D] float32, and the section of config.json."""

    arrays: dict[str, np.ndarray]
    values: np.ndarray
    section: dict[str, Any]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as rows of 32-bit words: number i of a row is at bit i * bits of the row."""
    ones = (codes[..., None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(ones.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.int32)


def _scales(rng: Any, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return (rng.uniform(0.001, 0.02, shape)).astype(dtype)


def _affine(codes: np.ndarray, scale: np.ndarray, zeros: Any, group: np.ndarray) -> np.ndarray:
    """Values [F,D]: scale * (code - zero), where `group` is the group of each input."""
    zeros = np.broadcast_to(zeros, scale.shape)
    return scale.astype(np.float32)[:, group] * (codes.astype(np.float32) - zeros.astype(np.float32)[:, group])


def gptq(rng: Any, F: int, D: int, *, bits: int = 4, symmetric: bool = True, act_order: bool = False,
         version: str = "gptq", claims: str | None = None) -> Made:  # fmt: skip
    """claims: what the file says of its version, which may be wrong."""
    codes, scale = rng.integers(0, 1 << bits, (F, D)), _scales(rng, F, D // 32)
    zeros = np.full(scale.shape, 1 << bits - 1) if symmetric else rng.integers(1, 1 << bits, scale.shape)
    group = np.arange(D) // 32
    group = rng.permutation(group) if act_order else group
    arrays = {
        "qweight": packed(codes, bits).T,
        "qzeros": packed((zeros - (version == "gptq")).T, bits),
        "scales": scale.T,
        "g_idx": group.astype(np.int32),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": act_order, "sym": symmetric,
               "checkpoint_format": claims or version}  # fmt: skip
    return Made(arrays, _affine(codes, scale, zeros, group), section)


def awq(rng: Any, F: int, D: int) -> Made:
    codes, scale = rng.integers(0, 16, (F, D)), _scales(rng, F, D // 32)
    zeros = rng.integers(0, 16, scale.shape)

    def along_channels(a: np.ndarray) -> np.ndarray:
        """Of 8 channels, numbers 0, 2, 4, 6, 1, 3, 5, 7 are in this order in a word."""
        return packed(a.T.reshape(a.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(a.shape[1], -1), 4)

    arrays = {"qweight": along_channels(codes), "qzeros": along_channels(zeros), "scales": scale.T}
    section = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return Made(arrays, _affine(codes, scale, zeros, np.arange(D) // 32), section)


def _compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def pack_quantized(rng: Any, F: int, D: int, *, bits: int = 4, symmetric: bool = True, act_order: bool = False,
                   channels: bool = False) -> Made:  # fmt: skip
    codes = rng.integers(0, 1 << bits, (F, D))
    scale = _scales(rng, F, 1 if channels else D // 32, dtype=ml_dtypes.bfloat16)
    zeros = rng.integers(0, 1 << bits, scale.shape)
    group = np.arange(D) // (D if channels else 32)
    group = rng.permutation(group) if act_order else group
    arrays = {"weight_packed": packed(codes, bits), "weight_scale": scale, "weight_shape": np.array([F, D])}
    arrays |= {} if symmetric else {"weight_zero_point": np.ascontiguousarray(packed(zeros.T, bits).T)}
    arrays |= {"weight_g_idx": group.astype(np.int32)} if act_order else {}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": "group" if act_order else None,
               **({"strategy": "channel"} if channels else {"strategy": "group", "group_size": 32})}  # fmt: skip
    middle = 1 << bits - 1
    values = _affine(codes, scale, middle if symmetric else zeros, group)
    return Made(arrays, values, _compressed("pack-quantized", weights))


def int_quantized(rng: Any, F: int, D: int, *, symmetric: bool = True, groups: bool = False) -> Made:
    codes = rng.integers(-128, 128, (F, D)).astype(np.int8)
    scale = _scales(rng, F, D // 32 if groups else 1, dtype=ml_dtypes.bfloat16)
    zeros = rng.integers(-128, 128, scale.shape).astype(np.int8)
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric,
               **({"strategy": "group", "group_size": 32} if groups else {"strategy": "channel"})}  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    arrays = {"weight": codes, "weight_scale": scale, **({} if symmetric else {"weight_zero_point": zeros})}
    values = _affine(codes, scale, 0 if symmetric else zeros, np.arange(D) // (32 if groups else D))
    return Made(arrays, values, _compressed("int-quantized", weights, inputs))


def _e4m3(rng: Any, F: int, D: int) -> np.ndarray:
    """All finite values of the type."""
    return rng.integers(0, 127, (F, D)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn) * rng.choice(
        np.array([-1, 1], ml_dtypes.float8_e4m3fn), (F, D)
    )


def float_quantized(rng: Any, F: int, D: int, *, strategy: str = "channel") -> Made:
    q = _e4m3(rng, F, D)
    scale = _scales(rng, *((1,) if strategy == "tensor" else (F, 1)), dtype=ml_dtypes.bfloat16)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    values = q.astype(np.float32) * scale.astype(np.float32)
    return Made({"weight": q, "weight_scale": scale}, values, _compressed("float-quantized", weights, inputs))


def fp8_blocks(rng: Any, F: int, D: int, *, block: tuple[int, int] = (40, 128), dtype: Any = np.float32) -> Made:
    """The last blocks of both axes are smaller. The scale multiplies, in spite of its name."""
    q = _e4m3(rng, F, D)
    scale = _scales(rng, -(-F // block[0]), -(-D // block[1])).astype(dtype)
    whole = scale.astype(np.float32)[np.arange(F)[:, None] // block[0], np.arange(D) // block[1]]
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
               "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    return Made({"weight": q, "weight_scale_inv": scale}, q.astype(np.float32) * whole, section)


def mlx(rng: Any, F: int, D: int, *, bits: int = 4, dtype: Any = np.float32) -> Made:
    codes, scale = rng.integers(0, 1 << bits, (F, D)), _scales(rng, F, D // 32, dtype=dtype)
    bias = rng.uniform(-0.3, 0.1, scale.shape).astype(dtype)
    group = np.arange(D) // 32
    values = _affine(codes, scale, 0, group) + bias.astype(np.float32)[:, group]
    arrays = {"weight": packed(codes, bits).view(np.uint32), "scales": scale, "biases": bias}
    return Made(arrays, values, {"group_size": 32, "bits": bits})


def microscaled(rng: Any, F: int, D: int, kind: str = "mxfp4", compressed: bool = False) -> Made:
    """MXFP4, MXFP8 and NVFP4, of MLX or compressed-tensors."""
    size, bits = (16 if kind == "nvfp4" else 32), (8 if kind == "mxfp8" else 4)
    if bits == 4:
        codes = rng.integers(0, 16, (F, D))
        q, words = np.where(codes > 7, -1, 1) * E2M1[codes & 7], packed(codes, 4)
    else:
        q = _e4m3(rng, F, D)
        words, q = q.view(np.int32), q.astype(np.float32)
    if kind == "nvfp4":
        stored = rng.uniform(0.01, 1, (F, D // size)).astype(ml_dtypes.float8_e4m3fn)
        scale = stored.astype(np.float32)
    else:
        stored = rng.integers(115, 130, (F, D // size)).astype(np.uint8)
        scale = np.float32(2) ** (stored.astype(np.float32) - 127)
    arrays = {"weight": words.view(np.uint32), "scales": stored.view(np.uint8)}
    section: dict[str, Any] = {"group_size": size, "bits": bits, "mode": kind}
    if compressed:
        weight = ("weight", q.astype(ml_dtypes.float8_e4m3fn)) if bits == 8 else ("weight_packed", words.view(np.uint8))
        arrays = dict([weight, ("weight_scale", stored)])
        if kind == "nvfp4":
            arrays["weight_global_scale"] = np.array([37.5], np.float32)
            scale = scale / np.float32(37.5)
        weights = {"num_bits": bits, "type": "float", "symmetric": True, "group_size": size,
                   "strategy": "tensor_group" if kind == "nvfp4" else "group"}  # fmt: skip
        section = _compressed("mxfp8-quantized" if bits == 8 else f"{kind}-pack-quantized", weights)
    return Made(arrays, (q * np.repeat(scale, size, axis=1)).astype(np.float32), section)


Make = Callable[..., Made]
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "GPTQ": (gptq, {}),
    "GPTQ, version 2": (gptq, {"version": "gptq_v2"}),
    "GPTQ, version 2 named 1": (gptq, {"version": "gptq_v2", "claims": "gptq"}),
    "GPTQ, asymmetric, act-order": (gptq, {"symmetric": False, "act_order": True}),
    "GPTQ, asymmetric, version 2": (gptq, {"symmetric": False, "version": "gptq_v2"}),
    "GPTQ, 8 bits": (gptq, {"bits": 8, "act_order": True}),
    "GPTQ, 8 bits, asymmetric": (gptq, {"bits": 8, "symmetric": False}),
    "AWQ": (awq, {}),
    "pack-quantized": (pack_quantized, {}),
    "pack-quantized, asymmetric": (pack_quantized, {"symmetric": False}),
    "pack-quantized, act-order": (pack_quantized, {"act_order": True}),
    "pack-quantized, channels": (pack_quantized, {"channels": True}),
    "pack-quantized, 8 bits": (pack_quantized, {"bits": 8, "symmetric": False}),
    "pack-quantized, 3 bits": (pack_quantized, {"bits": 3}),
    "int-quantized": (int_quantized, {}),
    "int-quantized, asymmetric": (int_quantized, {"symmetric": False}),
    "int-quantized, groups": (int_quantized, {"groups": True}),
    "float-quantized": (float_quantized, {}),
    "float-quantized, tensor": (float_quantized, {"strategy": "tensor"}),
    "FP8 blocks": (fp8_blocks, {}),
    "FP8 blocks, powers of two": (fp8_blocks, {"dtype": ml_dtypes.float8_e8m0fnu}),
    "MLX": (mlx, {}),
    "MLX, 8 bits": (mlx, {"bits": 8}),
    "MLX, 3 bits": (mlx, {"bits": 3}),
    "MLX, 6 bits": (mlx, {"bits": 6, "dtype": ml_dtypes.bfloat16}),
    "MLX, MXFP4": (microscaled, {}),
    "MLX, MXFP8": (microscaled, {"kind": "mxfp8"}),
    "MLX, NVFP4": (microscaled, {"kind": "nvfp4"}),
    "compressed-tensors, MXFP4": (microscaled, {"compressed": True}),
    "compressed-tensors, MXFP8": (microscaled, {"kind": "mxfp8", "compressed": True}),
    "compressed-tensors, NVFP4": (microscaled, {"kind": "nvfp4", "compressed": True}),
}  # fmt: skip
EMBEDDING = ("MLX",)  # formats that also quantize the embedding


def made(name: str, F: int, D: int, seed: int = 0) -> Made:
    make, options = CASES[name]
    return make(np.random.default_rng(seed), F, D, **options)


def folder(path: Path, name: str, **fields: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny model whose matrices have this format, and its values by path."""
    raw = {**WIDE, **fields}
    arrays, values, section = {}, {}, {}
    plain = checkpoint_files.tensors(raw, "BF16")
    for i, row in enumerate(
        params.tensors(checkpoint_files.FAMILY[raw["model_type"]].PARAMS, checkpoint_files.config(raw))
    ):
        own = row.names[0]
        if row.path.endswith("norm") or (row.path in ("embed", "head") and name.split(",")[0] not in EMBEDDING):
            arrays[own], values[row.path] = plain[own], plain[own].astype(np.float32).reshape(row.shape)
            continue
        weight = made(name, *row.stored_shape, seed=i)
        arrays |= {f"{own.removesuffix('weight')}{end}": array for end, array in weight.arrays.items()}
        values[row.path], section = weight.values.reshape(row.shape), weight.section
    field = "quantization_config" if "quant_method" in section else "quantization"
    return checkpoint_files.folder(path, {**raw, field: section}, arrays), values

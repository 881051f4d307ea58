"""Quantized tensors of GGUF files as nn.quantized.Quantized, without dequantizing them: numbers, scales and minima are
those of the file.

A Quantized has 4 or 8 bits: numbers of 2 and 3 bits take 4, those of 5 and 6 bits, and of tables (IQ4), take 8. Layout
of the blocks: gguf_types.py.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint import gguf_types as types
from jaxlm.checkpoint.gguf_types import BY_NAME
from jaxlm.checkpoint.meta import ConcatTensor, in_pairs
from jaxlm.checkpoint.quantized_layout import Packed, Reader, in_blocks
from jaxlm.checkpoint.safetensors import DTYPES, Tensor, aligned, read_into
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized_cpu import BLOCK

Raw = np.ndarray  # [F,n,bytes of a block]


def packed(tensor: Tensor | ConcatTensor) -> Packed | None:
    """A quantized tensor that stays packed; None for one of floats."""
    part = tensor.parts[0] if isinstance(tensor, ConcatTensor) else tensor
    if part.encoding not in FORMS or len(part.shape) != 2:
        return None
    heads = tensor.H if isinstance(tensor, ConcatTensor) else 0
    bits = 4 if part.encoding in FOUR_BITS else 8
    return Packed(tensor.name, tensor.dtype, tensor.shape, part.encoding, (part,), Reader(_read, heads=heads), bits)


def _read(packed: Packed, begin: int, end: int, heads: int) -> Quantized:
    """Output channels of a tensor. heads: the head width if its rows are ordered by rotated pairs, else 0."""
    [tensor] = packed.parts
    block = BY_NAME[tensor.encoding]
    first, last = (begin // heads * heads, -(-end // heads) * heads) if heads else (begin, end)
    each = tensor.nbytes // tensor.shape[0]
    raw = aligned((last - first) * each).reshape(last - first, each)
    read_into(raw.reshape(-1), tensor, first * each)
    if heads:
        stored, raw = raw, np.empty_like(raw)
        in_pairs(raw, heads)[...] = stored.reshape(-1, heads // 2, 2, each)
        raw = raw[begin - first : end - first]
    made = FORMS[tensor.encoding](raw.reshape(len(raw), -1, block.nbytes))
    return Quantized(**made, grouped=True, inputs=(tensor.shape[1],), dtype=DTYPES[packed.dtype], activations=True)


def _blocks(numbers: np.ndarray, kind: str = "int8") -> dict[str, Any]:
    """q from numbers [F,n,elements of a block]."""
    return {"q": in_blocks(numbers, kind), "kind": kind}


def _halves(raw: Raw, at: int) -> np.ndarray:
    """A float16 of each block [n,F]."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)[..., 0].T


def _groups(scales: np.ndarray) -> np.ndarray:
    """Numbers of the groups of each block [F,n,m] as [n*m,F]."""
    return scales.reshape(len(scales), -1).T


def _unpack(raw: Raw, bits: int, width: int) -> np.ndarray:
    return types.unpack(raw.reshape(-1, raw.shape[-1]), bits, width).reshape(*raw.shape[:2], -1)


def _nibbles(raw: Raw) -> np.ndarray:
    """q of 4 bits, from blocks whose byte i holds numbers i and i + 16, as in a Quantized."""
    return raw.reshape(len(raw), -1, BLOCK // 2)


def _q4_0(raw: Raw) -> dict[str, Any]:
    return {"q": _nibbles(raw[..., 2:]), "kind": "int4", "zero": 8, "scale": _halves(raw, 0)}


def _q4_1(raw: Raw) -> dict[str, Any]:
    return {"q": _nibbles(raw[..., 4:]), "kind": "int4", "scale": _halves(raw, 0), "offset": _halves(raw, 2)}


def _fifth_bits(raw: Raw) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(raw: Raw) -> dict[str, Any]:
    numbers = _unpack(raw[..., 6:], 4, 16) | _fifth_bits(raw[..., 2:6])
    return {**_blocks(numbers.view(np.int8) - np.int8(16)), "scale": _halves(raw, 0)}


def _q5_1(raw: Raw) -> dict[str, Any]:
    numbers = _unpack(raw[..., 8:], 4, 16) | _fifth_bits(raw[..., 4:8])
    return {**_blocks(numbers.view(np.int8)), "scale": _halves(raw, 0), "offset": _halves(raw, 2)}


def _q8_0(raw: Raw) -> dict[str, Any]:
    return {**_blocks(raw[..., 2:].view(np.int8)), "scale": _halves(raw, 0)}


def _minima(raw: Raw, scale: np.ndarray, minimum: np.ndarray, at: int) -> dict[str, Any]:
    """Integers of groups, times two float16 of the block, the second of which is subtracted."""
    return {"scale": _groups(scale), "offset": _groups(minimum),
            "outer_scale": _halves(raw, at), "outer_offset": -_halves(raw, at + 2)}  # fmt: skip


def _q2_k(raw: Raw) -> dict[str, Any]:
    scales = raw[..., :16]
    return {**_blocks(_unpack(raw[..., 16:80], 2, 32), "int4"), **_minima(raw, scales & 15, scales >> 4, 80)}


def _q3_k(raw: Raw) -> dict[str, Any]:
    # A high bit of 0 subtracts 4.
    numbers = _unpack(raw[..., 32:96], 2, 32) | _unpack(raw[..., :32], 1, 32) << np.uint8(2)
    scales = (_unpack(raw[..., 96:104], 4, 8) | _unpack(raw[..., 104:108], 2, 4) << np.uint8(4)).view(np.int8)
    return {**_blocks(numbers, "int4"), "zero": 4, "scale": _groups(scales - np.int8(32)),
            "outer_scale": _halves(raw, 108)}  # fmt: skip


def _k_scales(raw: Raw) -> dict[str, Any]:
    scale, minimum = types.k_factors(raw.reshape(-1, raw.shape[-1]))
    return _minima(raw, scale.reshape(*raw.shape[:2], 8), minimum.reshape(*raw.shape[:2], 8), 0)


def _q4_k(raw: Raw) -> dict[str, Any]:
    # Of each 32 bytes, the low bits are one block of inputs and the high bits the next.
    data = raw[..., 16:].reshape(len(raw), -1, 1, 2, BLOCK // 2)
    first, second = data[..., 0, :], data[..., 1, :]
    low, high = first & 15 | second << np.uint8(4), first >> np.uint8(4) | second & 240
    return {"q": _nibbles(np.concatenate([low, high], axis=2)), "kind": "int4", **_k_scales(raw)}


def _q5_k(raw: Raw) -> dict[str, Any]:
    numbers = _unpack(raw[..., 48:], 4, 32) | _unpack(raw[..., 16:48], 1, 32) << np.uint8(4)
    return {**_blocks(numbers.view(np.int8)), **_k_scales(raw)}


def _q6_k(raw: Raw) -> dict[str, Any]:
    numbers = _unpack(raw[..., :128], 4, 64) | _unpack(raw[..., 128:192], 2, 32) << np.uint8(4)
    return {**_blocks(numbers.view(np.int8) - np.int8(32)), "scale": _groups(raw[..., 192:208].view(np.int8)),
            "outer_scale": _halves(raw, 208)}  # fmt: skip


def _iq4_nl(raw: Raw) -> dict[str, Any]:
    return {**_blocks(types.IQ4.astype(np.int8)[_unpack(raw[..., 2:], 4, 16)]), "scale": _halves(raw, 0)}


def _iq4_xs(raw: Raw) -> dict[str, Any]:
    scales = _unpack(raw[..., 4:8], 4, 1) | _unpack(raw[..., 2:4], 2, 1) << np.uint8(4)
    return {**_blocks(types.IQ4.astype(np.int8)[_unpack(raw[..., 8:], 4, 16)]),
            "scale": _groups(scales.view(np.int8) - np.int8(32)), "outer_scale": _halves(raw, 0)}  # fmt: skip


def _mxfp4(raw: Raw) -> dict[str, Any]:
    scale = np.ldexp(np.float32(1), raw[..., 0].astype(np.int32) - 128).T  # half, as codes are twice the values
    return {"q": _nibbles(raw[..., 1:]), "kind": "mxfp4", "scale": scale.astype(jnp.bfloat16)}


# The types that stay packed, and the function of each from blocks to fields of Quantized.
FORMS: dict[str, Callable[[Raw], dict[str, Any]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
FOUR_BITS = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "MXFP4")

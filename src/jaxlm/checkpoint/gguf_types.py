"""The tensor types of GGUF: their sizes, the float32 values of their blocks, and blocks from float32 values.

A row of a tensor is divided into blocks of a fixed number of elements. A block holds small integers and their scales.
Source: the structs block_* and functions dequantize_row_* and quantize_row_*_ref of ggml (ggml-common.h,
ggml-quants.c).
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np


class BlockType(NamedTuple):
    """A tensor type: its name, and the elements and bytes of a block."""

    name: str
    elements: int
    nbytes: int


# Number of a type in a file: the type. Numbers that are not here were never published, or are gone from ggml.
TYPES = {
    number: BlockType(name, elements, nbytes)
    for number, name, elements, nbytes in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    )
}  # fmt: skip
BY_NAME = {block.name: block for block in TYPES.values()}
# The values of 4 bits in IQ4_NL and IQ4_XS, and in MXFP4 (twice those of e2m1).
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def dequantize(name: str, raw: np.ndarray) -> np.ndarray:
    """The float32 values of whole blocks.

    Args:
        name: Name of a type in READABLE.
        raw: Bytes of the blocks [...,n * bytes of a block] uint8.

    Returns:
        [...,n * elements of a block] float32.
    """
    block = BY_NAME[name]
    with np.errstate(all="ignore"):  # a scale may be NaN or infinite
        values = _DEQUANTIZE[name](raw.reshape(-1, block.nbytes))
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // block.nbytes * block.elements)


def _float(raw: np.ndarray, dtype: type = np.float16) -> np.ndarray:
    """Bytes as numbers of a type, in float32."""
    return np.ascontiguousarray(raw).view(dtype).astype(np.float32)


def unpack(raw: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Numbers of a few bits [n,m] from bytes [n,m * bits / 8]. Of each `width` bytes, the lowest bits of all bytes are
    the first `width` numbers, the next bits the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers = raw.reshape(len(raw), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return numbers.reshape(len(raw), -1)


def _scaled(scale: np.ndarray, numbers: np.ndarray, minimum: np.ndarray | None = None) -> np.ndarray:
    """scale * numbers - minimum. Scales and minima [n,m] each belong to an m-th of the numbers of a block."""
    values = numbers.reshape(*scale.shape, -1).astype(np.float32, copy=False)
    values = scale[:, :, None] * values
    return values if minimum is None else values - minimum[:, :, None]


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), unpack(raw[:, 2:], 4, 16).astype(np.int8) - np.int8(8))


def _q4_1(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), unpack(raw[:, 4:], 4, 16)) + _float(raw[:, 2:4])[:, :, None]


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Numbers of 5 bits: four in `low`, and the fifth of number i in bit i of `high`."""
    return unpack(low, 4, 16) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), _five_bits(raw[:, 6:], raw[:, 2:6]).astype(np.int8) - np.int8(16))


def _q5_1(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), _five_bits(raw[:, 8:], raw[:, 4:8])) + _float(raw[:, 2:4])[:, :, None]


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), raw[:, 2:].view(np.int8))


def _q2_k(raw: np.ndarray) -> np.ndarray:
    scales, numbers, d, least = np.split(raw, [16, 80, 82], axis=1)
    scale, minimum = _float(d) * (scales & 15).astype(np.float32), _float(least) * (scales >> 4).astype(np.float32)
    return _scaled(scale, unpack(numbers, 2, 32), minimum)


def _q3_k(raw: np.ndarray) -> np.ndarray:
    high, low, scales, d = np.split(raw, [32, 96, 108], axis=1)
    # 16 scales of 6 bits: 4 bits of each in 8 bytes, then 2 bits of each in 4 bytes.
    scales = (unpack(scales[:, :8], 4, 8) | unpack(scales[:, 8:], 2, 4) << np.uint8(4)).astype(np.int8) - np.int8(32)
    # A high bit of 0 subtracts 4.
    numbers = (unpack(low, 2, 32) | unpack(high, 1, 32) << np.uint8(2)).astype(np.int8) - np.int8(4)
    return _scaled(_float(d) * scales.astype(np.float32), numbers)


def k_factors(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors [n,8] of 6 bits, in 12 bytes, of the scales and minima of Q4_K and Q5_K.

    Bytes 0 to 3 hold scales 0 to 3, bytes 4 to 7 minima 0 to 3, in their low 6 bits. The low and high 4 bits of bytes 8
    to 11 are the low bits of scales and minima 4 to 7, whose high bits are the highest 2 bits of the first 8 bytes.
    """
    a, b, c = np.split(raw[:, 4:16], 3, axis=1)
    return np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1), np.concatenate(
        [b & 63, c >> 4 | b >> 6 << 4], axis=1
    )


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima [n,8] of Q4_K and Q5_K: factors, times the block's two float16."""
    scale, minimum = (factor.astype(np.float32) for factor in k_factors(raw))
    return _float(raw[:, :2]) * scale, _float(raw[:, 2:4]) * minimum


def _q4_k(raw: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(raw)
    return _scaled(scale, unpack(raw[:, 16:], 4, 32), minimum)


def _q5_k(raw: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(raw)
    numbers = unpack(raw[:, 48:], 4, 32) | unpack(raw[:, 16:48], 1, 32) << np.uint8(4)
    return _scaled(scale, numbers, minimum)


def _q6_k(raw: np.ndarray) -> np.ndarray:
    low, high, scales, d = np.split(raw, [128, 192, 208], axis=1)
    numbers = (unpack(low, 4, 64) | unpack(high, 2, 32) << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _scaled(_float(d) * _float(scales, np.int8), numbers)


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    return _scaled(_float(raw[:, :2]), IQ4[unpack(raw[:, 2:], 4, 16)])


def _iq4_xs(raw: np.ndarray) -> np.ndarray:
    # 8 scales of 6 bits: 2 bits of each in a 16-bit number, 4 bits of each in 4 bytes, two scales in a byte.
    high, low = np.split(raw[:, 2:8], [2], axis=1)
    scales = (unpack(low, 4, 1) | unpack(high, 2, 1) << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _scaled(_float(raw[:, :2]) * scales.astype(np.float32), IQ4[unpack(raw[:, 8:], 4, 16)])


def _mxfp4(raw: np.ndarray) -> np.ndarray:
    # Half of 2^(e - 127), because _E2M1 has twice the values. In float32, 2^-127 and 2^-128 are subnormal.
    scale = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128)
    return _scaled(scale, _E2M1[unpack(raw[:, 1:], 4, 16)])


# The types that are read, and the function of each from blocks [n,bytes] uint8 to float32.
_DEQUANTIZE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": lambda raw: _float(raw, np.float64),
    "F32": lambda raw: _float(raw, np.float32),
    "F16": _float,
    "BF16": lambda raw: _float(raw, ml_dtypes.bfloat16),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
READABLE = tuple(_DEQUANTIZE)


def quantize(name: str, values: np.ndarray) -> np.ndarray:
    """The blocks of float32 values: the inverse of `dequantize`, up to rounding.

    Args:
        name: Name of a type in QUANTIZABLE.
        values: [...,n * elements of a block] float32.

    Returns:
        Bytes of the blocks [...,n * bytes of a block] uint8.

    Raises:
        ValueError: A value is not finite, or a scale exceeds float16.
    """
    block = BY_NAME[name]
    with np.errstate(all="ignore"):
        scale, numbers = _QUANTIZE[name](values.reshape(-1, block.elements))
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"values that are not finite, or too large for {name}")
    raw = np.concatenate([half.view(np.uint8), numbers], axis=1)
    return raw.reshape(*values.shape[:-1], values.shape[-1] // block.elements * block.nbytes)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 for a block of zeros."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _to_q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n,1] float32 and bytes [n,32]. Halves are rounded away from 0, as C's roundf does."""
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(scale)
    whole = np.floor(np.abs(scaled))
    rounded = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
    return scale, rounded.astype(np.int8).view(np.uint8)


def _to_q4_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n,1] float32 and bytes [n,16]. The value of largest magnitude becomes -8, the lowest of 4 bits."""
    largest = np.abs(values).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(values, largest, axis=1) / np.float32(-8)
    numbers = (values * _inverse(scale) + np.float32(8.5)).astype(np.int8).clip(0, 15).astype(np.uint8)
    return scale, numbers[:, :16] | numbers[:, 16:] << np.uint8(4)


_QUANTIZE = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}
QUANTIZABLE = tuple(_QUANTIZE)

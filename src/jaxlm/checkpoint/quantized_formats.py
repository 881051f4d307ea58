"""The formats of quantized checkpoints in safetensors: how the tensors of a module make one weight.

All weights are scale * (number - zero). Where zeros differ from group to group, they become offsets of the groups,
which is exact in float32. Numbers of fewer than 4 bits take 4 bits, those of 5 to 7 bits take 8.

Sources: compressed_tensors/compressors in neuralmagic/compressed-tensors; integrations/finegrained_fp8.py in
huggingface/transformers; nn_modules/qlinear in AutoGPTQ/AutoGPTQ and ModelCloud/GPTQModel; utils/packing_utils.py in
casper-hansen/AutoAWQ; mlx.core.dequantize in ml-explore/mlx.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.quantized_layout import Packed, in_blocks, read_all, read_columns, read_rows
from jaxlm.checkpoint.safetensors import DTYPES, Tensor
from jaxlm.nn.quantized import Quantized

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where each of 8 columns is in a number of 32 bits


def _part(packed: Packed, end: str) -> Tensor:
    """A part that must be there."""
    if (tensor := packed.part(end)) is None:
        raise AssertionError(f"{packed.name} has no {end}")
    return tensor


def _made(packed: Packed, **fields: Any) -> Quantized:
    return Quantized(**fields, inputs=(packed.shape[1],), dtype=DTYPES[packed.dtype])


# Numbers of a few bits


def numbers(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers [n,m * 32 / bits] from a stream of bits in 32-bit words [n,m], lowest bits first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        out = np.empty((*raw.shape, 2), np.uint8)
        np.bitwise_and(raw, 15, out=out[..., 0])
        np.right_shift(raw, 4, out=out[..., 1])
        return out.reshape(len(raw), -1)
    stream = np.unpackbits(raw, axis=-1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(raw), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def _integers(packed: Packed, codes: np.ndarray, bits: int, scale: np.ndarray, zeros: Any, **more: Any) -> Quantized:
    """A weight of integers.

    Args:
        packed: the weight.
        codes: unsigned numbers [F,D].
        bits: their bits.
        scale: scales of the groups [g,F].
        zeros: zeros of the groups [g,F], or one for all.
        more: other fields.
    """
    kind, middle = ("int4", 1 << bits - 1) if bits <= 4 else ("int8", 0)
    if kind == "int8":  # signed, so that products are of small numbers
        codes, zeros = (codes - np.uint8(1 << bits - 1)).view(np.int8), np.int32(zeros) - (1 << bits - 1)
    offset = None
    if np.ndim(zeros):
        offset = (np.float32(middle) - zeros.astype(np.float32)) * scale.astype(np.float32)
        zeros = middle
    return _made(packed, q=in_blocks(codes, kind), scale=scale, offset=offset, kind=kind,
                 zero=int(zeros), grouped=True, **more)  # fmt: skip


# Numbers of 8 bits that are stored as they are


def eight_bits(packed: Packed, begin: int, end: int, *, scale: str, block: Any = None, activations: bool) -> Quantized:
    """int8 or e4m3 with scales of the whole weight, of channels, of groups of inputs, or of blocks.

    Args:
        packed: `weight`, the scales, and zeros if they are not 0 (`weight_zero_point`).
        begin: first channel.
        end: last channel + 1.
        scale: name of the scales.
        block: channels and inputs of a block.
        activations: whether activations are rounded too.
    """
    weight, of_scale = _part(packed, ".weight"), _part(packed, scale)
    channels, width = packed.shape
    q, scales = read_rows(weight, begin, end), read_all(of_scale)
    scales = scales if of_scale.dtype in DTYPES else scales.astype(np.float32)  # powers of two (e8m0)
    kind = "fp8" if weight.dtype == "F8_E4M3" else "int8"
    zero_point = packed.part(".weight_zero_point")
    zeros = None if zero_point is None else read_all(zero_point).astype(np.float32)
    if packed.in_rows:
        scales = np.broadcast_to(scales.reshape(-1), channels)[begin:end]
        return _made(packed, q=q, scale=np.ascontiguousarray(scales), kind=kind, activations=activations)
    groups, zeros = (None if a is None else _spread(a, channels, width, block)[begin:end].T for a in (scales, zeros))
    assert groups is not None
    offset = None if zeros is None else -zeros * groups.astype(np.float32)
    return _made(
        packed, q=in_blocks(q, kind), scale=groups, offset=offset, kind=kind, grouped=True, activations=activations
    )


def _spread(a: np.ndarray, channels: int, width: int, block: Any) -> np.ndarray:
    """Numbers of blocks, groups or channels as those of each group of each channel [F,g]."""
    if not block:
        return np.broadcast_to(a.reshape(-1, 1) if a.ndim < 2 else a, (channels, a.shape[1] if a.ndim == 2 else 1))
    group = math.gcd(block[1], width)  # the last block of inputs may be smaller
    of_group = np.arange(width // group) * group // block[1]
    return a[np.arange(channels)[:, None] // block[0], of_group]


# Integers of a few bits


def pack_quantized(packed: Packed, begin: int, end: int, *, bits: int) -> Quantized:
    """compressed-tensors: numbers + 2^(bits - 1), packed along the inputs; zeros likewise, along the channels."""
    words = read_rows(_part(packed, ".weight_packed"), begin, end)
    scale, index = read_rows(_part(packed, ".weight_scale"), begin, end).T, packed.part(".weight_g_idx")
    zeros: Any = 1 << bits - 1
    if (zero_point := packed.part(".weight_zero_point")) is not None:
        stored = read_all(zero_point)  # [F * bits / 32,g]
        zeros = numbers(stored.T, bits)[:, begin:end]
    codes = numbers(words, bits)[:, : packed.shape[1]]
    order = None if index is None else _order(packed, read_all(index), len(scale))
    codes = codes if order is None else codes[:, order]
    return _integers(packed, codes, bits, scale, zeros, order=order)


def gptq(packed: Packed, begin: int, end: int, *, bits: int, symmetric: bool, first_version: bool) -> Quantized:
    """GPTQ: numbers packed along the inputs, zeros along the channels.

    The first version of the format stores zeros less one. Files do not always state their version: in a symmetric
    weight all zeros are the middle, in both versions.
    """
    words, stored = read_columns(_part(packed, ".qweight"), begin, end), read_all(_part(packed, ".qzeros"))
    scale, index = read_columns(_part(packed, ".scales"), begin, end), packed.part(".g_idx")
    zeros: Any = numbers(stored, bits)[:, : packed.shape[0]]
    middle = 1 << bits - 1
    if symmetric and any((zeros == value).all() for value in (middle, middle - 1)):
        zeros = middle
    else:
        zeros = (zeros[:, begin:end] + np.uint8(first_version)) & np.uint8((1 << bits) - 1)
    codes = numbers(words.T, bits)
    order = None if index is None else _order(packed, read_all(index), len(scale))
    codes = codes if order is None else codes[:, order]
    return _integers(packed, codes, bits, scale, zeros, order=order)


def _order(packed: Packed, index: np.ndarray, groups: int) -> np.ndarray | None:
    """The order of inputs in which groups are consecutive; None if they are. index: the group of each input [D]."""
    width = packed.shape[1]
    if index.size == 1 and index[0] < 0:  # compressed-tensors: not used
        return None
    if width % groups or not np.array_equal(np.bincount(index, minlength=groups), np.full(groups, width // groups)):
        raise ValueError(f"{packed.file}: the groups of {packed.name} do not have equal numbers of inputs: use the "
                         "original model")  # fmt: skip
    order = np.argsort(index, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(width)) else order


def awq(packed: Packed, begin: int, end: int, *, bits: int) -> Quantized:
    """AWQ (version gemm): numbers and zeros packed along the channels, in the order of AWQ_ORDER."""
    each = 32 // bits
    words = slice(begin // each, -(-end // each))

    def ordered(stored: np.ndarray) -> np.ndarray:
        found = numbers(stored, bits)
        return found.reshape(len(found), -1, each)[..., AWQ_ORDER].reshape(len(found), -1)

    codes = ordered(read_columns(_part(packed, ".qweight"), words.start, words.stop))
    zeros = ordered(read_all(_part(packed, ".qzeros"))[:, words])
    scale = read_columns(_part(packed, ".scales"), begin, end)
    return _integers(packed, codes.T, bits, scale, zeros)


def mlx(packed: Packed, begin: int, end: int, *, bits: int) -> Quantized:
    """MLX, mode affine: scale * number + bias of each group."""
    codes = numbers(read_rows(_part(packed, ".weight"), begin, end), bits)
    scale, bias = (read_rows(_part(packed, name), begin, end).T for name in (".scales", ".biases"))
    kind = "int4" if bits <= 4 else "int8"
    return _made(packed, q=in_blocks(codes, kind), scale=scale, offset=bias, kind=kind, grouped=True)


# Floating point numbers of 4 and 8 bits with a scale for each group


def microscaled(packed: Packed, begin: int, end: int, *, weight: str, scale: str, bits: int) -> Quantized:
    """MXFP4, MXFP8 and NVFP4: e2m1 or e4m3, with scales that are powers of two (e8m0) or e4m3.

    NVFP4 also has a scale of the weight, by which the others are divided (compressed-tensors) or not (MLX).
    """
    stored = read_rows(_part(packed, weight), begin, end)
    raw = np.ascontiguousarray(stored).view(np.uint8)
    scales = read_rows(_part(packed, scale), begin, end).T
    half = bits == 4  # a Quantized has twice the values of e2m1
    if packed.encoding == "nvfp4":
        scales = scales.view(jnp.float8_e4m3fn).astype(np.float32) / np.float32(2)
        if (whole := packed.part(".weight_global_scale")) is not None:
            scales /= read_all(whole).reshape(()).astype(np.float32)
    else:
        scales = np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - 127 - half).astype(jnp.bfloat16)
    kind, codes = ("mxfp4", numbers(raw, 4)) if half else ("fp8", raw.view(jnp.float8_e4m3fn))
    return _made(packed, q=in_blocks(codes, kind), scale=scales, kind=kind, grouped=True)

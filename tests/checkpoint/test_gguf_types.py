"""Blocks of GGUF's tensor types. oracle/test_gguf_oracle.py compares them with llama.cpp's package, bit for bit; here
are blocks worked out by hand, and digests of what that comparison has found equal."""

import hashlib

import numpy as np
import pytest

from jaxlm.checkpoint.gguf_types import BY_NAME, READABLE, dequantize

ONE, TWO = b"\x00\x3c", b"\x00\x40"  # float16
DIGESTS = {
    "F64": "ebeff5eaf214747a",
    "F32": "107e90b859490dc6",
    "F16": "ceb2e184cf6b8177",
    "BF16": "e23d10e2b377ca50",
    "Q8_0": "c9607a37ebe037b7",
    "Q4_0": "ea42cae8934e5823",
    "Q4_1": "fdec483ad4e1cee6",
    "Q5_0": "adeb9c34efd5e8d8",
    "Q5_1": "ad8b2e1503eb9f7d",
    "Q2_K": "9ff753bafcf47cca",
    "Q3_K": "43753b3486063121",
    "Q4_K": "9957762e0c342fa3",
    "Q5_K": "576b4d34b5ac7116",
    "Q6_K": "94d13d5036c8341f",
    "IQ4_NL": "13b0a1b4eeacc0fd",
    "IQ4_XS": "4a84ac8dd8d33ef4",
    "MXFP4": "0027fa43e4315f6c",
}


def blocks(name: str) -> np.ndarray:
    return np.random.RandomState(3).randint(0, 256, (8, 4 * BY_NAME[name].nbytes)).astype(np.uint8)


def values(name: str, data: bytes) -> list[float]:
    return dequantize(name, np.frombuffer(data, np.uint8)).tolist()


@pytest.mark.parametrize("name", READABLE)
def test_values_are_those_that_were_compared(name):
    found = dequantize(name, blocks(name))
    assert found.dtype == np.float32
    assert found.shape == (8, 4 * BY_NAME[name].elements)
    found = np.where(np.isnan(found), np.float32(0), found)  # the bits of a NaN differ by machine
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == DIGESTS[name]


def test_blocks_of_32():
    numbers = bytes(range(16, 32))  # low 4 bits 0 to 15, high 4 bits 1
    low, high = list(range(16)), [1] * 16
    assert values("Q4_0", TWO + numbers) == [2.0 * (n - 8) for n in low + high]
    assert values("Q4_1", TWO + ONE + numbers) == [2.0 * n + 1 for n in low + high]
    fifth = b"\x01\x00\x00\x80"  # of the first and the last number
    added = [16] + [0] * 30 + [16]
    assert values("Q5_0", TWO + fifth + numbers) == [2.0 * (n + a - 16) for n, a in zip(low + high, added)]
    assert values("Q5_1", TWO + ONE + fifth + numbers) == [2.0 * (n + a) + 1 for n, a in zip(low + high, added)]
    assert values("Q8_0", TWO + bytes(range(240, 256)) + bytes(16)) == [2.0 * (n - 16) for n in range(16)] + [0.0] * 16
    table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert values("IQ4_NL", ONE + numbers) == [float(n) for n in table + [-104] * 16]
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e2m1 += [-n for n in e2m1]
    assert values("MXFP4", b"\x80" + numbers) == [2.0 * n for n in e2m1 + [0.5] * 16]


def test_q4_k_has_a_scale_and_a_minimum_for_each_32():
    scales, minima = [1, 2, 3, 4, 17, 34, 51, 63], [5, 6, 7, 8, 18, 35, 52, 60]
    packed = bytes(scales[i] | scales[i + 4] >> 4 << 6 for i in range(4))
    packed += bytes(minima[i] | minima[i + 4] >> 4 << 6 for i in range(4))
    packed += bytes(scales[i + 4] & 15 | (minima[i + 4] & 15) << 4 for i in range(4))
    numbers = bytes([0x21] * 32 + [0x43] * 32 + [0x65] * 32 + [0x87] * 32)
    expected = [float(2 * s * (i + 1) - m) for i, (s, m) in enumerate(zip(scales, minima))]
    assert values("Q4_K", TWO + ONE + packed + numbers) == np.repeat(expected, 32).tolist()
    high = bytes([0b10] * 32)  # the fifth bit of numbers 32 to 63
    expected[1] += 2 * 2 * 16
    assert values("Q5_K", TWO + ONE + packed + high + numbers) == np.repeat(expected, 32).tolist()

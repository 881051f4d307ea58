"""Published specifications of accelerators, one line each, and the names of slices: `v5e-8`, `v5p-8`, `H100-8`.

A figure is that of one device of jax. On TPU v2, v3 and TPU7x a device is one of a chip's two cores, so the figures of
the chip are halved. Published gigabytes count as 10^9 bytes, the smaller of the two readings.
"""

import difflib
import math
import re
from typing import Any, NamedTuple

GOOGLE, NVIDIA = "https://docs.cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us"


class Spec(NamedTuple):
    """Published figures of one device.

    Attributes:
        name: What --device takes.
        kind: Prefix of jax's device_kind.
        platform: "tpu" or "gpu".
        memory: Bytes.
        bandwidth: Of that memory, bytes/s.
        flops: Dense bfloat16 FLOP/s with accumulation in float32.
        link: Bytes/s that a device sends to the others of its slice or host, in one direction.
        clock: Hz, of TPUs: from `flops` and the number and size of the matrix units. 0: not used.
        cores: By how many a device counts in the name of a slice: v5p-8 has 8 cores, which are 4 devices of jax.
        source: Page of the figures.
    """

    name: str
    kind: str
    platform: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    clock: float
    cores: int
    source: str


# The first kind that matches counts, so a variant stands before the general name.
DEVICES: tuple[Spec, ...] = (
    Spec("v2", "TPU v2", "tpu", 8e9, 350e9, 22.5e12, 124e9, 0.7e9, 1, f"{GOOGLE}/v2"),
    Spec("v3", "TPU v3", "tpu", 16e9, 450e9, 61.5e12, 164e9, 0.94e9, 1, f"{GOOGLE}/v3"),
    Spec("v4", "TPU v4", "tpu", 32e9, 1200e9, 275e12, 300e9, 1.05e9, 2, f"{GOOGLE}/v4"),
    Spec("v5e", "TPU v5 lite", "tpu", 16e9, 819e9, 197e12, 200e9, 1.5e9, 1, f"{GOOGLE}/v5e"),
    Spec("v5p", "TPU v5", "tpu", 95e9, 2765e9, 459e12, 600e9, 1.75e9, 2, f"{GOOGLE}/v5p"),
    Spec("v6e", "TPU v6 lite", "tpu", 32e9, 1640e9, 918e12, 400e9, 1.75e9, 1, f"{GOOGLE}/v6e"),
    Spec("tpu7x", "TPU7x", "tpu", 96e9, 3690e9, 1153.5e12, 300e9, 0, 1, f"{GOOGLE}/tpu7x"),
    Spec("A100-40GB", "NVIDIA A100-SXM4-40GB", "gpu", 40e9, 1555e9, 312e12, 300e9, 0, 1, f"{NVIDIA}/data-center/a100"),
    Spec(
        "A100-PCIe-40GB", "NVIDIA A100-PCIE-40GB", "gpu", 40e9, 1555e9, 312e12, 32e9, 0, 1, f"{NVIDIA}/data-center/a100"
    ),
    Spec("A100-PCIe", "NVIDIA A100 80GB PCIe", "gpu", 80e9, 1935e9, 312e12, 32e9, 0, 1, f"{NVIDIA}/data-center/a100"),
    Spec("A100", "NVIDIA A100", "gpu", 80e9, 2039e9, 312e12, 300e9, 0, 1, f"{NVIDIA}/data-center/a100"),
    Spec("H100-PCIe", "NVIDIA H100 PCIe", "gpu", 80e9, 2000e9, 756e12, 64e9, 0, 1, f"{NVIDIA}/data-center/h100"),
    Spec("H100-NVL", "NVIDIA H100 NVL", "gpu", 94e9, 3900e9, 835e12, 300e9, 0, 1, f"{NVIDIA}/data-center/h100"),
    Spec("H100", "NVIDIA H100", "gpu", 80e9, 3350e9, 989e12, 450e9, 0, 1, f"{NVIDIA}/data-center/h100"),
    Spec("H200-NVL", "NVIDIA H200 NVL", "gpu", 141e9, 4800e9, 835e12, 450e9, 0, 1, f"{NVIDIA}/data-center/h200"),
    Spec("H200", "NVIDIA H200", "gpu", 141e9, 4800e9, 989e12, 450e9, 0, 1, f"{NVIDIA}/data-center/h200"),
    Spec("B200", "NVIDIA B200", "gpu", 180e9, 8000e9, 2250e12, 900e9, 0, 1, f"{NVIDIA}/data-center/dgx-b200"),
    Spec("L4", "NVIDIA L4", "gpu", 24e9, 300e9, 121e12, 32e9, 0, 1, f"{NVIDIA}/data-center/l4"),
    Spec("L40S", "NVIDIA L40S", "gpu", 48e9, 864e9, 362e12, 32e9, 0, 1, f"{NVIDIA}/data-center/l40s"),
    Spec("A10", "NVIDIA A10", "gpu", 24e9, 600e9, 125e12, 32e9, 0, 1, f"{NVIDIA}/data-center/products/a10-gpu"),
)
BY_NAME = {spec.name: spec for spec in DEVICES}


def find(kind: str) -> Spec | None:
    """The specification of a device by jax's device_kind; None if it is not in the table, or a part of a GPU (MIG)."""
    if "MIG" in kind:
        return None
    kind = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind)
    if kind.startswith("TPU"):
        return next((spec for spec in DEVICES if spec.kind == kind), None)
    return next((spec for spec in DEVICES if re.match(rf"{re.escape(spec.kind)}(?!\w)", kind)), None)


def names() -> str:
    """The names that `parse` accepts, for messages."""
    return ", ".join(BY_NAME)


def parse(text: str, count: int | None = None) -> tuple[Spec, int]:
    """The specification and the number of devices of a name such as `v5e`, `v5e-8` or `H100-8`.

    TPU slices are named as Google names them: v2, v3, v4 and v5p by cores (v5p-8 has 4 devices, v2-8 has 8), v5e and
    v6e by chips.

    Args:
        text: The name, in any case.
        count: Number of devices, if the name has none.

    Raises:
        ValueError: The device is unknown, or the count is wrong or given twice with different values.
    """
    known = {name.lower(): spec for name, spec in BY_NAME.items()}
    name, _, number = text.rpartition("-")
    spec = known.get(text.lower())
    if spec is None and number.isdecimal():
        spec = known.get(name.lower())
        if spec is not None:
            cores = int(number)
            if cores < 1 or cores % spec.cores:
                named = f"{spec.name}-{spec.cores * max(1, cores // spec.cores)}"
                why = (
                    f"{spec.name} is named by cores, {spec.cores} a device" if spec.cores > 1 else "at least one device"
                )
                raise ValueError(f"device {text!r}: {why}: try {named}")
            if count is not None and count != cores // spec.cores:
                raise ValueError(f"device {text!r} has {cores // spec.cores} devices, but {count} are asked for")
            count = cores // spec.cores
    if spec is None:
        close = difflib.get_close_matches(text.lower(), known, 1)
        hint = f"did you mean {known[close[0]].name}? " if close else ""
        raise ValueError(f"unknown device {text!r}: {hint}known are {names()}, each with a count as in v5e-8")
    if count is not None and count < 1:
        raise ValueError(f"device {text!r}: {count} devices; at least one is needed")
    return spec, count or 1


def slice_name(spec: Spec, count: int) -> str:
    """The name of `count` devices: v5e-8, v5p-8 (4 devices), H100 (one)."""
    return spec.name if count == 1 and spec.platform == "gpu" else f"{spec.name}-{count * spec.cores}"


def of_device(device: Any) -> Spec | None:
    """The specification of a device of jax; None for a CPU or a device that is not in the table."""
    return None if device.platform == "cpu" else find(device.device_kind)


def slice_shapes(spec: Spec) -> dict[int, tuple[int, ...]]:
    """Sizes of the slices of a TPU: number of devices -> chips along each side."""
    if spec.name in ("v4", "v5p", "tpu7x"):  # a torus of three axes
        powers = ((power // 3, (power + 1) // 3, (power + 2) // 3) for power in range(3, 13))
        known = [(1, 1, 1), (2, 2, 1), *((1 << a, 1 << b, 1 << c) for a, b, c in powers)]
    else:
        known = [(1, 1), *((1 << power // 2, 1 << (power + 1) // 2) for power in range(2, 9))]
    on_chip = 2 if spec.name in ("v2", "v3", "tpu7x") else 1  # devices of jax
    return {math.prod(shape) * on_chip: shape for shape in known}


def slice_shape(spec: Spec, count: int) -> str:
    """The shape of a slice of `count` devices in chips, as the TPU compiler takes it: 2x4, or 2x2x1.

    Raises:
        ValueError: There is no slice of this size.
    """
    shapes = slice_shapes(spec)
    if count not in shapes:
        raise ValueError(f"{spec.name} has no slice of {count} devices; there are {', '.join(map(str, shapes))}")
    return "x".join(map(str, shapes[count]))

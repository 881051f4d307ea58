"""What jaxlm decides by device, in tables with their measurements, and what a device says of its memory."""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Decode steps in one program. A loop on CPU makes XLA convert every weight again at each step (docs/performance.md);
# on accelerators a program of one small step would wait for the host.
STEPS = {"cpu": 1, "gpu": 4, "tpu": 4}
# Tokens of a prompt that go through the model at once: bounds the memory of activations and the time to a Ctrl-C.
CHUNK = {"cpu": 512, "gpu": 2048, "tpu": 2048}
# Sequences that are decoded together when a caller gives more prompts than that.
BATCH = {"cpu": 8, "gpu": 64, "tpu": 64}
# Tokens of texts to be scored that go through the model at once; on accelerators a guess, for none was at hand.
TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}

# Options of the compiler for the programs of generation. fast_math lets jax 0.12 on CPU add up a product of one row in
# vector registers: 41 GB/s of bfloat16 weights instead of 4 (jax 0.10 needs nothing). Infinities keep their meaning.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_fast_math": True}}


def auto_dtype(stored: np.dtype, platform: str) -> np.dtype:
    """The type in which weights are kept when none is asked for: the file's. On CPU bfloat16 decodes as fast as float32
    with jax 0.10 and twice as fast with 0.12 (docs/performance.md); no other device has been measured."""
    return stored


def cache_dtype(activations: Any, platform: str) -> Any:
    """The type of a cache when none is asked for: the activations'. jax 0.10 copies a bfloat16 cache on CPU whenever
    it is written to, so there it is float32 (4.5 instead of 7.0 ms a layer at 4,096 positions)."""
    old = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12)
    return np.dtype(np.float32) if platform == "cpu" and old else np.dtype(activations)


def available_memory(device: Any) -> int | None:
    """Bytes that can still be allocated on a device; None where it does not say."""
    if device.platform == "cpu":
        return host_memory("MemAvailable")
    stats: dict[str, Any] = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def host_memory(field: str) -> int | None:
    """A figure of /proc/meminfo in bytes; None on systems without it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) * 1024 if found else None


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require(needed: int, device: Any, what: str, hint: str) -> None:
    """Raises MemoryError before an allocation that cannot succeed, with what was needed and what would fit."""
    free = available_memory(device)
    if free is not None and needed > free:
        raise MemoryError(f"{what} need {gigabytes(needed)}, but {device} has {gigabytes(free)} free: {hint}")


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def unseen_accelerator() -> str | None:
    """One line when an NVIDIA GPU or a TPU is in the machine and jax runs on the CPU."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return "An NVIDIA GPU is here but jax does not see it: pip install 'jaxlm[cuda]'"
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return "A TPU may be here but jax does not see it: pip install 'jaxlm[tpu]'"
    return None


# Dense bfloat16 FLOP/s of one device, as its maker specifies it, by the beginning of jax's device_kind. The first that
# fits counts, so a longer name stands before a shorter one.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(device: Any, size: int = 1536) -> tuple[float, str]:
    """FLOP/s of a device, and where the figure is from: its specification, or one large float32 product timed now."""
    for kind, figure in PEAKS.items():
        if device.device_kind.startswith(kind):
            return figure, f"{device.device_kind}, {figure / 1e12:.0f} TFLOP/s bfloat16 (specified)"
    with jax.default_device(device):
        product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
        a = jnp.ones((size, size), jnp.float32) / size
        product(a).block_until_ready()
        best = math.inf
        for _ in range(5):
            begin = time.perf_counter()
            product(a).block_until_ready()
            best = min(best, time.perf_counter() - begin)
    figure = 2 * size**3 / best
    return figure, f"{device.device_kind}, {figure / 1e9:.0f} GFLOP/s float32 (a product of {size} x {size}, measured)"

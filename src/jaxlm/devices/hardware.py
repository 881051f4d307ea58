"""Per-platform defaults (decode steps per dispatch, prefill chunk, batch size, compiler flags), memory queries and peak
FLOP/s."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.devices import host_memory, specs

# Decode steps per dispatch. On CPU a loop makes XLA convert every weight again at each step (docs/performance.md). On
# accelerators a dispatch per step would wait for the host.
STEPS = {"cpu": 1, "gpu": 4, "tpu": 4}
# Prefill chunk: prompt tokens per forward pass. Bounds the memory of activations, and the delay of a Ctrl-C.
CHUNK = {"cpu": 512, "gpu": 2048, "tpu": 2048}
# Sizes of the chunks of what is left of a prompt after its full chunks. All prompts share these programs. Not measured
# on accelerators.
SMALL_CHUNKS = {"cpu": (128, 64, 32), "gpu": (256,), "tpu": (256,)}
# What a chunk costs beyond its tokens, in tokens: it reads all weights. On CPU 20 to 80, more for larger models
# (docs/performance.md).
CHUNK_COST = 40
# Batch size: sequences decoded together; further prompts wait for a free slot.
BATCH = {"cpu": 8, "gpu": 64, "tpu": 64}
# Tokens per forward pass when scoring texts. Not measured on accelerators.
TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}

# Compiler options of the decode and prefill programs. fast_math lets jax 0.12 on CPU accumulate a single-row matmul in
# vector registers: 41 GB/s of bfloat16 weights instead of 4 (jax 0.10 needs no option). Infinities stay exact.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512}}


def auto_dtype(stored: np.dtype, platform: str) -> np.dtype:
    """The dtype of weights for dtype="auto": the checkpoint's.

    On CPU bfloat16 decodes as fast as float32 with jax 0.10 and twice as fast with 0.12 (docs/performance.md).
    """
    return stored


def cache_dtype(activations: Any, platform: str) -> Any:
    """The default dtype of a KV cache: the activations'.

    On CPU with jax 0.10 it is float32: XLA copies a bfloat16 cache at every write there (7.0 instead of 4.5 ms per
    layer at 4,096 positions).
    """
    return np.dtype(np.float32) if platform == "cpu" and jax_before(0, 12) else np.dtype(activations)


def jax_before(major: int, minor: int) -> bool:
    """Whether jax is older than this version. Its compiler on CPU needs other forms of some programs then."""
    return tuple(map(int, jax.__version__.split(".")[:2])) < (major, minor)


def available_memory(device: Any) -> int | None:
    """Free memory of a device in bytes; None where the platform does not report it."""
    if device.platform == "cpu":
        return host_memory.available()
    stats: dict[str, Any] = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require(needed: int, device: Any, what: str, hint: str) -> None:
    """Checks that an allocation fits.

    Args:
        needed: Bytes.
        device: The device of the allocation.
        what: Plural noun for the message ("the weights of ...").
        hint: How to need less.

    Raises:
        MemoryError: The device reports less free memory.
    """
    free = available_memory(device)
    if free is not None and needed > free:
        raise MemoryError(f"{what} need {gigabytes(needed)}, but {device} has {gigabytes(free)} free: {hint}")


def gigabytes(nbytes: int) -> str:
    """Bytes as text in GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def unseen_accelerator() -> str | None:
    """A hint when the machine has an NVIDIA GPU or a TPU that jax does not use; None otherwise."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return "This machine has an NVIDIA GPU, but jax runs on the CPU: pip install 'jaxlm[cuda]'"
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return "This machine may have a TPU, but jax runs on the CPU: pip install 'jaxlm[tpu]'"
    return None


def peak(device: Any, dtype: Any = "float32", sizes: tuple[int, ...] = (1024, 1536, 2048)) -> tuple[float, str]:
    """Peak FLOP/s of a device, and its source: the specification, or the best of several matmuls timed now.

    Args:
        device: The device.
        dtype: The type of the matmuls on a CPU. On a GPU or TPU that devices/specs.py does not list it is bfloat16,
            which has the highest rate that training can use.
        sizes: The matmuls are of [size,size].
    """
    spec = specs.of_device(device)
    if spec is not None:
        return spec.flops, f"{device.device_kind}, {spec.flops / 1e12:.0f} TFLOP/s bfloat16 (specified)"
    dtype, best = jnp.dtype(dtype if device.platform == "cpu" else jnp.bfloat16), 0.0
    with jax.default_device(device):
        matmul = jax.jit(jnp.dot)
        for size in sizes if device.platform == "cpu" else [4 * size for size in sizes]:
            a = jnp.ones((size, size), dtype) / size
            matmul(a, a).block_until_ready()
            for _ in range(3):
                begin = time.perf_counter()
                matmul(a, a).block_until_ready()
                best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best, f"{device.device_kind}, {best / 1e9:.0f} GFLOP/s {dtype.name} (the best matmul, measured)"

"""FLOPs from a config: what a token costs, whatever is computed again, and what the hardware could do."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import params

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


def multiplied(table: params.Table, cfg: Any) -> int:
    """Parameters that multiply each token: all but an embedding that is only looked up (a tied one is the head)."""
    return params.count(table, cfg) - (0 if cfg.tied else cfg.V * cfg.D)


def training(table: params.Table, cfg: Any, T: int, adapter: int | None = None) -> float:
    """FLOPs of training a token in rows of T: 6 N for the products, 6 H N_heads T a layer for causal attention (half of
    the 12 of PaLM, arXiv:2204.02311, appendix B, which counts what the mask hides); a window counts what it shows. With
    an `adapter` of so many parameters the weights beside it get no gradient: 4 N, and 6 for the adapter's own."""
    seen = sum(_seen(T, window) for window in cfg.windows)
    weights = multiplied(table, cfg)
    products = 6 * weights if adapter is None else 4 * weights + 6 * adapter
    return products + 12 * cfg.N * cfg.H * seen


def _seen(T: int, window: int | None) -> float:
    """How many tokens one sees on average, T / 2 where there is no window."""
    if window is None or window >= T:
        return T / 2
    return window * (T - window / 2) / T


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
